"""Video object segmentation: region similarity J and boundary accuracy F of an object over the frames of a video."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.spatial import KDTree

from mglmm.evaluation.metrics.referring_segmentation import (
    IGNORED,
    MASK_FEATURE,
    check_new,
    check_shapes,
    is_foreground,
    overlap,
    read_prediction,
    read_target,
    union,
)

BOUNDARY_TOLERANCE = 0.008  # of the image's diagonal
RECALL_THRESHOLD = 0.5


class VideoObjectSegmentationScore:
    """
    J, F and J&F of objects (or of the expressions that name them) over frames, as DAVIS defines them (Perazzi et al., "A
    Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", 2016; DAVIS 2017's toolkit).

    - `J`: IoU of a frame; 1 if prediction and ground truth are both empty. `F`: see `boundary_accuracy`.
    - Of an object the mean over its frames, of the data the mean over its objects: `J`, `F`, and their mean `J&F`.
    - `J_recall`, `F_recall`: mean over the objects of the share of frames above 0.5.
    - `J_decay`, `F_decay`: mean over the objects of the first quarter's mean minus the last quarter's.
    - `objects`, `frames`, `missing` (objects without any prediction): counts.

    `parity` and `clean` are the same numbers: the definitions have no variants.

    Args:
        skip_ends: Leave out the first and the last frame of every video, as DAVIS does where the first is given to the
            model (semi-supervised). Ref-YouTube-VOS and Ref-DAVIS count all frames.
        tolerance: Distance at which boundaries agree, a fraction of the diagonal, rounded up to pixels; from 1 on: pixels.
    """

    def __init__(self, skip_ends: bool = False, tolerance: float = BOUNDARY_TOLERANCE) -> None:
        if not tolerance > 0:
            raise ValueError(f"the tolerance of boundaries is a positive number, got {tolerance}")
        self.skip_ends = skip_ends
        self.tolerance = tolerance
        self._objects: dict[str, list[float]] = {}  # one number for each object under each name
        self._frames = 0
        self._missing = 0
        self._ids: set[str] = set()

    def update(
        self,
        pred_masks: Sequence[np.ndarray | Mapping[str, Any] | None],
        gt_masks: Sequence[np.ndarray | Mapping[str, Any] | None],
        object_id: str | None = None,
    ) -> None:
        """
        Add an object of a video. Nothing is added when an error is raised.

        Args:
            pred_masks: For each frame bool `(H, W)` or COCO RLE, `None` for nothing; an empty list is an object that was not
                predicted at all.
            gt_masks: For each frame bool or uint8 `(H, W)` (255 is ignored) or COCO RLE, `None` for an object out of sight.
            object_id: Video and object (or expression), to find out about one that comes twice.

        Raises:
            ValueError: numbers of frames or sizes differ, no frame is left, a mask is of another kind, or an object comes
                twice.
            ImportError: scipy is missing.
        """
        if len(pred_masks) not in (0, len(gt_masks)):
            raise ValueError(f"{len(pred_masks)} predicted frames for {len(gt_masks)} frames of the video")
        frames = slice(1, -1) if self.skip_ends else slice(None)
        truths = [None if mask is None else read_target(mask) for mask in gt_masks[frames]]
        if not truths:
            ends = ", first and last of which do not count" if self.skip_ends else ""
            raise ValueError(f"a video of {len(gt_masks)} frames{ends}: nothing is left to score")
        given = pred_masks[frames] if pred_masks else [None] * len(truths)
        predictions = [None if mask is None else read_prediction(mask) for mask in given]
        shape = check_shapes([*truths, *predictions])
        check_new(object_id, self._ids)
        values: dict[str, list[float]] = {"J": [], "F": []}
        nothing = np.zeros(shape, dtype=bool)
        for predicted, truth in zip(predictions, truths, strict=True):
            predicted = nothing if predicted is None else predicted
            truth = nothing if truth is None else truth
            intersection, total = overlap(predicted, truth)
            values["J"].append(intersection / total if total else 1.0)
            if truth.dtype != np.bool_:
                predicted, truth = predicted & (truth != IGNORED), is_foreground(truth)
            values["F"].append(boundary_accuracy(predicted, truth, self.tolerance))
        for name, of_frames in values.items():
            for statistic, value in _statistics(np.array(of_frames)).items():
                self._objects.setdefault(name + statistic, []).append(value)
        self._frames += len(truths)
        self._missing += all(mask is None for mask in predictions)

    def compute(self) -> dict[str, dict[str, float]]:
        """`{"parity", "clean"}`, fractions and counts. Raises `ValueError` without any object."""
        if not self._objects:
            raise ValueError("there is no object to score: call update first")
        objects = len(self._objects["J"])
        result = {name: math.fsum(values) / objects for name, values in self._objects.items()}
        result["J&F"] = (result["J"] + result["F"]) / 2
        result |= {"objects": objects, "frames": self._frames, "missing": self._missing}
        return {"parity": dict(result), "clean": result}


def boundary_accuracy(prediction: np.ndarray, target: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE) -> float:
    """
    F-measure of the boundaries (DAVIS; Martin et al., 2004).

    Precision is the share of the prediction's boundary pixels with a pixel of the target's boundary within the tolerance
    (Euclidean, so a disk), recall the other way round. 1 if neither has a boundary.

    Args:
        prediction, target: bool `(H, W)`.
        tolerance: See `VideoObjectSegmentationScore`.
    """
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*target.shape))
    ours, theirs = (np.argwhere(boundary(mask)) for mask in (prediction, target))
    if not len(ours) or not len(theirs):
        return float(len(ours) == len(theirs))
    precision = np.mean(KDTree(theirs).query(ours)[0] <= radius)
    recall = np.mean(KDTree(ours).query(theirs)[0] <= radius)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def boundary(mask: np.ndarray) -> np.ndarray:
    """
    Bool `(H, W)`: pixels that differ from their right, lower or lower right neighbour; beyond the edge is none (Martin's
    `seg2bmap`, as DAVIS uses it). So a mask of the whole image has no boundary.
    """
    # The last row and column repeated: what would be compared beyond the edge is equal.
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    result: np.ndarray = (mask != padded[:-1, 1:]) | (mask != padded[1:, :-1]) | (mask != padded[1:, 1:])
    return result


def _statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, recall and decay over the frames; the quarters of the decay share the frames between them, as in DAVIS."""
    first, second, _, fourth, last = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(np.int64) - 1
    return {
        "": float(values.mean()),
        "_recall": float((values > RECALL_THRESHOLD).mean()),
        "_decay": float(values[first : second + 1].mean() - values[fourth : last + 1].mean()),
    }


class VideoObjectSegmentation(evaluate.Metric):
    """`VideoObjectSegmentationScore` for `evaluate`: a row is an object of a video, its masks COCO RLE."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=VideoObjectSegmentationScore.__doc__,
            citation="",
            inputs_description="""
    predictions: For each object a list of frames, each a list of masks as COCO RLE (their union counts, none is nothing).
    references: The same of the ground truth.
    object_ids: Optional; for each object its id.
    skip_ends, tolerance: See `VideoObjectSegmentationScore`.
""",
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.List(MASK_FEATURE)),
                    "references": datasets.List(datasets.List(MASK_FEATURE)),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        object_ids: Sequence[str] | None = None,
        skip_ends: bool = False,
        tolerance: float = BOUNDARY_TOLERANCE,
    ) -> dict[str, dict[str, float]]:
        score = VideoObjectSegmentationScore(skip_ends, tolerance)
        names: Sequence[Any] = object_ids or [None] * len(predictions)
        for predicted, truth, name in zip(predictions, references, names, strict=True):
            score.update([_frame(masks) for masks in predicted], [_frame(masks) for masks in truth], name)
        return score.compute()


def _frame(masks: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    decoded = [read_prediction(mask) for mask in masks]
    return union(decoded, check_shapes(decoded)) if decoded else None
