"""Segmentation captioning: descriptions whose phrases carry masks."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mglmm.datasets_scripts.labels import Noun

IOU_THRESHOLD = 0.5
MAX_DETECTIONS = 100  # of one image, the highest scores first, as COCO counts
DETERMINERS = frozenset("a an the all some one two several".split())


class SegCapScore:
    """
    Mask recall, AP50 and mIoU of descriptions. Every ground-truth mask stays in every denominator.

    - `mask_recall`: share of the ground-truth masks that are matched with a predicted mask of IoU >= 0.5 whose phrase means
      the same by `same_noun` (`text_match: "exact-noun"`). Matching is one to one within an image, the highest IoU first,
      among the pairs that pass both tests.
    - `AP50`: COCO's average precision of the masks at IoU 0.5, without classes and phrases, ranked by their scores.
    - `mIoU_gt`: mean over the ground-truth masks of the IoU with the predicted mask they are paired with, 0 without one.
      Pairs are one to one, the highest IoU first, whatever the phrases.

    Equal IoUs and equal scores are resolved by order.
    """

    def __init__(self) -> None:
        self._ious: list[float] = []  # one for each ground-truth mask
        self._recalled = 0
        self._images: list[dict[str, Any]] = []
        self._references: list[dict[str, Any]] = []
        self._detections: list[dict[str, Any]] = []

    def update(
        self,
        pred_masks: Sequence[np.ndarray],
        pred_phrases: Sequence[str],
        pred_scores: Sequence[float],
        gt_masks: Sequence[np.ndarray],
        gt_phrases: Sequence[str],
    ) -> None:
        """
        Add the description of one image.

        Args:
            pred_masks, gt_masks: bool `(H, W)`, all of one shape.
            pred_phrases, gt_phrases: One for each mask; "" for a mask without a phrase, which matches nothing.
            pred_scores: Confidence of each predicted mask, to rank it.

        Raises:
            ValueError: numbers or shapes differ, or a score is not finite.
        """
        if not len(pred_masks) == len(pred_phrases) == len(pred_scores) or len(gt_masks) != len(gt_phrases):
            raise ValueError(
                f"{len(pred_masks)} predicted masks with {len(pred_phrases)} phrases and {len(pred_scores)} scores, "
                f"{len(gt_masks)} ground-truth masks with {len(gt_phrases)} phrases: their numbers must agree"
            )
        shapes = {mask.shape for mask in (*pred_masks, *gt_masks)}
        if len(shapes) > 1:
            raise ValueError(f"the masks of one image have {len(shapes)} shapes: {sorted(shapes)}")
        if not np.isfinite(pred_scores).all():
            raise ValueError(f"scores must be finite to rank masks, got {list(pred_scores)}")
        predicted, references = ([_encode(mask) for mask in masks] for masks in (pred_masks, gt_masks))
        image_id = len(self._images) + 1
        height, width = shapes.pop() if shapes else (0, 0)
        self._images.append({"id": image_id, "height": height, "width": width})
        for rle, score in zip(predicted, pred_scores, strict=True):
            self._detections.append(
                {"image_id": image_id, "category_id": 1, "segmentation": rle, "score": float(score)}
            )
        for rle in references:
            self._references.append(
                {
                    "id": len(self._references) + 1,  # COCOeval takes an id of 0 for "unmatched"
                    "image_id": image_id,
                    "category_id": 1,
                    "segmentation": rle,
                    "area": int(mask_utils.area(rle)),
                    "iscrowd": 0,
                }
            )
        ious = np.zeros((len(predicted), len(references)))
        if ious.size:
            ious = mask_utils.iou(predicted, references, [0] * len(references))
        named = np.array([[same_noun(a, b) for b in gt_phrases] for a in pred_phrases], dtype=bool).reshape(ious.shape)
        paired = np.zeros(len(references))
        for row, column in _greedy_pairs(ious, ious > 0):
            paired[column] = ious[row, column]
        self._ious += paired.tolist()
        self._recalled += len(_greedy_pairs(ious, named & (ious >= IOU_THRESHOLD)))

    def compute(self) -> dict[str, Any]:
        """
        `{"mask_recall", "AP50", "mIoU_gt", "images", "masks", "predicted_masks", "text_match"}`; fractions.

        Raises:
            ValueError: there is no ground-truth mask.
        """
        total = len(self._references)
        if total == 0:
            raise ValueError(f"there is no ground-truth mask in {len(self._images)} images: nothing can be recalled")
        return {
            "mask_recall": self._recalled / total,
            "AP50": self._average_precision(),
            "mIoU_gt": sum(self._ious) / total,
            "images": len(self._images),
            "masks": total,
            "predicted_masks": len(self._detections),
            "text_match": "exact-noun",
        }

    def _average_precision(self) -> float:
        if not self._detections:  # COCO.loadRes cannot take an empty list
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            reference = COCO()
            reference.dataset = {
                "images": self._images,
                "categories": [{"id": 1}],
                "annotations": self._references,
            }
            reference.createIndex()
            evaluation = COCOeval(reference, reference.loadRes(self._detections), "segm")
            evaluation.params.iouThrs = np.array([IOU_THRESHOLD])
            evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, np.inf]], ["all"]
            evaluation.params.maxDets = [MAX_DETECTIONS]
            evaluation.evaluate()
            evaluation.accumulate()
        return float(evaluation.eval["precision"].mean())


def same_noun(first: str, second: str) -> bool:
    """
    Whether two phrases are the same noun: articles and quantities before it dropped, case and number folded.

    Example:
        >>> same_noun("The red cars", "a red car"), same_noun("a person", "two people"), same_noun("a car", "a truck")
        (True, True, False)
    """
    first, second = _bare(first), _bare(second)
    if not first or not second:
        return False
    return not {first, Noun(first).bare(2)}.isdisjoint({second, Noun(second).bare(2)})


def _bare(phrase: str) -> str:
    words = phrase.casefold().strip(" \t\n.,;:!?").split()
    while len(words) > 1 and words[0] in DETERMINERS:
        words = words[1:]
    return " ".join(words)


def _encode(mask: np.ndarray) -> dict[str, Any]:
    """Compressed RLE with its counts as bytes, as pycocotools works with it."""
    if mask.dtype != np.bool_ or mask.ndim != 2 or mask.size == 0:
        raise ValueError(f"expected bool masks of shape (H, W), got {mask.dtype} {mask.shape}")
    return mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))


def _greedy_pairs(ious: np.ndarray, allowed: np.ndarray) -> list[tuple[int, int]]:
    """One-to-one (row, column) pairs among the allowed ones, the highest IoU first."""
    rows, columns = np.nonzero(allowed)
    pairs: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for index in np.argsort(-ious[rows, columns], kind="stable"):
        row, column = int(rows[index]), int(columns[index])
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            pairs.append((row, column))
    return pairs
