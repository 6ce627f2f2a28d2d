"""Importing checkpoints: what is refused and how, shards, LoRA, parts, interruptions, cards."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration, SamModel

from mglmm import MglmmForConditionalGeneration, MglmmProcessor
from mglmm.importing import import_weights
from tests.tiny import CLIP, LLAMA, Tiny, picture, tiny_processor

Edit = Callable[[dict[str, torch.Tensor]], None]


def copied(name: str, shared: Path, folder: Path) -> Path:
    """A checkpoint to be changed, with its vision tower beside it."""
    shutil.copytree(shared / "golden" / name / "ckpt", folder / name)
    shutil.copytree(shared / "golden" / name / "openai", folder / "openai")
    make_writable(folder)
    return folder / name


@pytest.fixture
def lisa(shared_dir: Path, tmp_path: Path) -> Path:
    return copied("lisa", shared_dir, tmp_path)


@pytest.fixture
def glamm(shared_dir: Path, tmp_path: Path) -> Path:
    return copied("glamm", shared_dir, tmp_path)


def make_writable(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def edit_weights(folder: Path, edit: Edit, file: str = "pytorch_model.bin") -> None:
    state = torch.load(folder / file, weights_only=True)
    edit(state)
    torch.save(state, folder / file)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}
    return weights


# ------------------------------------------------------------------ refused

Q, K = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qk")
NORM, GATE = "model.norm.weight", "model.layers.1.mlp.gate_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"


def swap(state: dict[str, torch.Tensor]) -> None:
    state[GATE], state[DOWN] = state[DOWN], state[GATE]


def rename(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.0.self_attn.query.weight"] = state.pop(Q)


def add_region(state: dict[str, torch.Tensor]) -> None:
    state["model.region_encoder.roi_align.updims.weight"] = torch.zeros(64, 64)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        # tensors under each other's names
        (swap, r"2 of the wrong shape \(model\.layers\.1\.mlp\.down_proj\.weight \(176, 64\) instead of \(64, 176\)"),
        # one is gone
        (lambda state: state.pop(NORM), r"1 missing \(model\.norm\.weight\)"),
        # one is too short
        (lambda state: state.update({NORM: torch.ones(63)}), r"model\.norm\.weight \(63,\) instead of \(64,\)"),
        # another name is both missing and left over
        (
            rename,
            r"1 missing \(model\.layers\.0\.self_attn\.q_proj\.weight\); 1 unexpected \(model\.layers\.0\.self_attn\.que",
        ),
        # one tensor under two names, with and without PEFT's prefix
        (lambda state: state.update({f"base_model.model.{NORM}": state[NORM]}), "1 unexpected"),
        # half of a LoRA
        (
            lambda state: state.update({"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(8, 64)}),
            "1 unexpected",
        ),
        # something that LISA does not have
        (add_region, r"1 unexpected \(model\.region_encoder"),
        # SAM is incomplete, also where its size stands
        (lambda state: state.pop("model.visual_model.image_encoder.pos_embed"), "image_encoder.pos_embed is missing"),
        (lambda state: state.pop("model.visual_model.mask_decoder.iou_token.weight"), "iou_token.weight is missing"),
        # no language model at all
        (lambda state: state.pop("model.embed_tokens.weight"), "holds no model.embed_tokens.weight"),
    ],
)
def test_changed_tensors_are_refused(lisa: Path, edit: Edit, message: str) -> None:
    edit_weights(lisa, edit)
    with pytest.raises(ValueError, match=message):
        import_weights(lisa, lisa.parent / "out")
    assert not (lisa.parent / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # GLaMM-FullScope_v0's class name
        ({"architectures": ["LISAForCausalLM"]}, "almost GLaMM, but not quite: config.json names LISAForCausalLM.*_v0"),
        # its older region encoder
        ({"with_spi": True}, "with_spi"),
        # its prompts would be others
        ({"mm_use_im_start_end": False}, "mm_use_im_start_end is false"),
        # the sizes that config.json states are not those of the tensors
        ({"num_hidden_layers": 2}, "9 unexpected"),
        ({"intermediate_size": 128}, r"9 of the wrong shape"),
    ],
)
def test_almost_glamm_is_refused(glamm: Path, changes: dict, message: str) -> None:
    edit_config(glamm, **changes)
    with pytest.raises(ValueError, match=message):
        import_weights(glamm, glamm.parent / "out")


@pytest.mark.parametrize("kept", [False, True])  # the last tensor of the region encoder is lost, or all but that one
def test_lost_region_encoder_is_refused(glamm: Path, kept: bool) -> None:
    last = "model.region_encoder.roi_align.updims.weight"
    lost = set()
    for file in glamm.glob("*.bin"):
        state = torch.load(file, weights_only=True)
        lost |= {name for name in state if "region_encoder" in name and (name == last) != kept}
        torch.save({name: tensor for name, tensor in state.items() if name not in lost}, file)
    index = json.loads((glamm / "pytorch_model.bin.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in lost}
    (glamm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=f"{len(lost)} missing"):
        import_weights(glamm, glamm.parent / "out")


def test_other_vision_tower_is_refused(glamm: Path, shared_dir: Path) -> None:
    tower = next((shared_dir / "golden" / "lisa" / "openai").iterdir())
    with pytest.raises(ValueError, match=r"gives 256 image tokens \(images of 224 px\), GLaMM has 576"):
        import_weights(glamm, glamm.parent / "out", vision_tower=str(tower))


def test_other_vocabulary_is_refused(glamm: Path) -> None:
    added = json.loads((glamm / "added_tokens.json").read_text())
    (glamm / "added_tokens.json").write_text(json.dumps(added | {"<extra>": 1007}))
    with pytest.raises(ValueError, match="1008 entries but the embeddings have 1007 rows"):
        import_weights(glamm, glamm.parent / "out")
    grow = {"model.embed_tokens.weight": (1009, 64), "lm_head.weight": (1009, 64)}
    for file in glamm.glob("*.bin"):
        edit_weights(
            glamm, lambda state: state.update({k: torch.ones(v) for k, v in grow.items() if k in state}), file.name
        )
    with pytest.raises(ValueError, match="1009 entries, 9 more than its SentencePiece model; GLaMM adds 7"):
        import_weights(glamm, glamm.parent / "out")


def test_shards_that_do_not_fit_their_index_are_refused(glamm: Path) -> None:
    index = json.loads((glamm / "pytorch_model.bin.index.json").read_text())
    names = sorted(index["weight_map"])
    first, second = names[0], next(n for n in names if index["weight_map"][n] != index["weight_map"][names[0]])
    files = index["weight_map"]
    files[first], files[second] = files[second], files[first]
    (glamm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not fit its files: 2 tensors are elsewhere"):
        import_weights(glamm, glamm.parent / "out")
    next(glamm.glob("*00003*.bin")).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 weight files are missing"):
        import_weights(glamm, glamm.parent / "out")


def test_files_outside_of_the_folder_are_refused(glamm: Path) -> None:
    index = json.loads((glamm / "pytorch_model.bin.index.json").read_text())
    index["weight_map"]["lm_head.weight"] = "../secret.bin"
    (glamm / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="files outside of its folder"):
        import_weights(glamm, glamm.parent / "out")


class Payload:
    def __reduce__(self) -> tuple:
        return print, ("executed",)


def test_code_in_a_file_is_not_executed(lisa: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model.norm.weight": Payload()}, lisa / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be read as plain tensors"):
        import_weights(lisa, lisa.parent / "out")
    assert "executed" not in capsys.readouterr().out


def test_missing_things_are_named(lisa: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder or file"):
        import_weights("./nowhere", lisa.parent / "out")
    shutil.rmtree(lisa.parent / "openai")
    with pytest.raises((OSError, ValueError)):
        import_weights(lisa, lisa.parent / "out")
    edit_config(lisa, mm_vision_tower=None, vision_tower=None)
    with pytest.raises(ValueError, match="--vision-tower"):
        import_weights(lisa, lisa.parent / "out")
    (lisa / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="--base"):
        import_weights(lisa, lisa.parent / "out")
    (lisa.parent / "out").mkdir()
    (lisa.parent / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_weights(lisa, lisa.parent / "out")


# ------------------------------------------------------------------ accepted


def test_report_counts_every_tensor(lisa: Path) -> None:
    """Source names end up in exactly one of: matched, renamed, dropped."""
    report = import_weights(lisa, lisa.parent / "out")
    names = list(torch.load(lisa / "pytorch_model.bin", weights_only=True))
    assert sorted([*report.matched, *report.renamed, *report.dropped]) == sorted(names)
    assert {name: reason for name, reason in report.dropped.items() if "inv_freq" not in name} == {}
    assert report.renamed["model.mm_projector.weight"] == "model.multi_modal_projector.linear_1.weight"
    assert sorted(report.new) == ["lm_head.weight[1003:]", "model.language_model.embed_tokens.weight[1003:]"]
    assert set(report.taken.values()) == {"vision tower"}
    record = json.loads((lisa.parent / "out" / "import.json").read_text())
    assert record["layout"] == "LISA" and record["tensors"]["renamed"] == report.renamed


def test_allow_missing_names_exceptions(lisa: Path) -> None:
    def edit(state: dict[str, torch.Tensor]) -> None:
        del state["model.text_hidden_fcs.0.0.bias"]
        state["extra.weight"] = torch.ones(2)

    edit_weights(lisa, edit)
    with pytest.raises(ValueError, match=r"1 missing .*; 1 unexpected"):
        import_weights(lisa, lisa.parent / "out")
    report = import_weights(lisa, lisa.parent / "out", allow_missing=["model.text_hidden_fcs.0.0.bias", "extra.*"])
    assert "model.mask_projector.linear_1.bias" in report.new and "extra.weight" in report.dropped
    MglmmForConditionalGeneration.from_pretrained(lisa.parent / "out")


def test_dtypes(lisa: Path) -> None:
    """Mixed files keep their types; a requested one is for all but the mask path."""
    language = ("model.layers", "model.embed_tokens", "lm_head", "model.norm", "model.mm_projector")
    edit_weights(
        lisa,
        lambda state: state.update({n: t.bfloat16() for n, t in state.items() if n.startswith(language)}),
    )
    import_weights(lisa, lisa.parent / "stored")
    weights = weights_of(lisa.parent / "stored")
    assert weights["lm_head.weight"].dtype == torch.bfloat16
    assert weights["model.pixel_encoder.vision_encoder.pos_embed"].dtype == torch.float32
    model = MglmmForConditionalGeneration.from_pretrained(lisa.parent / "stored")
    assert model.dtype == torch.bfloat16 and model.model.mask_decoder.iou_token.weight.dtype == torch.float32
    import_weights(lisa, lisa.parent / "half", dtype="float16")
    kinds = {name.split(".")[1]: tensor.dtype for name, tensor in weights_of(lisa.parent / "half").items()}
    assert kinds["mask_decoder"] == kinds["mask_projector"] == torch.float32
    assert kinds["language_model"] == kinds["pixel_encoder"] == kinds["vision_tower"] == torch.float16


@pytest.mark.parametrize("prefix", ["", "base_model.model."])  # GLaMM's and LISA's training files
@pytest.mark.parametrize("inner", ["", ".base_layer"])  # peft 0.5 and later ones
def test_unmerged_lora(lisa: Path, prefix: str, inner: str) -> None:
    """A consolidated training file alone; configuration and tokenizer come from the base."""
    a, b = torch.randn(8, 64), torch.randn(64, 8)
    state = torch.load(lisa / "pytorch_model.bin", weights_only=True)
    expected = state[Q] + 2 * b @ a
    training = {prefix + name: tensor for name, tensor in state.items()}
    training[prefix + Q.replace(".weight", f"{inner}.weight")] = training.pop(prefix + Q)
    training[prefix + Q.replace(".weight", ".lora_A.default.weight")] = a
    training[prefix + Q.replace(".weight", ".lora_B.default.weight")] = b
    training[prefix + "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"] = torch.ones(32)
    file = lisa.parent / "consolidated.bin"
    torch.save(training, file)
    report = import_weights(file, lisa.parent / "out", base=str(lisa))
    assert len(report.folded) == 1
    assert any("vision_tower" in name for name in report.dropped)
    found = weights_of(lisa.parent / "out")["model.language_model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(found, expected)


def llava_of(glamm: Path) -> Path:
    """A LLaVA-1.5 in the original layout: what GLaMM started from."""
    folder = glamm.parent / "llava"
    shutil.copytree(glamm, folder)
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.bin")):
        state |= torch.load(file, weights_only=True)
        file.unlink()
    (folder / "pytorch_model.bin.index.json").unlink()
    (folder / "added_tokens.json").unlink()
    ours = ("model.grounding_encoder.", "model.region_encoder.", "model.text_hidden_fcs.")
    state = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = state[name][:1000].clone()
    torch.save(state, folder / "pytorch_model.bin")
    edit_config(folder, architectures=["LlavaLlamaForCausalLM"], vocab_size=1000, mm_projector_type="mlp2x_gelu")
    return folder


def test_llava_with_sam_becomes_a_model_to_train(glamm: Path, shared_dir: Path) -> None:
    """New rows are the mean of the old ones, the mask projector is fresh, SAM is Meta's."""
    sam = shared_dir / "golden" / "glamm" / "sam_vit_h_tiny.pth"
    llava = llava_of(glamm)
    with pytest.raises(ValueError, match="--sam"):
        import_weights(llava, glamm.parent / "out")
    report = import_weights(llava, glamm.parent / "out", sam=str(sam))
    assert [name for name in report.new if "mask_projector" in name]
    assert set(report.taken.values()) == {"vision tower", "SAM"}
    weights = weights_of(glamm.parent / "out")
    rows = weights["model.language_model.embed_tokens.weight"]
    assert rows.shape == (1004, 64)
    torch.testing.assert_close(rows[1000:], rows[:1000].mean(0).expand(4, 64))
    original = torch.load(sam, weights_only=True)["mask_decoder.iou_token.weight"]
    torch.testing.assert_close(weights["model.mask_decoder.iou_token.weight"], original)
    model = MglmmForConditionalGeneration.from_pretrained(glamm.parent / "out")
    processor = MglmmProcessor.from_pretrained(glamm.parent / "out")
    assert processor.tokenizer.convert_tokens_to_ids(["[SEG]", "<p>", "</p>", "<image>"]) == [1000, 1001, 1002, 1003]
    assert model.config.seg_token_id == 1000 and processor.keep_to_grammar
    assert model.model.mask_projector.linear_1.weight.std() > 0
    again = import_weights(llava, glamm.parent / "again", sam=str(sam))
    assert again.new == report.new
    repeated = weights_of(glamm.parent / "again")
    assert all(torch.equal(repeated[name], tensor) for name, tensor in weights.items())


