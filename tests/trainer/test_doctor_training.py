"""Checks of what trains, each with the fault it is there for, and one picture learnt by heart."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN
from mglmm.trainer.doctor import examine_trainable, overfit, report, run_doctor
from mglmm.trainer.trainable import make_trainable
from mglmm.trainer.training_args import TRAINED_MODULES, MglmmTrainingArguments
from tests.tiny import Tiny, tiny_model, tiny_processor

PARTS = [  # of the toy model with SAM's encoder
    "vision_tower",
    "mask_projector",
    "prompt_encoder",
    "mask_decoder",
    "pixel_encoder",
    "multi_modal_projector",
    "language_model",
]
PROCESSOR = tiny_processor()
NEW_IDS = PROCESSOR.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])


@pytest.fixture
def trainee(tmp_path: Path) -> Callable[..., tuple[Any, MglmmTrainingArguments]]:
    """Makes the toy model trainable as the given training arguments say, and returns it with them."""

    def make(shared: bool = False, tied: bool = False, **kwargs: Any) -> tuple[Any, MglmmTrainingArguments]:
        args = MglmmTrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], **kwargs)
        model = tiny_model(tiny_processor(shared) if shared else PROCESSOR, shared, tie_word_embeddings=tied)
        return make_trainable(model, args, NEW_IDS), args

    return make


def core(model: Any) -> Any:
    return (model.get_base_model() if isinstance(model, PeftModel) else model).model


FULL = {"lora_r": 0, "trained_modules": [*TRAINED_MODULES, "language_model"]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shared": True},  # with a neck
        {"tied": True},  # one adapter serves embedding and head
        {"lora_r": 0},
        {"train_new_tokens": False},  # by wish
        {"trained_modules": ["mask_decoder"]},  # by wish
        FULL,
        FULL | {"tied": True},
    ],
    ids=str,
)
def test_what_make_trainable_makes_passes(trainee, options):
    model, args = trainee(**options)
    checks = examine_trainable(model, NEW_IDS, args)
    assert all(c.ok for c in checks), report(checks)
    neck = ["pixel_neck"] if options.get("shared") else []
    parts = {"training of " + part for part in PARTS + neck if not (part == "pixel_encoder" and neck)}
    assert {c.name for c in checks} == parts | {
        "training of new-token rows",
        "training of LoRA",
        "dtype of what trains",
    }


def freeze(parameters) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)


def deltas(model: Any, layer: str) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name and layer in name]


def frozen_part(name: str):
    return lambda model: freeze(getattr(core(model), name).parameters())


def training_part(name: str):
    return lambda model: getattr(core(model), name).requires_grad_(True)


def low_delta(model: Any) -> None:
    (delta,) = deltas(model, "embed_tokens")
    delta.data = delta.data.bfloat16()


def lora_on_sam(model: Any) -> None:
    target = r".*\.(language_model|pixel_encoder)\..*\.(q_proj|v_proj|qkv)"
    model.add_adapter("wide", LoraConfig(r=2, target_modules=target))


def unreached_head(model: Any) -> None:
    head = core(model).mask_decoder.modules_to_save["default"].iou_prediction_head
    head.requires_grad_(True)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        # peers' silent defect: resized embeddings that the adapter leaves frozen
        (lambda model: freeze(deltas(model, "embed_tokens")), "new-token rows", "of the embedding are frozen"),
        (lambda model: freeze(deltas(model, "lm_head")), "new-token rows", "of the head are frozen"),
        # a whole head trains, many times the adapter's size
        (
            lambda model: model.get_base_model().lm_head.original_module.requires_grad_(True),
            "new-token rows",
            "rows of the head train that should not",
        ),
        (frozen_part("multi_modal_projector"), "multi_modal_projector", "4 of 4 tensors are frozen (modules_to_save"),
        (frozen_part("mask_projector"), "mask_projector", "4 of 4 tensors are frozen"),
        (frozen_part("mask_decoder"), "mask_decoder", "are frozen"),
        (unreached_head, "mask_decoder", "no loss reaches them"),  # DDP waits for their gradients and stops
        (training_part("vision_tower"), "vision_tower", "trained_modules does not name it"),
        (training_part("pixel_encoder"), "pixel_encoder", "trained_modules does not name it"),
        (lambda model: core(model).prompt_encoder.shared_embedding.requires_grad_(True), "prompt_encoder", ""),
        # a matrix that LoRA should only add to
        (
            lambda model: core(model).language_model.layers[0].mlp.up_proj.requires_grad_(True),
            "language_model",
            "1 tensors train (layers.0.mlp.up_proj.weight)",
        ),
        (lora_on_sam, "LoRA", "outside the language model"),  # what an unanchored pattern does
        (lambda model: freeze(p for n, p in model.named_parameters() if "lora_A" in n), "LoRA", "4 of 8"),
        (low_delta, "dtype of what trains", "trainable_tokens_delta"),
    ],
)
def test_each_check_fails_for_its_own_fault_only(trainee, damage, name, message):
    model, args = trainee()
    damage(model)
    failed = {
        c.name.removeprefix("training of "): c.message for c in examine_trainable(model, NEW_IDS, args) if not c.ok
    }
    assert failed.keys() == {name}, failed
    assert message in failed[name]


@pytest.mark.parametrize(
    ("made", "wanted", "name"),
    [
        ({"lora_r": 0}, {"lora_r": 8}, "LoRA"),  # a pattern that matched nothing
        ({}, {"lora_r": 0}, "LoRA"),
        ({"train_new_tokens": False}, {"train_new_tokens": True}, "new-token rows"),
        ({}, {"train_new_tokens": False}, "new-token rows"),
        (
            {"trained_modules": ["mask_decoder"]},
            {"trained_modules": ["mask_decoder", "mask_projector"]},
            "mask_projector",
        ),
        ({}, {"trained_modules": [n for n in TRAINED_MODULES if n != "mask_projector"]}, "mask_projector"),
    ],
)
def test_the_model_is_compared_with_the_arguments(trainee, made, wanted, name):
    model, args = trainee(**made)
    for key, value in wanted.items():
        setattr(args, key, value)
    failed = [c.name.removeprefix("training of ") for c in examine_trainable(model, NEW_IDS, args) if not c.ok]
    assert failed == [name]


def test_ids_of_other_tokens_do_not_count(trainee):
    model, args = trainee()
    (rows,) = [c for c in examine_trainable(model, [*NEW_IDS, 7], args) if not c.ok]
    assert rows.name == "training of new-token rows" and "rows [7] of the embedding are frozen" in rows.message


def test_a_language_model_in_full_includes_its_head(trainee):
    model, args = trainee(**FULL)
    freeze(model.lm_head.parameters())
    assert [c.name for c in examine_trainable(model, NEW_IDS, args) if not c.ok] == ["training of new-token rows"]


# ---------------------------------------------------------------------- overfit


@pytest.mark.parametrize("kind", ["tiny", "tiny_shared"])
def test_the_tiny_model_learns_one_picture(kind, request):
    model, processor = copy.deepcopy(tuple(request.getfixturevalue(kind)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.train()
    found = overfit(model, processor)
    assert found.ok, found.message
    iou, steps = float(found.message.split()[1]), int(found.message.split()[3])
    assert iou > 0.95 and 0 < steps <= 60

    # and comes back as it was
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable
    assert model.training and all(p.grad is None for p in model.parameters())


@pytest.fixture
def patient(tiny) -> Tiny:
    return Tiny(*copy.deepcopy(tuple(tiny)))


def cut_decoder(model: MglmmForConditionalGeneration) -> None:
    decoder = model.model.mask_decoder
    forward = decoder.forward
    decoder.forward = lambda *args: tuple(None if x is None else x.detach() for x in forward(*args))


def cut_prompts(model: MglmmForConditionalGeneration) -> None:
    model.model.mask_projector.register_forward_hook(lambda module, args, output: output.detach())


def no_mask_loss(model: MglmmForConditionalGeneration) -> None:
    model.config.bce_loss_weight = model.config.dice_loss_weight = 0.0


def no_places(model: MglmmForConditionalGeneration) -> None:
    """The decoder sees a picture without places: gradients flow, but there is nothing to learn from."""
    model.model.prompt_encoder.shared_embedding.positional_embedding.data.zero_()
    model.model.pixel_encoder.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=torch.ones_like(output.last_hidden_state))
    )


def overflow(model: MglmmForConditionalGeneration) -> None:
    model.lm_head.weight.data *= torch.inf


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_decoder, "no gradient reaches mask_decoder, mask_projector"),
        (cut_prompts, "no gradient reaches mask_projector"),
        (no_mask_loss, "no gradient reaches mask_decoder, mask_projector"),
        (no_places, "not above 0.95"),  # the encoders ruined, not the gradient
        (overflow, "the loss is nan at step 0"),
        (lambda model: model.model.language_model.to("meta"), "cannot be examined"),
    ],
)
def test_what_cannot_learn_fails(patient, damage, reason):
    model, processor = patient
    damage(model)
    before = {name: value.clone() for name, value in model.model.mask_decoder.state_dict().items()}
    found = overfit(model, processor)
    assert found.name == "overfit" and not found.ok
    assert reason in found.message
    assert all(torch.equal(value, before[name]) for name, value in model.model.mask_decoder.state_dict().items())


def test_too_few_steps_are_not_enough(patient):
    found = overfit(*patient, steps=2)
    assert not found.ok and "at best in 2 steps" in found.message


def test_the_doctor_overfits_unless_told_not_to(tiny, tmp_path: Path, capsys):
    tiny.model.save_pretrained(tmp_path)
    tiny.processor.save_pretrained(tmp_path)
    assert run_doctor(str(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2].startswith("ok    overfit") and "IoU" in lines[-2] and lines[-1] == "all is well"
