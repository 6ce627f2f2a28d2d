"""Mask losses over a flat axis of masks, normalised by the number of masks of the global batch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

IGNORE_VALUE = 255


def mask_losses(
    mask_logits: torch.Tensor, mask_labels: torch.Tensor, num_masks: torch.Tensor | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Unweighted BCE and DICE loss: each a mean over pixels (BCE) or a ratio over pixels (DICE) per mask, summed over the
    masks and divided by `num_masks`.

    Formulas of LISA, GLaMM and MGLMM: `bce = mean BCEWithLogits`,
    `dice = 1 - (2 sum(s g)/1000 + 1e-6) / (sum(s)/1000 + sum(g)/1000 + 1e-6)` with `s = sigmoid(logits)`.
    Unlike there, pixels labelled 255 (void, padding) count in neither.

    Args:
        mask_logits: `(total_masks, h, w)` float.
        mask_labels: `(total_masks, H, W)` in {0, 1, 255}, in the same frame; the logits are resized to it bilinearly.
        num_masks: masks of the global batch (all ranks, all accumulation steps); `total_masks` on its own.
    """
    if len(mask_logits) != len(mask_labels):
        raise ValueError(
            f"{len(mask_logits)} predicted masks but {len(mask_labels)} mask_labels; they are matched in order"
        )
    logits = _resized(mask_logits, mask_labels).flatten(1)
    valid = (mask_labels != IGNORE_VALUE).flatten(1).float()
    target = (mask_labels == 1).flatten(1).float()

    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    bce = (bce * valid).sum(1) / valid.sum(1).clamp_min(1)
    probability = logits.sigmoid() * valid
    overlap = 2 * (probability * target).sum(1) / 1000
    dice = 1 - (overlap + 1e-6) / (probability.sum(1) / 1000 + target.sum(1) / 1000 + 1e-6)
    return bce.sum() / num_masks, dice.sum() / num_masks


def picture_mask_losses(
    mask_logits: torch.Tensor,
    mask_labels: Sequence[torch.Tensor],
    num_masks: torch.Tensor | int,
    frame: tuple[int, int] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `mask_losses` at the pictures' own sizes, as LISA, GLaMM and MGLMM compute them; memory grows with the pictures.

    Args:
        mask_logits: `(total_masks, h, w)` float, in the pixel encoder's frame.
        mask_labels: One `(H, W)` tensor per mask, in {0, 1, 255}, of its picture's size.
        num_masks: As in `mask_losses`.
        frame: Height, width of the square the picture was resized into by its longer side and padded at the right and
            bottom; `None` if it was stretched to fill the encoder's input.
    """
    losses = [
        mask_losses(to_picture(logits[None], label.shape, frame), label[None].to(logits.device), num_masks)
        for logits, label in zip(mask_logits, mask_labels, strict=True)
    ]
    bce, dice = zip(*losses, strict=True)
    return torch.stack(bce).sum(), torch.stack(dice).sum()


def to_picture(mask_logits: torch.Tensor, size: Sequence[int], frame: tuple[int, int] | None) -> torch.Tensor:
    """Logits `(n, h, w)` of a frame as float32 `(n, H, W)` at the picture's `size`; as in SAM: bilinear to the frame,
    without its padding, bilinear to the picture."""
    logits = mask_logits.float()[:, None]
    if frame is not None:
        scale = max(frame) / max(size)
        logits = F.interpolate(logits, frame, mode="bilinear", align_corners=False)
        logits = logits[..., : int(size[0] * scale + 0.5), : int(size[1] * scale + 0.5)]
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)[:, 0]


@torch.no_grad()
def mask_ious(mask_logits: torch.Tensor, mask_labels: torch.Tensor) -> torch.Tensor:
    """
    Intersection over union `(total_masks,)` of the masks `logits > 0` with the labels, in the labels' frame; pixels
    labelled 255 count in neither, and two empty masks agree (1). Arguments as in `mask_losses`.
    """
    valid = mask_labels != IGNORE_VALUE
    predicted, target = (_resized(mask_logits, mask_labels) > 0) & valid, mask_labels == 1
    union = (predicted | target).flatten(1).sum(1)
    intersection = (predicted & target).flatten(1).sum(1)
    return torch.where(union == 0, 1.0, intersection / union.clamp_min(1))


def _resized(mask_logits: torch.Tensor, mask_labels: torch.Tensor) -> torch.Tensor:
    logits = mask_logits.float()
    if logits.shape[-2:] == mask_labels.shape[-2:]:
        return logits
    return F.interpolate(logits[:, None], mask_labels.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
