"""
First stage of training from fresh parts: teach neck and mask decoder before the language model moves.

A fresh mask decoder first learns "everything is background", and a joint run pays language-model time for every step of
that. Here the frozen language model reads each phrase once, without a picture; its `[SEG]` states are kept, and only
projector, neck and decoder train on them. The joint stage then starts with masks that already follow the phrase.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.mask_losses import mask_losses
from mglmm.modeling_mglmm.seg_states import gather_seg_states
from mglmm.processing import MglmmProcessor
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import parse, render_phrase

from .feature_cache import FeatureCache
from .mglmm_trainer import UNTRAINED

QUESTION = "Please segment {}."
ANSWER = "Sure, {}."
MASK_LOSSES = ("mask_bce_loss", "mask_dice_loss")
MASK_PATH = ("pixel_neck", "mask_projector", "prompt_encoder", "mask_decoder")


def phrases_of(messages: Iterable[dict[str, str]]) -> list[str]:
    """Phrase of every mask of a conversation, in the order of the masks."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [mention.phrase for answer in answers for mention in parse(answer).mentions]


@torch.no_grad()
def phrase_states(
    model: MglmmForConditionalGeneration, processor: MglmmProcessor, phrases: Sequence[str], batch_size: int = 32
) -> dict[str, torch.Tensor]:
    """`[SEG]` state `(hidden,)` of each distinct phrase, from a one-turn conversation without a picture."""
    distinct = sorted(set(phrases), key=lambda phrase: (len(phrase), phrase))
    states: dict[str, torch.Tensor] = {}
    for start in tqdm(range(0, len(distinct), batch_size), desc="phrases", unit="batch"):
        batch = distinct[start : start + batch_size]
        conversations = [
            [
                {"role": "user", "content": QUESTION.format(phrase)},
                {"role": "assistant", "content": ANSWER.format(render_phrase(phrase))},
            ]
            for phrase in batch
        ]
        options = {"padding": True, "padding_side": "right"}
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        ).to(model.device)
        hidden = model.model(**inputs).last_hidden_state
        found, rows, _ = gather_seg_states(hidden[:, :-1], inputs["input_ids"][:, 1:], model.config.seg_token_id)
        states |= {batch[int(row)]: state.float().cpu() for row, state in zip(rows, found, strict=True)}
    return states


class MaskWarmupCollator:
    """
    Rows of (image, masks, phrases) to image features, phrase states and labels of at most `masks_per_image` masks each,
    drawn anew at every visit.
    """

    def __init__(
        self,
        processor: MglmmProcessor,
        states: dict[str, torch.Tensor],
        feature_cache: FeatureCache,
        masks_per_image: int,
        mask_size: int,
    ):
        self.processor, self.states, self.feature_cache = processor, states, feature_cache
        self.masks_per_image, self.mask_size = masks_per_image, mask_size

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        states, labels, index = [], [], []
        for i, row in enumerate(rows):
            pairs = list(zip(phrases_of(row["messages"]), row["masks"], strict=True))
            chosen = torch.randperm(len(pairs))[
                : self.masks_per_image
            ]  # torch's generator differs from worker to worker
            pairs = [pairs[k] for k in chosen.tolist()]
            states += [self.states[phrase] for phrase, _ in pairs]
            labels.append(self.processor.mask_labels([decode_mask(mask) for _, mask in pairs], self.mask_size))
            index += [i] * len(pairs)
        return {
            "image_features": self.feature_cache.load([row["image"] for row in rows]),
            "seg_states": torch.stack(states),
            "mask_image_index": torch.tensor(index),
            "mask_labels": torch.cat(labels),
        }


class MaskWarmup(nn.Module):
    """
    The mask path alone, in the form that `Trainer` takes: losses from `[SEG]` states that are given. Freezes everything
    else in `model`, whose own modules these are.
    """

    def __init__(self, model: MglmmForConditionalGeneration):
        super().__init__()
        self.config = model.config
        modules = {name: getattr(model.model, name) for name in MASK_PATH if getattr(model.model, name) is not None}
        self.mask_path = nn.ModuleDict(modules)
        self._models = (model.model,)  # in a tuple, hence no submodule: checkpoints hold the mask path alone
        model.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prompt_encoder" not in name and not any(part in name for part in UNTRAINED))

    def forward(
        self,
        image_features: MglmmImageFeatures,
        seg_states: torch.Tensor,
        mask_image_index: torch.LongTensor,
        mask_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        model = self._models[0]
        embeddings = model.get_image_embeddings(image_features)
        pred_masks = model.decode_masks(seg_states, mask_image_index, embeddings)
        bce, dice = mask_losses(pred_masks, mask_labels, len(mask_labels))
        loss = self.config.bce_loss_weight * bce + self.config.dice_loss_weight * dice
        return {"loss": loss, "mask_bce_loss": bce, "mask_dice_loss": dice}


class MaskWarmupTrainer(Trainer):
    """`Trainer` over `MaskWarmup`, whose batches hold no `labels`; logs the two mask losses beside their sum."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._parts: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self._parts.append(torch.stack([outputs[name].detach() for name in MASK_LOSSES]))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            logs |= dict(zip(MASK_LOSSES, torch.stack(self._parts).mean(0).tolist(), strict=True))
            self._parts = []
        super().log(logs, start_time)
