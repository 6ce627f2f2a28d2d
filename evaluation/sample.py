"""What scorers give for an answer and for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mglmm.evaluation.metrics.referring_segmentation import overlap, union
from mglmm.processing.rle import decode_mask

Row = Mapping[str, Any]
Record = Mapping[str, Any]
RECALLED = 0.5  # IoU from which on a phrase counts as found in the report


@dataclass(frozen=True)
class Sample:
    """
    What the report shows of an answer.

    Attributes:
        value: IoU in [0, 1] (of a caption CIDEr), by which samples are ranked; `None` where there is no target, too.
        phrases: Phrases of the ground truth, and whether each was found.
    """

    value: float | None
    phrases: tuple[tuple[str, bool], ...] = ()


@dataclass
class Numbers:
    """
    Attributes:
        clean, parity: Metrics by name; where originals differ, parity holds theirs under "lisa", "glamm" and "mglmm".
        skipped: What could not be computed, and why.
        marked: What was computed in another way than usual, and how.
        values: Of samples that only the whole set gives, by row.
    """

    clean: dict[str, Any] = field(default_factory=dict)
    parity: dict[str, Any] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    marked: dict[str, str] = field(default_factory=dict)
    values: dict[int, float] = field(default_factory=dict)


def masks_of(record: Record) -> list[Mapping[str, Any]]:
    """RLE masks of an answer, in its order."""
    return record["masks"] if "masks" in record else [segment["mask"] for segment in record["segments"]]


def union_iou(masks: Sequence[Mapping[str, Any]], targets: Sequence[Mapping[str, Any]]) -> float:
    """IoU of all masks together with all targets together; 1 where both are empty."""
    decoded = [[decode_mask(mask) for mask in each] for each in (masks, targets)]
    shape = next((mask.shape for each in decoded for mask in each), (1, 1))
    intersection, total = overlap(union(decoded[0], shape), union(decoded[1], shape))
    return intersection / total if total else 1.0
