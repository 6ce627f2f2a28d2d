"""Checks of a loaded model: each fails when its property, and only its property, is broken; the doctor of a folder."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaForCausalLM

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.chat_templates import CHATML, LLAVA_V1
from mglmm.trainer.checks import check
from mglmm.trainer.doctor import Check, examine, report, require, run_doctor
from tests.tiny import CLIP, Tiny, tiny_model, tiny_processor

NAMES = [
    "control tokens",
    "ids in the configuration",
    "tokens in a sentence",
    "escaping",
    "supervised turns",
    "end of answer",
    "stop token",
    "padding",
    "image tokens",
    "mask frame",
    "vocabulary",
    "new-token rows",
    "finite weights",
    "materialised weights",
    "dtypes",
]


@pytest.fixture
def patient(tiny) -> Tiny:
    """The sound tiny model and its processor, to be broken."""
    return Tiny(*copy.deepcopy(tuple(tiny)))


def embedding_of(model: MglmmForConditionalGeneration) -> torch.Tensor:
    return model.get_input_embeddings().weight.data


def edit_tokenizer(processor: MglmmProcessor, change: Callable[[list[dict]], list[dict]]) -> None:
    """Changes the list of added tokens behind the back of the processor."""
    tokenizer = processor.tokenizer
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    saved["added_tokens"] = change(saved["added_tokens"])
    processor.tokenizer = type(tokenizer)(
        tokenizer_object=Tokenizer.from_str(json.dumps(saved)), **{n: tokenizer.special_tokens_map[n] for n in SPECIAL}
    )


SPECIAL = ("pad_token", "bos_token", "eos_token")


def drop_tag(model, processor):
    edit_tokenizer(processor, lambda tokens: [token for token in tokens if token["content"] != "</p>"])


def make_seg_special(model, processor):
    edit_tokenizer(
        processor, lambda tokens: [{**t, "special": t["special"] or t["content"] == "[SEG]"} for t in tokens]
    )


def other_seg_id(model, processor):
    model.config.seg_token_id += 1


def other_image_id(model, processor):
    model.config.image_token_id = 5


def no_escape(model, processor):
    processor._escape = lambda message: message


def template(text: str):
    def change(model, processor):
        processor.chat_template = text

    return change


def stop_elsewhere(model, processor):
    model.generation_config.eos_token_id = 7


def no_pad(model, processor):
    processor.tokenizer.pad_token = None


def pad_with_seg(model, processor):
    processor.tokenizer.pad_token = "[SEG]"


def pool_tokens(model, processor):
    processor.image_token_stride = 2


def other_patches(model, processor):
    processor.patch_size = 7


def other_crop(model, processor):
    processor.image_processor.crop_size = {"height": 42, "width": 42}


def larger_frame(model, processor):
    processor.sam_image_size = 128


def same_grid_other_size(model, processor):
    processor.sam_image_size = 70


def no_frame(model, processor):
    processor.sam_image_size = None


def more_tokens(model, processor):
    processor.tokenizer.add_tokens(["<extra>"])


def short_head(model, processor):
    model.lm_head = nn.Linear(48, len(processor.tokenizer) - 1, bias=False)


def mean_row(model, processor):
    control = processor.control_token_ids
    weight = embedding_of(model)
    others = [i for i in range(len(weight)) if i not in control]
    weight[processor.seg_token_id] = weight[others].mean(0)


def nearly_mean_head_row(model, processor):
    weight = model.lm_head.weight.data
    weight[processor.control_token_ids[3]] = weight.mean(0) + 1e-4 * torch.randn(48)


def zero_row(model, processor):
    embedding_of(model)[processor.control_token_ids[2]] = 0.0


def nan_weight(model, processor):
    model.model.mask_projector.linear_1.weight.data[0, 0] = torch.nan


def meta_layer(model, processor):
    model.model.language_model.layers[1].mlp.up_proj.to("meta")


def low_mask_path(model, processor):
    model.model.mask_decoder.bfloat16()


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (drop_tag, "control tokens", "</p> is 4 tokens"),  # a tokenizer of the base model, saved in place of ours
        (other_seg_id, "ids in the configuration", "seg_token_id is"),  # masks of another token
        (other_image_id, "ids in the configuration", "image_token_id is 5"),  # the image would land elsewhere
        (make_seg_special, "tokens in a sentence", "special=False"),  # skip_special_tokens would drop the [SEG]s
        (no_escape, "escaping", ""),  # a user who writes [SEG]; says why in the case of <image>
        # nothing is supervised: the text would never be learnt
        (
            template(LLAVA_V1.replace("{% generation %}", "").replace("{% endgeneration %}", "")),
            "supervised turns",
            "0",
        ),
        # the questions are supervised, too
        (
            template(
                LLAVA_V1.replace("{% generation %}", "")
                .replace("{% endgeneration %}", "")
                .replace("{% for message in messages %}", "{% generation %}{% for message in messages %}")
                .replace("{% endfor %}{% if add", "{% endfor %}{% endgeneration %}{% if add")
            ),
            "supervised turns",
            "1 supervised span",
        ),
        (template(LLAVA_V1.replace("{{ eos_token }}", "")), "end of answer", "never stop"),  # no end at all
        # an end that is not learnt
        (
            template(LLAVA_V1.replace("{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}")),
            "end of answer",
            "</s>",
        ),
        (template(CHATML), "end of answer", "never stop"),  # another model's template: ends in <|im_end|>
        (stop_elsewhere, "stop token", "stops at [7], not at the tokenizer's 2"),
        (no_pad, "padding", "no pad token"),
        (pad_with_seg, "padding", "carries meaning"),
        (pool_tokens, "image tokens", "writes 1 <image> tokens but the tower gives 4"),
        (other_patches, "image tokens", "writes 16 <image> tokens but the tower gives 4"),
        (other_crop, "image tokens", "42"),  # the tower refuses; its reason is passed on in one line
        (
            larger_frame,
            "mask frame",
            "8 x 8 cells but the mask decoder works on 4 x 4: set the processor's image size to 64",
        ),
        (same_grid_other_size, "mask frame", "70 x 70"),  # the grid would fit, but SAM's encoder takes one size only
        (no_frame, "mask frame", "sam_image_size is None"),
        (more_tokens, "vocabulary", "the embedding has"),
        (short_head, "vocabulary", "the head has"),
        (mean_row, "new-token rows", "[SEG] of the embedding; the model was not trained"),
        (nearly_mean_head_row, "new-token rows", "</p> of the head"),  # as transformers initialises resized rows
        (zero_row, "new-token rows", "zero rows: <p> of the embedding"),
        (nan_weight, "finite weights", "model.mask_projector.linear_1.weight"),
        (meta_layer, "materialised weights", "model.language_model.layers.1.mlp.up_proj.weight"),
        (low_mask_path, "dtypes", "float32 in mask_decoder"),
    ],
)
def test_each_check_fails_for_its_own_fault_only(patient, damage, name, message):
    damage(*patient)
    checks = examine(*patient)
    assert [c.name for c in checks] == NAMES
    failed = {c.name: c.message for c in checks if not c.ok}
    assert failed.keys() == {name}, report(checks)
    assert message in failed[name] and "\n" not in failed[name]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (tiny_processor(), {}),  # SAM's own encoder
        lambda: (tiny_processor(shared=True), {"shared": True}),  # the tower is the pixel encoder
        lambda: (tiny_processor(), {"tie_word_embeddings": True}),
        lambda: (tiny_processor(), {"pixel_config": {**CLIP, "image_size": 64, "patch_size": 16}}),  # another backbone
    ],
    ids=["sam", "shared", "tied", "backbone"],
)
def test_sound_models_pass(make):
    processor, options = make()
    model = tiny_model(processor, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checks = examine(model, processor)
    assert all(c.ok for c in checks), report(checks)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pad_token_that_is_also_the_end_is_no_fault(patient):
    """Labels come from the chat template, so that the end of an answer stays supervised."""
    patient.processor.tokenizer.pad_token = "</s>"
    assert all(c.ok for c in examine(*patient))


def test_an_answer_may_end_with_another_stop_token(patient):
    """As in models whose turns end with a token of their own: fine once generation stops there as well."""
    model, processor = patient
    processor.chat_template = LLAVA_V1.replace("{{ eos_token }}", "<s>")
    assert [c.name for c in examine(model, processor) if not c.ok] == ["end of answer"]
    model.generation_config.eos_token_id = [2, 1]
    assert all(c.ok for c in examine(model, processor))


def test_a_bfloat16_model_with_its_mask_path_in_float32_is_sound(patient):
    model, processor = patient
    for part in (model.model.vision_tower, model.model.language_model, model.lm_head):
        part.bfloat16()
    (found,) = [c for c in examine(model, processor) if c.name == "dtypes"]
    assert found.ok and "language_model bfloat16" in found.message and "mask_decoder float32" in found.message


def test_before_training_rows_may_be_at_their_initial_value():
    """`from_parts` starts them at the mean: right at the start of a run, wrong in a checkpoint."""
    processor = tiny_processor()
    parts = tiny_model(processor)
    text = LlamaForCausalLM(parts.config.text_config)
    sam = parts.config.sam_config
    model = MglmmForConditionalGeneration.from_parts(parts.model.vision_tower, text, sam, processor)
    (before,) = [c for c in examine(model, processor, trained=False) if c.name == "new-token rows"]
    assert before.ok and before.message.endswith("</p> of the head; the model was not trained")
    failed = [c.name for c in examine(model, processor) if not c.ok]
    assert failed == ["new-token rows"]
    assert all(c.ok for c in examine(model, processor, trained=False))


def test_zero_rows_are_a_fault_before_training_too(patient):
    zero_row(*patient)
    assert [c.name for c in examine(*patient, trained=False) if not c.ok] == ["new-token rows"]


def test_what_cannot_be_examined_has_failed_with_the_reason():
    @check("teeth")
    def teeth(patient: dict) -> tuple[bool, str]:
        return True, patient["teeth"]

    assert teeth({"teeth": "32"}) == Check("teeth", True, "32")
    assert teeth({}) == Check("teeth", False, "cannot be examined: 'teeth' (KeyError)")


def test_report_and_require():
    checks = [Check("eyes", True, "two"), Check("teeth", False, "none: buy some"), Check("hands", False, "one")]
    lines = report(checks).splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", "eyes"], ["FAIL", "teeth"], ["FAIL", "hands"]]
    assert lines[1].endswith("none: buy some")
    with pytest.raises(ValueError, match="2 checks failed: teeth: none: buy some; hands: one"):
        require(checks)
    require(checks[:1])


# ---------------------------------------------------------------------- the command


@pytest.fixture
def folder(tiny, tmp_path: Path) -> Path:
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_is_well(folder, capsys):
    assert run_doctor(str(folder), overfit=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(NAMES) + 1 and lines[-1] == "all is well"
    assert all(line.startswith("ok ") for line in lines[:-1])


def test_a_checkpoint_without_the_head_is_not(folder, capsys):
    """transformers starts missing weights at random, with no more than a warning."""
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert not run_doctor(str(folder), overfit=False)
    out = capsys.readouterr().out
    assert "FAIL  checkpoint" in out and "1 weights are missing and start at random: lm_head.weight" in out
    assert out.splitlines()[-1] == "1 of 16 checks failed"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no weights"), "cannot be loaded"),
        (lambda folder: folder.rename(folder.with_name("elsewhere")), "there is no folder"),
    ],
    ids=["broken_weights", "no_folder"],
)
def test_what_cannot_be_loaded_is_one_line(folder, damage, reason, capsys):
    damage(folder)
    assert not run_doctor(str(folder))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("FAIL  checkpoint") and reason in lines[0]


def test_an_adapter_is_examined_with_its_base(folder, adapted, tmp_path: Path, capsys):
    """A fault of the adapter's own weights is found: the base alone would be well."""
    model, processor = adapted()
    model.peft_config["default"].base_model_name_or_path = str(folder)
    assert isinstance(model, PeftModel)
    model.get_base_model().model.mask_projector.modules_to_save["default"].linear_2.bias.data[0] = torch.inf
    model.save_pretrained(tmp_path / "adapter")
    processor.save_pretrained(tmp_path / "adapter")
    assert not run_doctor(str(tmp_path / "adapter"), overfit=False)
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("FAIL")] == ["finite"]
