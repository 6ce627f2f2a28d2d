"""Merging an adapter into its base: the same model as a plain checkpoint, all of it or nothing."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from transformers import LlamaConfig, LlamaForCausalLM

from mglmm.cli import main
from mglmm.hub_cards.cards import model_card
from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.merging import merge
from mglmm.trainer.trainable import make_trainable
from tests.tiny import LLAMA, tiny_config, tiny_model, tiny_processor
from tests.trainer.conftest import training_arguments, uscdf_row


class Trained(NamedTuple):
    adapter: Path  # with its processor
    base: Path
    batch: dict[str, Any]
    outputs: Any  # of the adapted model


def save_base(folder: Path, shared: bool = False, **kwargs: Any) -> Path:
    processor = tiny_processor(shared)
    tiny_model(processor, shared, **kwargs).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def trained(folder: Path, shared: bool) -> Trained:
    """A shared tower comes with tied embeddings, as in the small checkpoint."""
    base = save_base(folder / "base", shared, tie_word_embeddings=shared)
    processor = MglmmProcessor.from_pretrained(base)
    torch.manual_seed(0)  # for LoRA
    new_ids = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
    model = make_trainable(
        MglmmForConditionalGeneration.from_pretrained(base), training_arguments(folder / "run"), new_ids
    )
    rows = [uscdf_row(0, "referring", ("the hat", "the dog")), uscdf_row(1, "absent", ())]
    batch = MglmmDataCollator(processor, 16)(rows)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    with torch.no_grad():
        return Trained(folder / "adapter", base, batch, model(**batch))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("untied"), shared=False)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(tmp_path_factory.mktemp("tied"), shared=True)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_the_merged_checkpoint_is_the_same_model(name, request, tmp_path):
    run: Trained = request.getfixturevalue(name)
    folder = merge(str(run.adapter), tmp_path / "new" / "merged")
    assert folder == tmp_path / "new" / "merged" and [path.name for path in folder.parent.iterdir()] == ["merged"]
    assert not list(folder.glob("adapter*"))
    loaded: Any = MglmmForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, loading = loaded
    assert not any(loading.values())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (name == "tied")
    with torch.no_grad():
        outputs = model.eval()(**run.batch)
        before = MglmmForConditionalGeneration.from_pretrained(run.base).eval()(**run.batch)
    torch.testing.assert_close(outputs.logits, run.outputs.logits, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.pred_masks, run.outputs.pred_masks, atol=1e-5, rtol=1e-5)
    assert (before.logits - outputs.logits).abs().max() > 0.1
    assert model.generation_config.eos_token_id == 2
    ids = [MglmmProcessor.from_pretrained(path).seg_token_id for path in (folder, run.base)]
    assert ids[0] == ids[1] == model.config.seg_token_id


def test_the_base_may_have_moved_and_the_processor_be_with_it(untied, tmp_path, capsys, monkeypatch):
    """As a checkpoint in the middle of a run has none; through the command line."""
    moved, adapter = tmp_path / "moved", tmp_path / "adapter"
    shutil.copytree(untied.base, moved)
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(untied.adapter / name, adapter)
    config = adapter / "adapter_config.json"
    config.write_text(config.read_text().replace(str(untied.base), str(tmp_path / "gone")))
    with pytest.raises(FileNotFoundError, match="there is no folder .*gone.*--base"):
        merge(str(adapter), tmp_path / "merged")
    (tmp_path / "merged").mkdir()  # an empty folder is no obstacle
    monkeypatch.setattr("sys.argv", ["mglmm", "merge", str(adapter), str(tmp_path / "merged"), "--base", str(moved)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (None, 0)
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "merged"))
    with torch.no_grad():
        model = MglmmForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
        masks = model(**untied.batch).pred_masks
    torch.testing.assert_close(masks, untied.outputs.pred_masks, atol=1e-5, rtol=1e-5)
    MglmmProcessor.from_pretrained(tmp_path / "merged")


# ---------------------------------------------------------------------- the card


def test_the_card_says_what_the_adapter_knows(untied, tmp_path):
    """PEFT's own card says nothing."""
    card = ModelCard.load(merge(str(untied.adapter), tmp_path / "merged") / "README.md")
    assert "More Information Needed" not in card.content and str(untied.base) not in card.content
    trained_parts = "LoRA on the language model, the rows of the new tokens, multi_modal_projector, mask_projector"
    assert f"Trained: {trained_parts}, mask_decoder." in card.text and "merged into its base, `base`" in card.text
    rows = [line for line in card.text.splitlines() if line.endswith("| yes |")]
    assert [row.split("`")[1] for row in rows] == [
        "mask_projector",
        "mask_decoder",
        "multi_modal_projector",
        "language_model",
        "lm_head",
    ]


