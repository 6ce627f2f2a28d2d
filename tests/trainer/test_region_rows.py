"""Rows with regions: through the collator, and a short training of the region encoder."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel

from mglmm.processing import MglmmProcessor
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.mglmm_trainer import MglmmTrainer
from mglmm.trainer.trainable import make_trainable
from tests.tiny import Tiny, tiny_model, tiny_processor
from tests.trainer.conftest import BOXES, photo, training_arguments, uscdf_row


def region_row(seed: int, *names: str) -> dict[str, Any]:
    """Asks what each of the things is; pictures are 60 x 40, of which the tower sees x from 10 to 50."""
    messages = []
    for i, name in enumerate(names):
        question = "What is in <region>?"
        messages.append({"role": "user", "content": "<image>\n" * (i == 0) + question})
        messages.append({"role": "assistant", "content": f"It is {name}."})
    row = {**uscdf_row(seed, "region", ()), "messages": messages, "regions": [list(BOXES[name]) for name in names]}
    return {**row, "image": photo(seed)}


@pytest.fixture(scope="module")
def regional() -> Tiny:
    plain = tiny_processor()
    processor = MglmmProcessor(
        plain.image_processor, plain.tokenizer, plain.sam_image_size, patch_size=14, region_token="<region>"
    )
    fields = {"region_feature_layers": [1, 2], "region_hidden_size": 16, "region_token_id": processor.region_token_id}
    return Tiny(tiny_model(processor, **fields), processor)


@pytest.fixture
def region_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with 2 regions, none (and 2 masks), and 1 region."""
    return [region_row(0, "the hat", "the dog"), rows[0], region_row(1, "the car")]


def test_regions_become_boxes_in_their_order(regional: Tiny, region_rows: list[dict[str, Any]]) -> None:
    batch = MglmmDataCollator(regional.processor, mask_size=16, strict=True)(region_rows)
    hat, dog, car = [0, 0.125, 0.375, 0.5], [0.5, 0.25, 1, 0.875], [0, 0.375, 1, 0.95]
    np.testing.assert_allclose(batch["region_boxes"], [hat, dog, car], atol=1e-6)
    assert (batch["input_ids"] == regional.processor.region_token_id).sum(1).tolist() == [2, 0, 1]
    assert not (batch["labels"] == regional.processor.region_token_id).any()
    assert len(batch["mask_labels"]) == 2


def test_rows_without_regions_have_no_boxes(regional: Tiny, rows: list[dict[str, Any]]) -> None:
    assert "region_boxes" not in MglmmDataCollator(regional.processor, mask_size=16)(rows)


@pytest.mark.parametrize(
    ("regions", "reason"),
    [
        ([[5, 5, 25, 20], [52, 10, 60, 35]], "region 1, .* lies outside of what the vision tower sees"),
        ([[5, 5, 25, 20], [30, 10, 80, 35]], "region 1, .* does not lie in its picture of 60 x 40"),
        ([[5, 5, 25, 20]], "2 <region> in user turns but 1 regions"),
    ],
)
def test_rows_with_bad_regions_are_left_out(regional: Tiny, regions: list[list[float]], reason: str) -> None:
    rows = [{**region_row(0, "the hat", "the dog"), "regions": regions}, region_row(1, "the car")]
    batch = MglmmDataCollator(regional.processor, mask_size=16)(rows)
    assert len(batch["input_ids"]) == len(batch["region_boxes"]) == len(batch["skipped_rows"]) == 1
    with pytest.raises(ValueError, match=reason):
        MglmmDataCollator(regional.processor, mask_size=16, strict=True)(rows)


def test_a_model_without_region_encoder_leaves_the_row_out(tiny: Tiny) -> None:
    batch = MglmmDataCollator(tiny.processor, mask_size=16)([region_row(1, "the car")])
    assert "this model has no region encoder" in batch["skipped_rows"][0]["reason"]


def test_cached_features_hold_what_regions_need(
    regional: Tiny, region_rows: list[dict[str, Any]], tmp_path: Any
) -> None:
    cache = FeatureCache(tmp_path, *regional)
    cache.fill(*regional, [row["image"] for row in region_rows])
    plain = MglmmDataCollator(regional.processor, mask_size=16)(region_rows)
    cached = MglmmDataCollator(regional.processor, mask_size=16, feature_cache=cache)(region_rows)
    assert torch.equal(plain["region_boxes"], cached["region_boxes"])
    with torch.no_grad():
        losses = [regional.model(**batch).loss for batch in (plain, cached)]
    torch.testing.assert_close(losses[0], losses[1], atol=1e-2, rtol=1e-2)  # the cache is in half precision


def trained(regional: Tiny, tmp_path: Any, rows: list[dict[str, Any]], **kwargs: Any) -> tuple[Any, dict, list[float]]:
    """The model after 6 steps, its region encoder's parameters before them, and the losses."""
    torch.manual_seed(0)
    options = {
        "max_steps": 6,
        "per_device_train_batch_size": 3,
        "learning_rate": 3e-3,
        "train_sampling_strategy": "sequential",
    }
    args = training_arguments(tmp_path, **(options | kwargs))
    new_ids = regional.processor.tokenizer.convert_tokens_to_ids(["<p>", "</p>", "[SEG]"])
    model = make_trainable(copy.deepcopy(regional.model), args, new_ids)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if ".region_encoder." in name}
    collator = MglmmDataCollator(regional.processor, mask_size=16, strict=True)
    trainer = MglmmTrainer(model, args, data_collator=collator, train_dataset=rows)
    trainer.train()
    return model, before, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_training_changes_every_part_of_the_region_encoder(
    regional: Tiny, region_rows: list[dict[str, Any]], tmp_path: Any, gradient_checkpointing: bool
) -> None:
    model, before, losses = trained(regional, tmp_path, region_rows, activation_checkpointing=gradient_checkpointing)
    assert isinstance(model, PeftModel)
    after = {name: value for name, value in model.named_parameters() if ".region_encoder." in name}
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if ".modules_to_save." in name}
    assert len(changed) == len(list(regional.model.model.region_encoder.parameters()))
    assert losses[-1] < losses[0]


def test_a_run_that_names_its_modules_leaves_the_region_encoder_as_it_is(
    regional: Tiny, region_rows: list[dict[str, Any]], tmp_path: Any
) -> None:
    model, before, _ = trained(regional, tmp_path, region_rows, trained_modules=["mask_projector"], max_steps=1)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)


def test_batches_without_regions_train_the_same_parameters(
    regional: Tiny, region_rows: list[dict[str, Any]], tmp_path: Any
) -> None:
    args = training_arguments(tmp_path)
    model = make_trainable(copy.deepcopy(regional.model), args, [regional.processor.seg_token_id])
    collator = MglmmDataCollator(regional.processor, mask_size=16)
    seen = []
    for rows in (region_rows, region_rows[1:2], region_rows[:1]):
        model.zero_grad()
        model(**collator(rows)).loss.backward()
        seen.append({name for name, value in model.named_parameters() if value.grad is not None})
    assert seen[0] == seen[1] == seen[2]
    assert seen[0] == {name for name, value in model.named_parameters() if value.requires_grad}
