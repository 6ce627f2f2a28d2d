"""Generalised referring segmentation: questions about several targets, or about none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from mglmm.evaluation.metrics.referring_segmentation import (
    MASK_FEATURE,
    PrintedIou,
    check_new,
    check_shapes,
    is_foreground,
    merge_targets,
    overlap,
    precisions,
    read_prediction,
    read_target,
    union,
)

FEW_PIXELS = 50


class GeneralizedReferringSegmentationScore:
    """
    cIoU, gIoU, N-acc, T-acc and P@0.5 ... P@0.9 over questions (Liu et al., GRES, 2023).

    `clean`: a question is refused if no mask is predicted for it, whatever the pixels of a mask are.
    - `N-acc`: share of the questions without a target that are refused. `T-acc`: share of those with one that are not.
    - `gIoU`: mean over all questions of IoU; of one without a target it is 1 if refused, else 0.
    - `cIoU`: sum of intersections by sum of unions, in exact integers. What is predicted where no target is adds to the
      union.
    - `P@t`: share of the questions with a target whose IoU is at least t.
    - The same with `@50px`: a prediction of fewer than 50 pixels counts as refused and empty, which is how GRES scores models
      without a classifier of absent targets.
    - `questions`, `no_target`: counts.

    `parity`: `gIoU` and `cIoU` as MGLMM prints them (`PrintedIou` of the merged masks); an empty mask is a refusal there.

    What a set of questions cannot tell (`N-acc` without a question that has no target) stands in `skipped`.
    """

    def __init__(self) -> None:
        self._rules = {"": _Rule(), "@50px": _Rule()}
        self._ids: set[str] = set()
        self._printed = PrintedIou()

    def update(
        self,
        pred_masks: Sequence[np.ndarray | Mapping[str, Any]],
        gt_masks: Sequence[np.ndarray | Mapping[str, Any]],
        question_id: str | None = None,
    ) -> None:
        """
        Add a question. Nothing is added when an error is raised.

        Args:
            pred_masks: All masks of the answer, bool `(H, W)` or COCO RLE; none for a refusal.
            gt_masks: All targets, bool or uint8 `(H, W)` (255 is ignored) or COCO RLE; none, or empty ones, for no target.
            question_id: To find out about a question that comes twice.

        Raises:
            ValueError: masks differ in size or are of another kind, or the question comes twice.
        """
        predictions = [read_prediction(mask) for mask in pred_masks]
        targets = [read_target(mask) for mask in gt_masks]
        shape = check_shapes([*predictions, *targets])
        check_new(question_id, self._ids)
        target, predicted = merge_targets(targets, shape), union(predictions, shape)
        self._printed.add([(predicted, is_foreground(target))], 1)
        self._rules[""].add(not predictions, predicted, target)
        few = bool(np.count_nonzero(predicted) < FEW_PIXELS)
        self._rules["@50px"].add(few, np.zeros_like(predicted) if few else predicted, target)

    def compute(self) -> dict[str, dict[str, Any]]:
        """`{"parity", "clean", "skipped"}`; fractions and counts. Raises `ValueError` without any question."""
        rule = self._rules[""]
        if not rule.refusals and not rule.ious:
            raise ValueError("there is no question to score: call update first")
        clean: dict[str, float] = {}
        for suffix, each in self._rules.items():
            clean |= {f"{name}{suffix}": value for name, value in each.compute().items()}
        clean |= {"questions": len(rule.refusals) + len(rule.ious), "no_target": len(rule.refusals)}
        skipped = {}
        if not rule.refusals:
            skipped["N-acc"] = "no question lacks a target"
        if not rule.ious:
            skipped |= dict.fromkeys(["T-acc", *precisions([0.0])], "no question has a target")
        return {"parity": self._printed.compute(), "clean": clean, "skipped": skipped}


class _Rule:
    """Sums under one rule of what a refusal is."""

    def __init__(self) -> None:
        self.refusals: list[bool] = []  # of the questions without a target: refused?
        self.ious: list[float] = []  # of those with one
        self._answered = 0
        self._intersection = 0
        self._union = 0

    def add(self, refused: bool, prediction: np.ndarray, target: np.ndarray) -> None:
        intersection, total = overlap(prediction, target)
        self._intersection += intersection
        self._union += total
        if is_foreground(target).any():
            self.ious.append(intersection / total)
            self._answered += not refused
        else:
            self.refusals.append(refused)

    def compute(self) -> dict[str, float]:
        right = sum(self.refusals)
        result = {
            "gIoU": math.fsum([right, *self.ious]) / (len(self.refusals) + len(self.ious)),
            "cIoU": self._intersection / self._union if self._union else 1.0,
        }
        if self.refusals:
            result["N-acc"] = right / len(self.refusals)
        if self.ious:
            result |= {"T-acc": self._answered / len(self.ious), **precisions(self.ious)}
        return result


class GeneralizedReferringSegmentation(evaluate.Metric):
    """`GeneralizedReferringSegmentationScore` for `evaluate`: a row is a question, its masks COCO RLE."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=GeneralizedReferringSegmentationScore.__doc__,
            citation="",
            inputs_description="""
    predictions: For each question all predicted masks as COCO RLE; an empty list is a refusal.
    references: For each question all targets as COCO RLE; an empty list is no target.
    question_ids: Optional; for each question its id.
""",
            features=datasets.Features(
                {"predictions": datasets.List(MASK_FEATURE), "references": datasets.List(MASK_FEATURE)}
            ),
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], question_ids: Sequence[str] | None = None
    ) -> dict[str, dict[str, Any]]:
        score = GeneralizedReferringSegmentationScore()
        names: Sequence[Any] = question_ids or [None] * len(predictions)
        for row in zip(predictions, references, names, strict=True):
            score.update(*row)
        return score.compute()
