"""USCDF rows to one batch of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mglmm.modeling_mglmm.mask_losses import IGNORE_VALUE
from mglmm.processing import MglmmProcessor
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import conversation_of

from .feature_cache import FeatureCache


def masks_of(row: dict[str, Any]) -> list[np.ndarray]:
    """Masks of a USCDF row, `(H, W)` in {0, 1, 255 where nobody labelled}."""
    masks = [decode_mask(mask).astype(np.uint8) for mask in row["masks"]]
    if masks and row.get("ignore_mask") is not None:
        ignored = decode_mask(row["ignore_mask"])
        for mask in masks:
            mask[ignored] = IGNORE_VALUE
    return masks


@dataclass
class MglmmDataCollator:
    """
    Args:
        processor: Its chat template must mark assistant turns with `{% generation %}`.
        mask_size: Side of the square `mask_labels`, in the pixel encoder's frame.
        feature_cache: Features in place of pixels; the encoders are then not run at all.

    Returns (on call):
        `input_ids`, `attention_mask`, `labels` `(rows, length)`, right-padded, -100 outside the assistant's turns;
        `pixel_values` (and `sam_pixel_values`), or `image_features`; `mask_labels` uint8 `(total_masks, side, side)`;
        `logits_to_keep` bool `(rows, length)`, the positions whose next token is supervised.
    """

    processor: MglmmProcessor
    mask_size: int = 128
    feature_cache: FeatureCache | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        conversations = [conversation_of(row) for row in rows]
        inputs = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "padding": True,
                "padding_side": "right",
                "images_kwargs": {"return_pixels": self.feature_cache is None},
            },
        )
        inputs.pop("original_sizes", None)
        supervised = inputs.pop("assistant_masks").bool()
        batch = dict(inputs)
        batch["labels"] = inputs["input_ids"].masked_fill(~supervised, -100)
        batch["logits_to_keep"] = torch.nn.functional.pad(supervised[:, 1:], (0, 1), value=False)
        if self.feature_cache is not None:
            parts = [part for messages in conversations for message in messages for part in message["content"]]
            images = [part["image"] for part in parts if part["type"] == "image"]
            if images:
                batch["image_features"] = self.feature_cache.load(images)
        labels = [self.processor.mask_labels(masks_of(row), self.mask_size) for row in rows]
        batch["mask_labels"] = torch.cat(labels)
        return batch
