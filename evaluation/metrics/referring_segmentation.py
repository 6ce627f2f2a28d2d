"""Referring segmentation: one predicted mask for each question."""

from __future__ import annotations

import numpy as np

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)


class ReferringSegmentationScore:
    """
    cIoU, gIoU and P@0.5 ... P@0.9 over questions.

    - `gIoU`: mean over the questions of IoU; 1 where ground truth and prediction are both empty, 0 where one of them is.
      So a target that is present but refused (an empty prediction) counts 0.
    - `cIoU`: sum of all intersections by sum of all unions. Large masks weigh more.
    - `P@t`: share of the questions with IoU >= t.

    Example:
        >>> score = ReferringSegmentationScore()
        >>> score.update(np.array([[True, True, False]]), np.array([[True, False, False]]))
        >>> score.compute()["gIoU"]
        0.5
    """

    def __init__(self) -> None:
        self.intersections: list[int] = []
        self.unions: list[int] = []

    def update(self, pred_mask: np.ndarray, gt_mask: np.ndarray) -> None:
        """
        Add a question.

        Args:
            pred_mask, gt_mask: bool `(H, W)`. No mask predicted: zeros.

        Raises:
            ValueError: the masks are not bool or differ in shape.
        """
        if pred_mask.dtype != np.bool_ or gt_mask.dtype != np.bool_ or pred_mask.shape != gt_mask.shape:
            raise ValueError(
                f"expected two bool masks of one shape, got a prediction {pred_mask.dtype} {pred_mask.shape} and a "
                f"ground truth {gt_mask.dtype} {gt_mask.shape}"
            )
        self.update_counts(int((pred_mask & gt_mask).sum()), int((pred_mask | gt_mask).sum()))

    def update_counts(self, intersection: int, union: int) -> None:
        """Add a question by the pixel counts of intersection and union. Raises `ValueError` if they are impossible."""
        if not 0 <= intersection <= union:
            raise ValueError(f"an intersection of {intersection} pixels cannot belong to a union of {union}")
        self.intersections.append(intersection)
        self.unions.append(union)

    def compute(self) -> dict[str, float]:
        """`{"gIoU", "cIoU", "P@0.5", ..., "P@0.9", "questions"}`; fractions. Raises `ValueError` without any question."""
        if not self.unions:
            raise ValueError("there is no question to score: call update first")
        intersections, unions = np.array(self.intersections), np.array(self.unions)
        ious = np.where(unions == 0, 1.0, intersections / np.maximum(unions, 1))
        union = sum(self.unions)
        return {
            "gIoU": float(ious.mean()),
            "cIoU": sum(self.intersections) / union if union else 1.0,
            **{f"P@{threshold}": float((ious >= threshold).mean()) for threshold in PRECISION_THRESHOLDS},
            "questions": len(unions),
        }
