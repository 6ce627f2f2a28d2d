"""Where a run that was stopped goes on."""

from __future__ import annotations

from pathlib import Path


def last_checkpoint(folder: Path) -> str | None:
    """The last complete checkpoint of an output folder: `trainer_state.json` is written last."""
    states = folder.glob("checkpoint-*/trainer_state.json")
    return max((str(state.parent) for state in states), key=lambda name: int(name.rpartition("-")[2]), default=None)
