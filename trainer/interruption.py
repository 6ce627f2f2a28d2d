"""Stopping a run from outside: SIGTERM, as a scheduler sends it before it takes the machine away."""

from __future__ import annotations

import signal
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import Trainer, TrainerCallback


class StopOnSigterm(TrainerCallback):
    """
    At SIGTERM every rank finishes the optimizer step in progress, saves a checkpoint and ends the training. Between two
    steps, and not within one as transformers' `enable_jit_checkpoint` does, so that the resumed run draws the same random
    numbers as one that was never stopped.

    Attributes:
        received: Whether the training ended that way.
    """

    def __init__(self) -> None:
        self.received = False
        self._asked = False
        self._previous: Any = None

    def _ask(self, signum: int, frame: Any) -> None:
        self._asked = True

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGTERM, self._ask)

    def on_step_end(self, args, state, control, **kwargs):
        asked = torch.tensor(float(self._asked), device=args.device)
        if args.world_size > 1:  # the signal may reach the ranks in different steps
            asked = reduce(asked, "sum")
        if asked > 0:
            self.received = control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._previous)

    def raise_if_received(self, trainer: Trainer) -> None:
        """Raises `InterruptedError`, which says where the training stopped."""
        if self.received:
            folder, step = trainer.args.output_dir, trainer.state.global_step
            raise InterruptedError(f"stopped by SIGTERM after step {step}, saved in {folder}: the same command goes on")