def test_the_card_goes_on_from_those_of_adapter_and_base(untied, tmp_path):
    adapter, base = tmp_path / "adapter", tmp_path / "base"
    shutil.copytree(untied.adapter, adapter)
    shutil.copytree(untied.base, base)
    model = MglmmForConditionalGeneration.from_pretrained(base)
    model_card(model, model_name="base", base_model=["some/tower", "some/llm"]).save(base / "README.md")
    training = "30 steps on hats.\n\n![curves](training_curves.png)"
    model_card(model, model_name="run", datasets=["some/hats"], training=training).save(adapter / "README.md")
    card = ModelCard.load(merge(str(adapter), tmp_path / "merged", str(base)) / "README.md")
    assert card.data.base_model == ["some/tower", "some/llm"] and card.data.datasets == ["some/hats"]
    assert "30 steps on hats." in card.text and "curves.png" not in card.text
    assert isinstance(card.data, ModelCardData) and "Trained: " not in card.text


# ---------------------------------------------------------------------- what is refused


def other_bases(folder: Path) -> dict[str, Path]:
    """MGLMM models that the adapter of `untied` does not fit, and one that is no MGLMM."""
    processor = tiny_processor()
    text = tiny_config(processor).text_config.to_dict()
    bases = {
        "wide": save_base(folder / "wide", text_config=text | {"hidden_size": 64}),
        "deep": save_base(folder / "deep", text_config=text | {"num_hidden_layers": 3}),
        "shallow": save_base(folder / "shallow", text_config=text | {"num_hidden_layers": 1}),
        "tied": save_base(folder / "tied", tie_word_embeddings=True),
        "shared": save_base(folder / "shared", shared=True),
        "short": folder / "short",
        "llama": folder / "llama",
    }
    short = tiny_model(processor)
    short.resize_token_embeddings(402)
    short.save_pretrained(bases["short"])
    LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1, "vocab_size": 8})).save_pretrained(bases["llama"])
    return bases


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return other_bases(tmp_path_factory.mktemp("others"))


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("wide", "do not fit: .*size mismatch"),
        ("deep", "do not fit: 4 weights that the model needs are not in the adapter and 0 of"),  # two matrices, q and v
        ("shallow", "do not fit: 0 weights .* and 4 of the adapter are not in the model"),  # PEFT says nothing
        ("tied", "do not fit: 0 weights .* and 1 of the adapter .*lm_head"),  # neither
        ("short", "do not fit: index 402 is out of bounds"),
        ("shared", "give no sound model: mask frame: sam_image_size is 64: set it to None"),  # every weight fits
        ("llama", "is a model of type 'llama', not 'mglmm': name it with --base"),  # would load, at random
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_base_that_does_not_fit(untied, others, base, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        merge(str(untied.adapter), tmp_path / "merged", str(others[base]))
    assert not list(tmp_path.iterdir())


def test_what_is_no_adapter(untied, tmp_path):
    (tmp_path / "empty").mkdir()
    for adapter, message in (
        (tmp_path / "nowhere", "there is no folder .*nowhere.*: name the output folder of a run"),
        (tmp_path / "empty", "is no adapter, it has no adapter_config.json: name the output folder of a run"),
        (untied.base, "is no adapter, .*: it is a plain checkpoint, with nothing to merge"),
        ("me/adapter", "me/adapter is no adapter"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            merge(str(adapter), tmp_path / "merged")
    with pytest.raises(FileNotFoundError, match="the base 'me/base' cannot be loaded: name where it is with --base"):
        merge(str(untied.adapter), tmp_path / "merged", "me/base")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_an_adapter_that_names_no_base(untied, tmp_path):
    """As that of a run from parts."""
    shutil.copytree(untied.adapter, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(ValueError, match="does not say to which model it belongs: name it with --base"):
        merge(str(tmp_path / "adapter"), tmp_path / "merged")


def test_nothing_is_overwritten(untied, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for output in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match="exists and is not empty: name another folder"):
            merge(str(untied.adapter), output)
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_failure_leaves_nothing_behind(untied, tmp_path, monkeypatch):
    def full(self, folder, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(MglmmProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        merge(str(untied.adapter), tmp_path / "merged")
    assert not list(tmp_path.iterdir())
