"""COCO's average precision, image by image."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.cocoeval import COCOeval

COCO_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""The names of COCOeval's twelve numbers, in its order."""


@dataclass(slots=True)
class Detections:
    """COCOeval's result for an image: scores `(D,)`, by area range and IoU threshold `(A, T, D)`, `(A, G)`; bool."""

    scores: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    gt_ignored: np.ndarray


class AveragePrecision:
    """
    COCOeval's matching of one image and its accumulation over images, without its store of annotations.

    Args:
        only_ap50: IoU threshold 0.5 and masks of every size alone, instead of ten thresholds and four ranges of area.
    """

    def __init__(self, only_ap50: bool = False) -> None:
        self._only_ap50 = only_ap50
        self._evaluation = COCOeval(iouType="segm")
        parameters = self._evaluation.params
        parameters.catIds = [1]
        if only_ap50:
            parameters.iouThrs = np.array([0.5])
            parameters.areaRng, parameters.areaRngLbl = parameters.areaRng[:1], parameters.areaRngLbl[:1]
            parameters.maxDets = parameters.maxDets[-1:]
        self._evaluation._paramsEval = parameters

    def match(self, ious: np.ndarray, scores: np.ndarray, areas: np.ndarray, gt_areas: np.ndarray) -> Detections | None:
        """
        The matches in an image; None for one without any mask.

        Args:
            ious: `(predictions, ground truths)`.
            scores, areas, gt_areas: Of each mask; scores in descending order.
        """
        evaluation, parameters = self._evaluation, self._evaluation.params
        limit, key = parameters.maxDets[-1], (0, 1)
        evaluation.ious = {key: ious[:limit] if ious.size else []}
        evaluation._dts[key] = [
            {"id": number, "score": score, "area": area}
            for number, (score, area) in enumerate(zip(scores.tolist(), areas.tolist(), strict=True), 1)
        ]
        evaluation._gts[key] = [  # COCOeval takes an id of 0 for "unmatched"
            {"id": number, "area": area, "iscrowd": 0, "ignore": 0} for number, area in enumerate(gt_areas.tolist(), 1)
        ]
        if not len(areas) and not len(gt_areas):
            return None
        results = [evaluation.evaluateImg(*key, area_range, limit) for area_range in parameters.areaRng]
        return Detections(
            scores=scores[:limit],
            matched=np.stack([result["dtMatches"] > 0 for result in results]),
            ignored=np.stack([result["dtIgnore"] for result in results]),
            gt_ignored=np.stack([result["gtIgnore"] > 0 for result in results]),
        )

    def compute(self, images: Sequence[Detections | None]) -> dict[str, float]:
        """`COCO_STATS`, or `AP50` alone; among equal scores the images rank in the order given."""
        evaluation = self._evaluation
        evaluation.params.imgIds = list(range(len(images)))
        evaluation.evalImgs = [
            None
            if image is None
            else {
                "dtScores": image.scores,
                "dtMatches": image.matched[area],
                "dtIgnore": image.ignored[area],
                "gtIgnore": image.gt_ignored[area],
            }
            for area in range(len(evaluation.params.areaRng))
            for image in images
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            evaluation.accumulate()
            evaluation.evalImgs = []
            if self._only_ap50:
                return {"AP50": float(evaluation.eval["precision"].mean())}
            evaluation.summarize()
        return dict(zip(COCO_STATS, map(float, evaluation.stats), strict=True))