def test_kill_and_go_on(glamm: Path) -> None:
    """SIGKILL after the first file: the next run keeps it, and ends with the same bytes as an undisturbed one."""
    import_weights(glamm, glamm.parent / "whole", max_shard_size=10**7)
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import mglmm.modeling_mglmm.weight_import as module\n"
        "from mglmm.importing import import_weights\n"
        "save = module.save_file\n"
        "def save_once(tensors, path, **kwargs):\n"
        "    if list(Path(path).parent.glob('*.safetensors')):\n"
        "        Path(path).write_bytes(b'half')\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    save(tensors, path, **kwargs)\n"
        "module.save_file = save_once\n"
        "import_weights(sys.argv[1], sys.argv[2], max_shard_size=10**7)\n"
    )
    out = glamm.parent / "out"
    run = subprocess.run([sys.executable, "-c", script, glamm, out], capture_output=True)
    assert run.returncode == -signal.SIGKILL
    assert not out.exists()
    unfinished = glamm.parent / ".out.unfinished"
    (first,) = unfinished.glob("*.safetensors")
    written = first.stat().st_mtime_ns
    import_weights(glamm, out, max_shard_size=10**7)
    assert (out / first.name).stat().st_mtime_ns == written
    assert not unfinished.exists() and not list(out.glob("*.unfinished"))
    for file in (glamm.parent / "whole").glob("*.safetensors"):
        assert (out / file.name).read_bytes() == file.read_bytes()
    with pytest.raises(ValueError, match="exists and is not empty"):
        import_weights(glamm, out)


