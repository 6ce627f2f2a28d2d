"""USCDF rows to one batch of model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from mglmm.modeling_mglmm.mask_losses import IGNORE_VALUE
from mglmm.processing import MglmmProcessor
from mglmm.processing.images import load_image
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import conversation_of, validate_row

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
        max_length: Longest row in tokens; the tokenizer's `model_max_length` if unset.
        strict: Raise at a bad row in place of leaving it out.

    Returns (on call):
        `input_ids`, `attention_mask`, `labels` `(rows, length)`, right-padded, -100 outside the assistant's turns;
        `pixel_values` (and `sam_pixel_values`), or `image_features`; `mask_labels` uint8 `(total_masks, side, side)`;
        `region_boxes` float32 `(total_regions, 4)` if rows have regions;
        `logits_to_keep` bool `(rows, length)`, the positions whose next token is supervised. Where rows were left out
        also `skipped_rows`, a list of `{"dataset", "index", "reason"}`. If every row of a batch is bad, one without
        any supervised token stands in: it adds nothing to any loss.

    Raises:
        ValueError: a bad row under `strict`, named with its dataset and index. A row is bad if its picture cannot be
            read, its text and masks do not fit (`validate_row`), it has regions that the model or its tower cannot see,
            or it is too long: nothing is ever cut.
        FileNotFoundError: the feature cache lacks a picture.
    """

    processor: MglmmProcessor
    mask_size: int = 128
    feature_cache: FeatureCache | None = None
    max_length: int | None = None
    strict: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        samples: list[dict[str, torch.Tensor]] = []
        images: list[Any] = []
        skipped: list[dict[str, Any]] = []
        for row in rows:
            try:
                sample, image = self._sample(row)
            except ValueError as error:
                where = {"dataset": str(row.get("dataset", row.get("source"))), "index": row.get("index")}
                if self.strict:
                    raise ValueError(f"{where['dataset']}, row {where['index']}: {error}") from error
                skipped.append({**where, "reason": str(error)})
                continue
            samples.append(sample)
            images += [] if image is None else [image]
        if not samples:
            samples = [self._empty_sample()]
        batch = self._batch(samples)
        if images and self.feature_cache is not None:
            batch["image_features"] = self.feature_cache.load(images)
        if skipped:
            batch["skipped_rows"] = skipped
        return batch

    def _sample(self, row: dict[str, Any]) -> tuple[dict[str, torch.Tensor], Any]:
        """Tensors of one row, and its picture. Raises `ValueError` with what is wrong with it."""
        if "error" in row:
            raise ValueError(row["error"])
        image = row["image"]
        if image is not None:
            image = load_image(image)
        row = {**row, "image": image}
        validate_row(row, None if image is None else image.size[::-1])
        inputs = self.processor.apply_chat_template(
            [conversation_of(row)],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "regions": row["regions"],
                "images_kwargs": {"return_pixels": self.feature_cache is None},
            },
        )
        length = inputs["input_ids"].shape[1]
        limit = self.max_length or self.processor.tokenizer.model_max_length
        if length > limit:
            raise ValueError(f"{length} tokens with the image, but at most {limit} fit: shorten it or raise max_length")
        sample = dict(inputs)
        sample.pop("original_sizes", None)
        sample["mask_labels"] = self.processor.mask_labels(masks_of(row), self.mask_size)
        return sample, image

    def _empty_sample(self) -> dict[str, torch.Tensor]:
        token = torch.tensor([[self.processor.tokenizer.eos_token_id] * 2])
        return {
            "input_ids": token,
            "attention_mask": torch.ones_like(token),
            "assistant_masks": torch.zeros_like(token),
            "mask_labels": self.processor.mask_labels([], self.mask_size),
        }

    def _batch(self, samples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        def padded(name: str, value: int) -> torch.Tensor:
            return pad_sequence([sample[name][0] for sample in samples], batch_first=True, padding_value=value)

        supervised = padded("assistant_masks", 0).bool()
        input_ids = padded("input_ids", self.processor.tokenizer.pad_token_id)
        batch: dict[str, Any] = {
            "input_ids": input_ids,
            "attention_mask": padded("attention_mask", 0),
            "labels": input_ids.masked_fill(~supervised, -100),
            "logits_to_keep": torch.nn.functional.pad(supervised[:, 1:], (0, 1), value=False),
            "mask_labels": torch.cat([sample["mask_labels"] for sample in samples]),
        }
        for name in ("pixel_values", "sam_pixel_values", "region_boxes"):
            parts = [sample[name] for sample in samples if name in sample]
            if parts:
                batch[name] = torch.cat(parts)
        return batch
