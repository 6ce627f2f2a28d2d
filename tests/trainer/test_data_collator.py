"""Batches of the collator: what is supervised, how masks and `[SEG]`s pair up, and features in place of pixels."""

import numpy as np
import pytest
import torch

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import conversation_of
from mglmm.trainer.data_collator import MglmmDataCollator, masks_of
from mglmm.trainer.feature_cache import FeatureCache
from tests.trainer.conftest import BOXES, SIZE, box_mask, uscdf_row


def supervised_text(processor, batch, row: int) -> str:
    labels = batch["labels"][row]
    return processor.tokenizer.decode(labels[labels != -100])


def test_the_image_leads_the_first_user_turn(rows):
    conversation = conversation_of(rows[2])
    first, _, second, _ = conversation
    assert [part["type"] for part in first["content"]] == ["image", "text"]
    assert first["content"][0]["image"] is rows[2]["image"]
    assert first["content"][1]["text"] == "Segment the car."
    assert second["content"] == [{"type": "text", "text": "Segment the dog and the hat."}]


def test_the_answers_and_their_end_are_supervised(tiny, rows):
    batch = MglmmDataCollator(tiny.processor, mask_size=16)(rows)
    # The leading space belongs to the first token: the prompt of generation ends in "ASSISTANT:".
    assert [supervised_text(tiny.processor, batch, row) for row in range(4)] == [
        " Sure, <p> the hat </p> [SEG] and <p> the dog </p> [SEG].</s>",
        " Sorry, I cannot find a bicycle.</s>",
        " Sure, <p> the car </p> [SEG].</s> Sure, <p> the dog </p> [SEG] and <p> the hat </p> [SEG].</s>",
        " Sure, <p> the car </p> [SEG].</s>",
    ]


def test_every_seg_has_its_mask_in_order(tiny, rows):
    batch = MglmmDataCollator(tiny.processor, mask_size=16)(rows)
    assert (batch["input_ids"] == tiny.processor.seg_token_id).sum(1).tolist() == [2, 0, 3, 1]
    names = ["the hat", "the dog", "the car", "the dog", "the hat", "the car"]
    assert batch["mask_labels"].shape == (6, 16, 16) and batch["mask_labels"].dtype == torch.uint8
    expected = torch.cat([tiny.processor.mask_labels([box_mask(name)], 16) for name in names])
    assert torch.equal(batch["mask_labels"], expected)
    assert set(batch["mask_labels"].unique().tolist()) == {0, 1, 255}


def test_pixels_that_nobody_labelled_are_ignored_by_the_losses(tiny, rows):
    ignored = np.zeros(SIZE, dtype=bool)
    ignored[:, 20:] = True  # the right part of the hat, which spans x = 5 to 25, and of the dog
    row = {**rows[0], "ignore_mask": encode_mask(ignored)}
    hat, dog = masks_of(row)
    assert hat.shape == SIZE and (hat[:, 20:] == 255).all() and (dog[:, 20:] == 255).all()
    assert np.array_equal(hat[:, :20], box_mask("the hat")[:, :20])
    labels = MglmmDataCollator(tiny.processor, mask_size=16)([row])["mask_labels"]
    assert torch.equal(labels, tiny.processor.mask_labels([hat, dog], 16))
    # The picture is 16 columns wide in the labels, so nothing from column 5 1/3 on counts.
    assert (labels[:, :, 6:] == 255).all() and (labels[0, :, :5] != 255).any()


def test_rows_are_padded_on_the_right(tiny, rows):
    batch = MglmmDataCollator(tiny.processor, mask_size=16)(rows)
    lengths = batch["attention_mask"].sum(1)
    assert len(lengths.unique()) > 1
    for row, length in enumerate(lengths.tolist()):
        assert batch["attention_mask"][row, :length].all() and not batch["attention_mask"][row, length:].any()
        assert (batch["input_ids"][row, length:] == tiny.processor.tokenizer.pad_token_id).all()
        assert (batch["labels"][row, length:] == -100).all()


