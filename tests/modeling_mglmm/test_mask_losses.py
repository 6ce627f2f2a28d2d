"""Losses: formulas, what is ignored, and that micro-batches add up to the gradients of one big batch."""

import numpy as np
import pytest
import torch

from mglmm.modeling_mglmm.mask_losses import mask_losses
from tests.modeling_mglmm.batches import ROWS, TEXT_ONLY, gradients, training_batch
from tests.modeling_mglmm.test_modeling import TOWERS
from tests.tiny import tiny_model


def by_hand(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """BCE and DICE of one mask, pixel by pixel."""
    bce, overlap, predicted, target, count = 0.0, 0.0, 0.0, 0.0, 0
    for logit, label in zip(logits.ravel(), labels.ravel(), strict=True):
        if label == 255:
            continue
        p = 1 / (1 + np.exp(-float(logit)))
        bce -= np.log(p) if label else np.log(1 - p)
        overlap, predicted, target, count = overlap + p * label, predicted + p, target + label, count + 1
    dice = 1 - (2 * overlap / 1000 + 1e-6) / (predicted / 1000 + target / 1000 + 1e-6)
    return bce / max(count, 1), dice


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])  # share of void pixels
def test_formulas(ignored: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 7, 5)).astype(np.float32) * 3
    labels = rng.integers(0, 2, (3, 7, 5)).astype(np.uint8)
    labels[rng.random(labels.shape) < ignored] = 255
    expected = np.mean([by_hand(*pair) for pair in zip(logits, labels, strict=True)], axis=0)
    found = mask_losses(torch.from_numpy(logits), torch.from_numpy(labels), 3)
    assert [float(x) for x in found] == pytest.approx(expected.tolist(), rel=1e-5, abs=1e-6)


def test_ignored_pixels_have_no_gradient() -> None:
    logits = torch.randn(1, 4, 4, requires_grad=True)
    labels = torch.ones(1, 4, 4, dtype=torch.uint8)
    labels[0, 2:] = 255
    sum(mask_losses(logits, labels, 1)).backward()
    assert (logits.grad[0, :2] != 0).all() and (logits.grad[0, 2:] == 0).all()


def test_logits_are_resized_to_the_labels() -> None:
    logits = torch.tensor([[[4.0, -4.0], [4.0, -4.0]]])
    labels = torch.tensor([[[1, 1, 0, 0]] * 4], dtype=torch.uint8)
    upsampled = torch.tensor([[[4.0, 2.0, -2.0, -4.0]] * 4])  # bilinear, align_corners=False
    found, expected = mask_losses(logits, labels, 1), mask_losses(upsampled, labels, 1)
    torch.testing.assert_close(found, expected)


def test_no_masks_and_wrong_numbers() -> None:
    assert [float(x) for x in mask_losses(torch.zeros(0, 4, 4), torch.zeros(0, 4, 4), 1)] == [0.0, 0.0]
    with pytest.raises(ValueError, match="2 predicted masks but 3 mask_labels"):
        mask_losses(torch.zeros(2, 4, 4), torch.zeros(3, 4, 4), 2)


def test_half_precision_logits_do_not_overflow() -> None:
    logits = torch.full((1, 512, 512), 9.0, dtype=torch.float16)
    bce, dice = mask_losses(logits, torch.ones(1, 512, 512, dtype=torch.uint8), 1)
    assert float(bce) < 1e-3 and float(dice) < 1e-3


def test_the_model_weighs_the_three_losses(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS)
    with torch.no_grad():
        outputs = tiny.model(**batch)
    log_p = outputs.logits[:, :-1].double().log_softmax(-1)
    targets = batch["labels"][:, 1:]
    supervised = targets != -100
    ce = -log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0][supervised].mean()
    masks = [by_hand(*pair) for pair in zip(outputs.pred_masks.numpy(), batch["mask_labels"].numpy(), strict=True)]
    bce, dice = np.mean(masks, axis=0)
    assert float(outputs.ce_loss) == pytest.approx(float(ce), rel=1e-5)
    assert float(outputs.mask_bce_loss) == pytest.approx(bce, rel=1e-5)
    assert float(outputs.mask_dice_loss) == pytest.approx(dice, rel=1e-5)
    assert float(outputs.loss) == pytest.approx(float(ce) + 2 * bce + 0.5 * dice, rel=1e-5)


