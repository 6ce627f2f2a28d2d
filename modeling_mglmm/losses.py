"""From hidden states and labels to losses: what `MglmmForConditionalGeneration.forward` adds to its logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .image_features import MglmmImageFeatures
from .mask_losses import mask_losses, picture_mask_losses
from .seg_states import gather_seg_states, image_index_of_seg


class MglmmLossMixin:
    """The losses of `MglmmForConditionalGeneration`."""

    config: Any
    model: Any
    loss_function: Any

    def _ce_loss(
        self,
        logits: torch.Tensor,
        labels: torch.LongTensor,
        logits_to_keep: int | torch.Tensor,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """Mean over the supervised tokens of the (global) batch."""
        next_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
        if isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool:
            next_labels = next_labels[logits_to_keep]
        elif not isinstance(logits_to_keep, int) or logits_to_keep != 0:
            raise ValueError("with labels, logits_to_keep must be 0 or a boolean (batch, length) mask of positions")
        if num_items_in_batch is None:  # at least 1: a batch without supervised tokens has loss 0, not NaN
            num_items_in_batch = (next_labels != -100).sum().clamp_min(1)
        return self.loss_function(
            logits=logits,
            labels=None,
            vocab_size=logits.shape[-1],
            num_items_in_batch=num_items_in_batch,
            shift_labels=next_labels.reshape(-1),
        )

    def _masks(
        self,
        input_ids: torch.LongTensor | None,
        hidden_states: torch.Tensor,
        image_features: MglmmImageFeatures | None,
        mask_labels: torch.Tensor | list[torch.Tensor] | None,
        mask_image_index: torch.LongTensor | None,
    ) -> tuple[torch.Tensor | None, torch.LongTensor | None]:
        """Masks of the `[SEG]`s in `input_ids` and the image of each; `None` where nobody asked for masks."""
        has_pixels = self.model.has_pixels(image_features)
        if mask_labels is not None and input_ids is None:
            raise ValueError("mask_labels need input_ids: the [SEG] positions cannot be found in inputs_embeds")
        if input_ids is None or (mask_labels is None and not has_pixels):
            return None, None
        seg_id, image_id = self.config.seg_token_id, self.config.image_token_id
        seg_states, rows, positions = gather_seg_states(hidden_states[:, :-1], input_ids[:, 1:], seg_id)
        count = len(seg_states)
        if mask_labels is not None and len(mask_labels) != count:
            raise ValueError(
                f"{count} [SEG] tokens in input_ids but {len(mask_labels)} mask_labels; "
                "they are matched in order, so every [SEG] needs exactly one mask"
            )
        if mask_image_index is not None and len(mask_image_index) != count:
            raise ValueError(f"{count} [SEG] tokens but {len(mask_image_index)} entries in mask_image_index")
        if count == 0:
            size = self.model.prompt_encoder.image_embedding_size
            masks = hidden_states.new_zeros((0, 4 * size[0], 4 * size[1]), dtype=torch.float32)
            return masks, input_ids.new_zeros((0,))
        if not has_pixels:
            raise ValueError("mask_labels need sam_pixel_values (or image_features made with them)")
        if mask_image_index is None:
            tokens_per_image = self.model.tokens_per_image(image_features)
            mask_image_index = image_index_of_seg(input_ids, image_id, tokens_per_image, rows, positions)
        embeddings = self.model.get_image_embeddings(image_features)
        return self.model.decode_masks(seg_states, mask_image_index, embeddings), mask_image_index

    def _mask_losses(
        self,
        pred_masks: torch.Tensor,
        mask_labels: torch.Tensor | list[torch.Tensor],
        num_masks_in_batch: torch.Tensor | int | None,
        hidden_states: torch.Tensor,
        image_features: MglmmImageFeatures | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if len(pred_masks) == 0:
            zero = self._zero_mask_loss(
                hidden_states, image_features if self.model.has_pixels(image_features) else None
            )
            return zero, zero
        count = len(pred_masks) if num_masks_in_batch is None else num_masks_in_batch
        if isinstance(mask_labels, list):
            side = self.config.sam_config.prompt_encoder_config.image_size
            frame = None if self.config.share_vision_tower else (side, side)
            return picture_mask_losses(pred_masks, mask_labels, count, frame)
        return mask_losses(pred_masks, mask_labels.to(pred_masks.device), count)

    def _zero_mask_loss(self, hidden_states: torch.Tensor, image_features: MglmmImageFeatures | None) -> torch.Tensor:
        """
        A zero that reaches every trainable parameter, for batches without masks or without images: all ranks of a
        distributed run must see gradients for the same parameters.
        """
        if image_features is None:
            image_features = self.model.blank_image_features()
        embeddings = self.model.get_image_embeddings(image_features)[:1]
        index = torch.zeros(1, dtype=torch.long, device=embeddings.device)
        mask = self.model.decode_masks(hidden_states[:1, 0], index, embeddings)
        tokens = self.model.project_image_features(image_features)
        return 0.0 * (mask.sum() + tokens.float().sum().to(mask.device))
