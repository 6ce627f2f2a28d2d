"""What the forward passes return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, ModelOutput

from .image_features import MglmmImageFeatures


@dataclass
class MglmmModelOutput(BaseModelOutputWithPast):
    """`BaseModelOutputWithPast` plus the images' features, so that the mask path encodes nothing a second time."""

    image_features: MglmmImageFeatures | None = None


@dataclass
class MglmmOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `()`, *optional*): `w_ce * ce_loss + w_bce * mask_bce_loss + w_dice * mask_dice_loss`.
        ce_loss, mask_bce_loss, mask_dice_loss (`torch.Tensor` of shape `()`, *optional*): the unweighted parts.
        logits (`torch.Tensor` of shape `(batch, length, vocab_size)`): next-token logits.
        pred_masks (`torch.Tensor` of shape `(total_masks, h, w)`, *optional*):
            float32 mask logits in the pixel encoder's frame, one per `[SEG]` of the batch in reading order.
        mask_image_index (`torch.Tensor` of shape `(total_masks,)`, *optional*): the image each mask belongs to.
        past_key_values, hidden_states, attentions: as in every causal language model.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mask_bce_loss: torch.Tensor | None = None
    mask_dice_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    mask_image_index: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
