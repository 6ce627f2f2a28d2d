"""Batches of the collator: what is supervised, how masks and `[SEG]`s pair up, and features in place of pixels."""

import re

import numpy as np
import pytest
import torch

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import conversation_of
from mglmm.trainer.data_collator import MglmmDataCollator, masks_of
from mglmm.trainer.feature_cache import FeatureCache
from tests.trainer.conftest import BOXES, SIZE, box_mask


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


def wrong(row: dict, change: str) -> dict:
    """A row with one thing wrong."""
    row = {**row, "dataset": "hats/default/train", "index": 7}
    if change == "masks":
        row["masks"] = row["masks"][:1]
    elif change == "size":
        row["masks"] = [encode_mask(np.ones((9, 9), dtype=bool))] * len(row["masks"])
    elif change == "image":
        row["image"] = b"GIF89a, or so it says"
    elif change == "unread":
        row |= {"image": None, "error": "image 'hat.jpg' cannot be read: truncated"}  # as a Mixture gives it
    elif change == "tags":
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "Sure, <p> the hat [SEG] [SEG]."}]
    elif change == "long":
        row["messages"] = [row["messages"][0], {"role": "assistant", "content": "dog " * 600 + "<p> a </p> [SEG] " * 2}]
    return row


BAD = [
    ("masks", r"2 \[SEG\] in assistant turns but 1 masks"),
    ("size", r"2 of 2 masks do not have the size \(h, w\) = \(40, 60\)"),
    ("image", "is not a picture that Pillow can read"),
    ("unread", "image 'hat.jpg' cannot be read: truncated"),
    ("tags", "unbalanced or nested tags"),
    ("long", r"1903 tokens .* but the context holds 512"),  # whose [SEG]s a cut would lose
]


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_a_bad_row_is_left_out_and_named(tiny, rows, change, reason):
    bad = wrong(rows[0], change)
    batch = MglmmDataCollator(tiny.processor, mask_size=16)([rows[1], bad, rows[3]])
    (skipped,) = batch.pop("skipped_rows")
    assert skipped["dataset"] == "hats/default/train" and skipped["index"] == 7
    assert re.search(reason, skipped["reason"])
    expected = MglmmDataCollator(tiny.processor, mask_size=16)([rows[1], rows[3]])
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize(("change", "reason"), BAD)
def test_a_bad_row_stops_a_strict_run(tiny, rows, change, reason):
    collator = MglmmDataCollator(tiny.processor, mask_size=16, strict=True)
    with pytest.raises(ValueError, match=f"hats/default/train, row 7: .*{reason}"):
        collator([rows[1], wrong(rows[0], change)])


@pytest.mark.parametrize("name", ["tiny", "tiny_shared"])
def test_a_batch_of_bad_rows_changes_nothing(name, request, rows):
    """Its gradients are zeros for the same parameters as those of any other batch, so that other ranks do not wait."""
    model, processor = request.getfixturevalue(name)
    collator = MglmmDataCollator(processor, mask_size=16)
    batch = collator([wrong(rows[0], "image"), wrong(rows[2], "masks")])
    assert len(batch.pop("skipped_rows")) == 2
    assert batch["mask_labels"].shape == (0, 16, 16) and (batch["labels"] == -100).all()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad and "iou_prediction_head" not in n}
    outputs = model(**batch)
    assert outputs.loss == 0
    gradients = torch.autograd.grad(outputs.loss, list(trained.values()), allow_unused=True)
    others = torch.autograd.grad(model(**collator(rows)).loss, list(trained.values()), allow_unused=True)
    reached = {n for n, gradient in zip(trained, gradients, strict=True) if gradient is not None}
    assert reached == {n for n, gradient in zip(trained, others, strict=True) if gradient is not None}
    assert not any(gradient.any() for gradient in gradients if gradient is not None)


def test_a_row_as_long_as_allowed_is_kept(tiny, rows):
    length = MglmmDataCollator(tiny.processor, mask_size=16)([rows[0]])["input_ids"].shape[1]
    assert "skipped_rows" not in MglmmDataCollator(tiny.processor, 16, max_length=length)([rows[0]])
    assert "skipped_rows" in MglmmDataCollator(tiny.processor, 16, max_length=length - 1)([rows[0]])


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
