"""Training log as a file and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CURVES = ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_iou", "refusal_loss", "reward")


def write_log(history: list[dict[str, Any]], output_dir: Path, stage: str) -> None:
    """Log and curves of a stage: `STAGE_log.jsonl`, `STAGE_curves.png`."""
    (output_dir / f"{stage}_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    plot_curves(history, output_dir / f"{stage}_curves.png", title=stage.replace("_", " "))


def plot_curves(history: list[dict[str, Any]], path: str | Path, title: str = "") -> None:
    """
    Plots losses, mask IoU, reward (what there is of `CURVES`) and learning rate of a `Trainer`'s `log_history` over the
    steps into a PNG; points where the same was measured on held-out rows (`eval_...`).
    """
    from matplotlib.figure import Figure

    names = [name for name in CURVES if any(name in entry for entry in history)]
    names += ["learning_rate"]
    figure = Figure(figsize=(3.2 * len(names), 2.8), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for key, style in ((name, "-"), (f"eval_{name}", "o-")):
            entries = [entry for entry in history if key in entry]
            if entries:
                axis.plot(
                    [entry["step"] for entry in entries],
                    [float(entry[key]) for entry in entries],
                    style,
                    label="held out" if key != name else "trained on",
                )
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
