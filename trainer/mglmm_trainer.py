"""Trainer of MGLMM: transformers' `Trainer` with losses that are exact means over the global batch."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import Trainer

from mglmm.modeling_mglmm import MglmmForConditionalGeneration

from .training_args import MglmmTrainingArguments

TRAINED_MODULES = ["multi_modal_projector", "mask_projector", "mask_decoder", "pixel_neck"]
# Parts of SAM's decoder that no loss reaches: the IoU head and the hypernetworks of the three unused mask tokens.
UNTRAINED = ("iou_prediction_head", "hypernetworks_mlps.1", "hypernetworks_mlps.2", "hypernetworks_mlps.3")
LOSS_PARTS = ("ce_loss", "mask_bce_loss", "mask_dice_loss")


def add_adapter(
    model: MglmmForConditionalGeneration, args: MglmmTrainingArguments, new_token_ids: list[int]
) -> PeftModel:
    """
    The model with LoRA on its language model, trainable rows for the new tokens (of the embedding and of the head, if
    they are not one), and its projectors, neck and mask decoder trainable in float32; everything else is frozen.
    `save_pretrained` of the result writes all of that.
    """
    saved = [name for name in TRAINED_MODULES if getattr(model.model, name) is not None]
    embedding = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    # PEFT ties the two if the model does.
    new_rows = dict.fromkeys((embedding.rpartition(".")[2], "lm_head"), new_token_ids)
    config = LoraConfig(
        r=args.lora_r or 1,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=args.lora_target if args.lora_r else DUMMY_TARGET_MODULES,
        modules_to_save=[*saved, "prompt_encoder"],
        trainable_token_indices=new_rows if args.train_new_tokens else None,
    )
    peft_model = get_peft_model(model, config)
    for name, parameter in peft_model.named_parameters():
        if any(part in name for part in UNTRAINED) or ".prompt_encoder." in name:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return peft_model


class MglmmTrainer(Trainer):
    """
    CE is the mean over the supervised tokens, BCE and DICE the mean over the masks of the *global* batch: all ranks
    and all accumulation steps. So N ranks x k steps give the gradients of one big batch.
    """

    args: MglmmTrainingArguments
    loss_is_scaled_for_ga = True  # both kinds are already means over the accumulated batch

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._num_masks = torch.ones(())
        self._parts = torch.zeros(len(LOSS_PARTS))
        self._parts_steps = 0

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        num_tokens = super()._get_num_items_in_batch(batch_samples, device)
        count = torch.tensor(float(sum(len(batch["mask_labels"]) for batch in batch_samples)), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, "sum")
        self._num_masks = count.clamp_min(1)
        self._parts_steps += 1  # this is called once per optimizer step
        return num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {**inputs, "num_masks_in_batch": self._num_masks if model.training else None}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            parts = torch.stack([outputs[name].detach().float() for name in LOSS_PARTS])
            self._parts = self._parts.to(parts.device) + parts
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts_steps:
            # The same keys in the same order on every rank.
            parts = self.accelerator.reduce(self._parts, "sum") / self._parts_steps
            logs |= dict(zip(LOSS_PARTS, parts.tolist(), strict=True))
            self._parts, self._parts_steps = torch.zeros(len(LOSS_PARTS)), 0
        super().log(logs, start_time)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            trained: Any = self.model if model is None else model
            decay = set(self.get_decay_parameter_names(trained))
            mask_rate = args.learning_rate if args.mask_learning_rate is None else args.mask_learning_rate
            groups: dict[tuple[float, float], list] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    mask_path = any(f".{module}." in name for module in TRAINED_MODULES)
                    rate = mask_rate if mask_path else args.learning_rate
                    weight_decay = args.weight_decay if name in decay else 0.0
                    groups.setdefault((rate, weight_decay), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            self.optimizer = optimizer_class(
                [{"params": p, "lr": lr, "weight_decay": decay_} for (lr, decay_), p in groups.items()], **options
            )
        return self.optimizer
