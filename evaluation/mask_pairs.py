"""Which predicted mask belongs to which ground truth."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment

IOU_THRESHOLD = 0.5
SIMILARITY_THRESHOLD = 0.5


def greedy_pairs(ious: np.ndarray) -> list[tuple[int, int]]:
    """One-to-one (row, column) pairs of IoU > 0, the highest first, equal ones by order. NaN: no pair at all."""
    ious, pairs = ious.copy(), []
    while ious.size and ious.max() > 0:  # the maximum is NaN as long as any value is
        row, column = divmod(int(ious.argmax()), ious.shape[1])
        pairs.append((row, column))
        ious[row], ious[:, column] = 0, 0
    return pairs


def original_pairs(ious: np.ndarray, similarities: np.ndarray) -> list[list[int]] | None:
    """
    The pairs `[ground truth, prediction]` that the originals' recall counts; None where they fail.

    Args:
        ious: `(ground-truth masks, predicted masks)`, NaN for two empty ones.
        similarities: `(labels, phrases)`.
    """
    ious, pairs = ious.copy(), []
    while ious.size:
        row, column = divmod(int(ious.argmax()), ious.shape[1])  # NaN counts as the maximum
        if ious[row, column] < IOU_THRESHOLD:  # False for NaN
            break
        if row >= similarities.shape[0] or column >= similarities.shape[1]:
            return None
        if similarities[row, column] < SIMILARITY_THRESHOLD:
            break
        pairs.append([row, column])
        ious[row], ious[:, column] = 0, 0
    return pairs


def admissible_pairs(ious: np.ndarray, similarities: np.ndarray) -> list[list[int]]:
    """The largest one-to-one set of pairs `[row, column]` that pass both thresholds, with the highest sum of IoUs."""
    admissible = (ious >= IOU_THRESHOLD) & (similarities >= SIMILARITY_THRESHOLD)
    if not admissible.any():
        return []
    # Any number of IoUs weighs less than one more pair.
    weights = np.where(admissible, min(ious.shape) + ious, 0)
    rows, columns = linear_sum_assignment(weights, maximize=True)
    return [[int(row), int(column)] for row, column in zip(rows, columns, strict=True) if admissible[row, column]]
