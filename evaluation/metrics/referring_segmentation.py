"""Referring segmentation: one predicted mask for each question."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import datasets
import evaluate
import numpy as np

from mglmm.processing.rle import decode_mask

PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)
IGNORED = 255  # value of pixels that nobody labelled
MASK_FEATURE = {"size": datasets.List(datasets.Value("int32")), "counts": datasets.Value("string")}


class ReferringSegmentationScore:
    """
    cIoU, gIoU and P@0.5 ... P@0.9 over the questions (expressions) about images.

    `clean`:
    - `gIoU`: mean over the questions of IoU; 1 where ground truth and prediction are both empty, 0 where one of them is.
      So a target that is present but refused (no mask, or an empty one) counts 0.
    - `cIoU`: sum of all intersections by sum of all unions, in exact integers. Large masks weigh more.
    - `P@t`: share of the questions with IoU >= t.
    - `questions`, `missing` (questions without a predicted mask), `surplus` (predicted masks that answer no question).

    `parity`: `gIoU` and `cIoU` as LISA, GLaMM and MGLMM print them, see `PrintedIou`. They agree with each other; only
    MGLMM has the merge mode. A missing mask leaves cIoU but stays in the number of gIoU. Where the originals stop with an
    error (no mask at all for an image) it is counted in the same way.

    Args:
        original: Whose printed numbers `parity` are.
        merge: One question for each image: all its predicted masks together against all its targets together, as MGLMM
            scores gRefCOCO and ReasonSeg. Ignored pixels are background in `parity` then: its loader makes them so.

    Example:
        >>> score = ReferringSegmentationScore()
        >>> score.update([np.array([[True, True, False]])], [np.array([[True, False, False]])])
        >>> score.compute()["clean"]["gIoU"]
        0.5
    """

    def __init__(self, original: Literal["lisa", "glamm", "mglmm"] = "mglmm", merge: bool = False) -> None:
        if original not in ("lisa", "glamm", "mglmm"):
            raise ValueError(f'original is "lisa", "glamm" or "mglmm", got {original!r}')
        if merge and original != "mglmm":
            raise ValueError(f"only mglmm merges the masks of an image, not {original}")
        self.merge = merge
        self.ious: list[float] = []  # clean, one for each question
        self._intersection = 0
        self._union = 0
        self._missing = 0
        self._surplus = 0
        self._images: set[str] = set()
        self._printed = PrintedIou()

    def update(
        self,
        pred_masks: Sequence[np.ndarray | Mapping[str, Any] | None],
        gt_masks: Sequence[np.ndarray | Mapping[str, Any]],
        ignored: np.ndarray | Mapping[str, Any] | None = None,
        image_id: str | None = None,
    ) -> None:
        """
        Add the questions about one image. Nothing is added when an error is raised.

        Args:
            pred_masks: bool `(H, W)` or COCO RLE; the i-th answers the i-th question, `None` and what is missing at the end
                are no answer.
            gt_masks: The target of each question: bool or uint8 `(H, W)` or COCO RLE. In uint8, 255 is ignored and any other
                positive value is foreground (`parity`: 1 alone is, as the originals count sums of polygons).
            ignored: Pixels that do not count for any question, bool `(H, W)` or COCO RLE.
            image_id: To find out about an image that comes twice.

        Raises:
            ValueError: masks differ in size or are of another kind, an image comes twice, or there is no question.
        """
        predictions = [None if mask is None else read_prediction(mask) for mask in pred_masks]
        targets = [read_target(mask) for mask in gt_masks]
        skip = None if ignored is None else read_prediction(ignored)
        shape = check_shapes([*predictions, *targets, skip])
        if not targets and not self.merge:
            raise ValueError("an image without a target has no question here: choose merge=True to score its refusal")
        check_new(image_id, self._images)
        if self.merge:
            target = merge_targets(targets if skip is None else [*targets, skip * np.uint8(IGNORED)], shape)
            merged = union(predictions, shape)
            self._missing += all(mask is None for mask in predictions)
            self._printed.add([(merged, is_foreground(target))], 1)
            self._count(merged, target)
            return
        if skip is not None:
            targets = [np.where(skip, np.uint8(IGNORED), target.astype(np.uint8)) for target in targets]
        answers = (predictions + [None] * len(targets))[: len(targets)]
        self._missing += sum(mask is None for mask in answers)
        self._surplus += max(len(predictions) - len(targets), 0)
        pairs = list(zip(answers, targets, strict=True))
        self._printed.add([(mask, target) for mask, target in pairs if mask is not None], len(targets))
        for mask, target in pairs:
            self._count(np.zeros(shape, dtype=bool) if mask is None else mask, target)

    def _count(self, prediction: np.ndarray, target: np.ndarray) -> None:
        intersection, total = overlap(prediction, target)
        self.ious.append(intersection / total if total else 1.0)
        self._intersection += intersection
        self._union += total

    def compute(self) -> dict[str, dict[str, float]]:
        """`{"parity": ..., "clean": ...}`, fractions and counts. Raises `ValueError` without any question."""
        if not self.ious:
            raise ValueError("there is no question to score: call update first")
        return {
            "parity": self._printed.compute(),
            "clean": {
                "gIoU": math.fsum(self.ious) / len(self.ious),
                "cIoU": self._intersection / self._union if self._union else 1.0,
                **precisions(self.ious),
                "questions": len(self.ious),
                "missing": self._missing,
                "surplus": self._surplus,
            },
        }


class PrintedIou:
    """
    gIoU and cIoU by the arithmetic of LISA, GLaMM and MGLMM (`intersectionAndUnionGPU` and their meters): float32 sums,
    gIoU = sum(I / (U + 1e-5), + 1 where U = 0) / (questions + 1e-5), cIoU = sum(I) / (sum(U) + 1e-10). Pixels of the value
    255 in the target do not count; other values than 0 and 1 are in no class, so they leave the target.
    """

    def __init__(self) -> None:
        self._intersection = self._union = self._iou = np.float32(0)
        self._questions = 0

    def add(self, pairs: Iterable[tuple[np.ndarray, np.ndarray]], questions: int) -> None:
        """Add the (prediction, target) pairs of an image that has so many questions."""
        intersection = union = iou = np.float32(0)
        for prediction, target in pairs:
            of_class = target == 1
            i = np.float32(np.count_nonzero(prediction & of_class))
            predicted = prediction if target.dtype == np.bool_ else prediction & (target != IGNORED)
            u = np.float32(np.count_nonzero(predicted)) + np.float32(np.count_nonzero(of_class)) - i
            intersection, union, iou = intersection + i, union + u, iou + i / (u + np.float32(1e-5))
            if u == 0:
                iou += np.float32(1)
        self._intersection += intersection
        self._union += union
        # The mean of an image, weighted by its questions.
        self._iou += iou / np.float32(questions) * np.float32(questions)
        self._questions += questions

    def compute(self) -> dict[str, float]:
        """`{"gIoU", "cIoU"}`."""
        return {
            "gIoU": float(self._iou / np.float32(self._questions + 1e-5)),
            "cIoU": float(self._intersection / (self._union + np.float32(1e-10))),
        }


def read_prediction(mask: np.ndarray | Mapping[str, Any]) -> np.ndarray:
    """A bool `(H, W)` from one, or from COCO RLE. Raises `ValueError`."""
    if isinstance(mask, Mapping):
        return decode_mask(mask)
    if not isinstance(mask, np.ndarray) or mask.dtype != np.bool_ or mask.ndim != 2:
        raise ValueError(f"expected a bool mask of shape (H, W) or its RLE, got {_kind(mask)}: threshold logits first")
    return mask


def read_target(mask: np.ndarray | Mapping[str, Any]) -> np.ndarray:
    """A bool or uint8 `(H, W)` from one, or from COCO RLE. Raises `ValueError`."""
    if isinstance(mask, np.ndarray) and mask.dtype == np.uint8 and mask.ndim == 2:
        return mask
    return read_prediction(mask)


def check_shapes(masks: Iterable[np.ndarray | None]) -> tuple[int, int]:
    """The one shape of the masks, `(1, 1)` if there is none. Raises `ValueError` if there are several."""
    shapes = {mask.shape for mask in masks if mask is not None}
    if len(shapes) > 1:
        raise ValueError(f"the masks of one image have {len(shapes)} sizes: {sorted(shapes)}")
    return shapes.pop() if shapes else (1, 1)


def check_new(identity: str | None, known: set[str]) -> None:
    """Take note of an id. Raises `ValueError` if it was known."""
    if identity is None:
        return
    if identity in known:
        raise ValueError(f"{identity!r} comes a second time: score every image once")
    known.add(identity)


def is_foreground(target: np.ndarray) -> np.ndarray:
    """Bool: pixels that belong to the target."""
    return target if target.dtype == np.bool_ else (target > 0) & (target != IGNORED)


def union(masks: Iterable[np.ndarray | None], shape: tuple[int, int]) -> np.ndarray:
    """Bool `(H, W)`: pixels of any of the masks."""
    result = np.zeros(shape, dtype=bool)
    for mask in masks:
        if mask is not None:
            result |= mask
    return result


def merge_targets(targets: Iterable[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """All targets as one: bool, or uint8 with 255 where any of them is ignored."""
    targets = list(targets)
    foreground = union([is_foreground(target) for target in targets], shape)
    ignored = union([target == IGNORED for target in targets if target.dtype != np.bool_], shape)
    return np.where(ignored, np.uint8(IGNORED), foreground.astype(np.uint8)) if ignored.any() else foreground


def overlap(prediction: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    """Pixels of the intersection and of the union, without those that the target ignores."""
    if target.dtype != np.bool_:
        prediction = prediction & (target != IGNORED)
        target = is_foreground(target)
    return int(np.count_nonzero(prediction & target)), int(np.count_nonzero(prediction | target))


def precisions(ious: Sequence[float]) -> dict[str, float]:
    """`P@t` of some IoUs: the share that is at least t."""
    return {f"P@{t}": sum(iou >= t for iou in ious) / len(ious) for t in PRECISION_THRESHOLDS}


def _kind(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


class ReferringSegmentation(evaluate.Metric):
    """`ReferringSegmentationScore` for `evaluate`: a row is an image, its masks COCO RLE."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=ReferringSegmentationScore.__doc__,
            citation="",
            inputs_description="""
    predictions: For each image the predicted masks as COCO RLE, the i-th for the i-th question.
    references: For each image the targets as COCO RLE, one for each question.
    ignored: Optional; for each image the pixels that do not count as COCO RLE, or None.
    image_ids: Optional; for each image its id.
    original, merge: See `ReferringSegmentationScore`.
""",
            features=datasets.Features(
                {"predictions": datasets.List(MASK_FEATURE), "references": datasets.List(MASK_FEATURE)}
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        ignored: Sequence[Any] | None = None,
        image_ids: Sequence[str] | None = None,
        original: Literal["lisa", "glamm", "mglmm"] = "mglmm",
        merge: bool = False,
    ) -> dict[str, dict[str, float]]:
        score = ReferringSegmentationScore(original, merge)
        nothing = [None] * len(predictions)
        for row in zip(predictions, references, ignored or nothing, image_ids or nothing, strict=True):
            score.update(*row)
        return score.compute()