def test_card_says_where_it_comes_from(lisa: Path) -> None:
    (lisa / "README.md").write_text("---\nlicense: llama2\n---\n# LISA\n")
    import_weights(lisa, lisa.parent / "out")
    card = ModelCard.load(lisa.parent / "out" / "README.md")
    assert "imported" in card.data.tags and card.data.license == "llama2"
    assert "imported" in card.text and "2308.00692" in card.text and str(lisa) in card.text
    import_weights(lisa, lisa.parent / "other", license="cc-by-4.0")
    assert ModelCard.load(lisa.parent / "other" / "README.md").data.license == "cc-by-4.0"


def test_folder_is_an_ordinary_one(lisa: Path) -> None:
    """Saved and loaded again it computes the same; transformers' own classes read it, remote code included."""
    import_weights(lisa, lisa.parent / "out")
    model = MglmmForConditionalGeneration.from_pretrained(lisa.parent / "out")
    processor = MglmmProcessor.from_pretrained(lisa.parent / "out")
    model.save_pretrained(lisa.parent / "saved")
    processor.save_pretrained(lisa.parent / "saved")
    again = MglmmForConditionalGeneration.from_pretrained(lisa.parent / "saved")
    state = again.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (lisa.parent / "out" / "modeling_mglmm.py").is_file()
    text = "USER: <im_start><image><im_end>\nhi [SEG]. </s>x"
    ids = processor.tokenizer(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(lisa.parent / "saved")(text)["input_ids"] == ids
    assert not model.training and model.generation_config.do_sample is False


def test_transformers_sam_as_part(glamm: Path, shared_dir: Path) -> None:
    """The same SAM in transformers' own layout gives the same weights."""
    from mglmm.modeling_mglmm.sam_checkpoint import load_sam_checkpoint

    file = shared_dir / "golden" / "glamm" / "sam_vit_h_tiny.pth"
    load_sam_checkpoint(file).save_pretrained(glamm.parent / "sam")
    assert SamModel.from_pretrained(glamm.parent / "sam") is not None
    llava = llava_of(glamm)
    import_weights(llava, glamm.parent / "a", sam=str(file))
    import_weights(llava, glamm.parent / "b", sam=str(glamm.parent / "sam"))
    a, b = weights_of(glamm.parent / "a"), weights_of(glamm.parent / "b")
    assert all(torch.equal(b[name], tensor) for name, tensor in a.items())


def test_mglmm_layout(glamm: Path) -> None:
    """GLaMM's names with another prefix and no region encoder; the saved index of [SEG] is not needed."""
    for file in sorted(glamm.glob("*.bin")):
        state = torch.load(file, weights_only=True)
        old, new = "model.grounding_encoder.", "model.segment_encoder."
        state = {name.replace(old, new): t for name, t in state.items() if "region_encoder" not in name}
        torch.save(state, file)
    index = json.loads((glamm / "pytorch_model.bin.index.json").read_text())
    names = {
        name.replace("grounding_encoder", "segment_encoder"): file
        for name, file in index["weight_map"].items()
        if "region_encoder" not in name
    }
    (glamm / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    edit_config(
        glamm, architectures=["MGLMMForCausalLM"], with_region=False, seg_token_idx=1004, vision_pretrained="vit_h"
    )
    import_weights(glamm, glamm.parent / "out")
    model = MglmmForConditionalGeneration.from_pretrained(glamm.parent / "out")
    processor = MglmmProcessor.from_pretrained(glamm.parent / "out")
    assert model.model.region_encoder is None and processor.region_token is None
    assert (model.config.seg_token_id, model.config.image_token_id) == (1004, 1007)
    assert json.loads((glamm.parent / "out" / "import.json").read_text())["layout"] == "MGLMM"


def test_lisa_with_phrase_tags(lisa: Path) -> None:
    """Fresh rows for the tags; what LISA knew stays where it was."""
    import_weights(lisa, lisa.parent / "out", add_phrase_tags=True)
    processor = MglmmProcessor.from_pretrained(lisa.parent / "out")
    assert processor.control_token_ids == [1003, 1000, 1004, 1005]
    rows = weights_of(lisa.parent / "out")["model.language_model.embed_tokens.weight"]
    original = torch.load(lisa / "pytorch_model.bin", weights_only=True)["model.embed_tokens.weight"]
    assert torch.equal(rows[:1003], original)
    torch.testing.assert_close(rows[1003:], original.mean(0).expand(3, -1))


@pytest.mark.parametrize("old_names", [True, False])  # those of the files on the hub, those of the model
def test_llava_of_transformers(tiny: Tiny, old_names: bool, tmp_path: Path) -> None:
    """The text of the imported model is that of LlavaForConditionalGeneration."""
    processor = tiny_processor()
    torch.manual_seed(0)
    vocabulary = len(processor.tokenizer) + 8  # padded, as llava-hf's is
    config = LlavaConfig(
        vision_config=CLIP,
        text_config={**LLAMA, "vocab_size": vocabulary, "tie_word_embeddings": False},
        image_token_index=processor.image_token_id,
        image_seq_length=4,
    )
    llava = LlavaForConditionalGeneration(config).eval()
    folder = tmp_path / "llava"
    llava.save_pretrained(folder)
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    if not old_names:  # what `save_pretrained` writes are the old ones
        save_file(
            {name: tensor.contiguous() for name, tensor in llava.state_dict().items()}, folder / "model.safetensors"
        )
    assert ("model.language_model.norm.weight" in weights_of(folder)) != old_names
    sam = SamModel(tiny.model.config.sam_config)
    sam.save_pretrained(tmp_path / "sam")
    import_weights(folder, tmp_path / "out", sam=str(tmp_path / "sam"))
    model = MglmmForConditionalGeneration.from_pretrained(tmp_path / "out")
    inputs = processor(images=picture(), text="USER: <image>\nWhat is it? ASSISTANT:", return_tensors="pt")
    fields = {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected, found = llava(**fields).logits, model(**fields).logits
    words = slice(processor.image_token_id)
    torch.testing.assert_close(found[..., words], expected[..., words], atol=1e-4, rtol=0)
