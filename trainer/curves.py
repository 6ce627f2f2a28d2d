"""Training curves as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_curves(history: list[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """Plots every loss (and the learning rate) of a `Trainer`'s `log_history` over the steps into a PNG."""
    from matplotlib.figure import Figure

    names = [name for name in ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss") if any(name in e for e in history)]
    names += ["learning_rate"]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        entries = [entry for entry in history if name in entry]
        axis.plot([entry["step"] for entry in entries], [float(entry[name]) for entry in entries])
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
