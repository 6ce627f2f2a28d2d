"""Trainer of the stages before the last, whose wrappers return a dict of scalars."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer


class StageTrainer(Trainer):
    """`Trainer` over a module that returns `{"loss": ..., name: scalar, ...}`; logs the means of the others beside it."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._parts: list[dict[str, torch.Tensor]] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        self._parts.append({name: value.detach() for name, value in outputs.items() if name != "loss"})
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._parts:
            logs |= {name: torch.stack([p[name] for p in self._parts]).mean().item() for name in self._parts[0]}
            self._parts = []
        super().log(logs, start_time)