def test_supervised_positions_alone_give_the_same_loss(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS)
    supervised = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
    with torch.no_grad():
        full = tiny.model(**batch)
        kept = tiny.model(**batch, logits_to_keep=supervised)
        assert kept.logits.shape == (int(supervised.sum()), full.logits.shape[-1])
        torch.testing.assert_close(kept.loss, full.loss)
        with pytest.raises(ValueError, match="logits_to_keep must be 0 or a boolean"):
            tiny.model(**batch, logits_to_keep=1)


def test_a_batch_without_supervised_tokens_has_loss_zero(tiny) -> None:
    batch = training_batch(tiny.processor, ROWS[1:2])
    with torch.no_grad():
        outputs = tiny.model(**{**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert float(outputs.loss) == 0.0


@pytest.mark.parametrize(
    "options",
    [
        {},  # SAM's encoder
        {"shared": True},  # one tower for both
        {"pixel_config": {**TOWERS["dinov2"], "image_size": 64, "patch_size": 16}},  # another backbone
        {"image_token_stride": 2, "vision_feature_layer": [1, 2]},  # pooled image tokens
    ],
)
def test_every_batch_reaches_the_same_parameters(tiny, tiny_shared, options: dict) -> None:
    """All ranks of a distributed run need gradients for the same parameters, whatever they find in their batch."""
    processor = (tiny_shared if options.get("shared") else tiny).processor
    if "image_token_stride" in options:
        processor = type(processor)(processor.image_processor, processor.tokenizer, 64, image_token_stride=2)
    model = tiny_model(processor, **options).train()
    for encoder in (model.model.vision_tower, model.model.pixel_encoder):
        if encoder is not None:
            encoder.requires_grad_(False)
    reached = {}
    for name, rows in {"normal": ROWS, "no masks": ROWS[1:2], "no images": TEXT_ONLY}.items():
        model.zero_grad(set_to_none=True)
        batch = training_batch(processor, rows)
        outputs = model(**batch)
        assert len(outputs.pred_masks) == len(batch["mask_labels"])
        outputs.loss.backward()
        assert all(gradient.isfinite().all() for gradient in gradients(model).values())
        reached[name] = set(gradients(model))
    assert reached["normal"] == reached["no masks"] == reached["no images"]
    parts = ("multi_modal_projector", "mask_projector", "mask_decoder", "language_model", "lm_head")
    assert all(any(part in name for name in reached["normal"]) for part in parts)
    assert any("pixel_neck" in name for name in reached["normal"]) == (model.model.pixel_neck is not None)
    assert not any("vision_tower" in name or "pixel_encoder" in name for name in reached["normal"])


def test_towers_get_no_gradients_even_when_they_could(tiny) -> None:
    model = tiny_model(tiny.processor).train()
    assert all(p.requires_grad for p in model.model.vision_tower.parameters())
    model(**training_batch(tiny.processor, ROWS)).loss.backward()
    assert not any("vision_tower" in name or "pixel_encoder" in name for name in gradients(model))


def test_accumulated_rows_give_the_gradients_of_one_batch(tiny) -> None:
    """Rows of unequal length and unequal numbers of masks, one of them without any."""
    whole, parts = tiny_model(tiny.processor), tiny_model(tiny.processor)
    batch = training_batch(tiny.processor, ROWS)
    whole(**batch).loss.backward()
    tokens = torch.tensor(int((batch["labels"][:, 1:] != -100).sum()))
    masks = torch.tensor(float(len(batch["mask_labels"])))
    losses = []
    for row in ROWS:
        loss = parts(**training_batch(tiny.processor, [row]), num_items_in_batch=tokens, num_masks_in_batch=masks).loss
        loss.backward()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        assert sum(losses) == pytest.approx(float(whole(**batch).loss), rel=1e-5)
    expected, found = gradients(whole), gradients(parts)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