def test_logits_are_kept_where_the_next_token_is_supervised(tiny, rows):
    batch = MglmmDataCollator(tiny.processor, mask_size=16)(rows)
    kept = batch["logits_to_keep"]
    assert torch.equal(kept[:, :-1], batch["labels"][:, 1:] != -100) and not kept[:, -1].any()
    with torch.no_grad():
        short = tiny.model(**batch)
        full = tiny.model(**{key: value for key, value in batch.items() if key != "logits_to_keep"})
    assert short.logits.shape[:1] == (int(kept.sum()),) and full.logits.shape[:2] == kept.shape
    torch.testing.assert_close(short.loss, full.loss)


def test_batch_without_masks(tiny, rows):
    batch = MglmmDataCollator(tiny.processor, mask_size=16)([rows[1], rows[1]])
    assert batch["mask_labels"].shape == (0, 16, 16)
    with torch.no_grad():
        outputs = tiny.model(**batch)
    assert float(outputs.mask_bce_loss) == float(outputs.mask_dice_loss) == 0.0
    assert float(outputs.loss) == pytest.approx(float(outputs.ce_loss)) and float(outputs.loss) > 0


def test_other_columns_change_nothing(tiny, rows):
    collator = MglmmDataCollator(tiny.processor, mask_size=16)
    plain, extended = collator(rows), collator([{**row, "length": 70, "note": "x"} for row in rows])
    assert plain.keys() == extended.keys()
    assert all(torch.equal(plain[key], extended[key]) for key in plain)


@pytest.mark.parametrize("name", ["tiny", "tiny_shared"])
def test_cached_features_give_the_same_losses(name, request, rows, tmp_path):
    model, processor = request.getfixturevalue(name)
    cache = FeatureCache(tmp_path, model, processor)
    cache.fill(model, processor, [row["image"] for row in rows])
    pixels = MglmmDataCollator(processor, mask_size=16)(rows)
    features = MglmmDataCollator(processor, mask_size=16, feature_cache=cache)(rows)
    assert "pixel_values" not in features and "sam_pixel_values" not in features
    with torch.no_grad():
        expected, outputs = model(**pixels), model(**features)
    for part in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss"):
        torch.testing.assert_close(outputs[part], expected[part], atol=1e-3, rtol=0)
    torch.testing.assert_close(outputs.pred_masks, expected.pred_masks, atol=1e-3, rtol=1e-3)


def test_a_row_without_a_picture_loads_no_features(tiny, rows, tmp_path):
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    cache.fill(tiny.model, tiny.processor, [rows[0]["image"]])
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]
    text_only = {**rows[1], "messages": messages, "image": None}
    collator = MglmmDataCollator(tiny.processor, mask_size=16, feature_cache=cache)
    assert "image_features" not in collator([text_only])
    mixed = collator([text_only, rows[0]])
    assert len(mixed["image_features"].vision_hidden_states) == 1
    assert torch.isfinite(tiny.model(**mixed).loss)


def test_too_few_masks_name_both_counts(tiny):
    row = uscdf_row(0, "referring", ("the hat", "the dog"))
    row["masks"] = row["masks"][:1]
    batch = MglmmDataCollator(tiny.processor, mask_size=16)([row])
    with pytest.raises(ValueError, match=r"2 \[SEG\] tokens in input_ids but 1 mask_labels"):
        tiny.model(**batch)


@pytest.mark.parametrize(
    ("side", "least_iou"),
    [
        (64, 0.97),  # the frame's own size: only the rounding of the picture's edge is lost
        (16, 0.75),  # a quarter of it, as in training: each edge is rounded to cells of 3.75 pixels
    ],
)
@pytest.mark.parametrize("name", sorted(BOXES))
def test_labels_decode_to_the_mask_they_came_from(tiny, name, side, least_iou):
    mask = box_mask(name)
    label = tiny.processor.mask_labels([mask], side)
    logits = torch.where(label == 1, 10.0, -10.0)
    decoded = tiny.processor.post_process_masks(logits, SIZE)[0]
    assert (decoded & mask).sum() / (decoded | mask).sum() >= least_iou
