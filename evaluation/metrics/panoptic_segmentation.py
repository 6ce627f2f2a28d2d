"""Panoptic segmentation: PQ, SQ, RQ, mIoU and mask AP."""

from __future__ import annotations

import contextlib
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import evaluate
import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mglmm.evaluation.metrics.referring_segmentation import MASK_FEATURE, check_new, check_shapes, read_prediction


class PanopticSegmentationScore:
    """
    PQ, SQ, RQ, mIoU and AP of segments with categories.

    `clean`:
    - `PQ`, `SQ`, `RQ`: panoptic quality (Kirillov et al., "Panoptic Segmentation", 2019, section 4.1). A predicted and a
      true segment of one category match if their IoU exceeds 1/2, the void pixels of the ground truth (those of no
      segment) left out of the union. Of a category: PQ = sum of the matches' IoU / (TP + FP / 2 + FN / 2), SQ = their mean
      IoU, RQ = TP / (TP + FP / 2 + FN / 2); mean over the categories that occur. An unmatched prediction that lies by more
      than a half on void, or on a crowd of its category, is no FP; a crowd matches nothing and is no FN.
      `..._things`, `..._stuff`: over these categories alone.
    - Where predictions overlap, the higher score has the pixel, at equal scores the earlier prediction; what nobody has
      is void. Segments of one category of stuff are one, as in COCO's format.
    - `mIoU`: of the categories, over all images, without void; mean over those that the ground truth has.
    - `AP`: COCO's mask AP (0.5:0.95) of the things, of the masks as predicted, with overlaps.
    - `images`, `missing` (images without prediction; their segments count as missed), `unknown_categories` (predictions whose
      category is not in the list: they are left out).

    `parity`: `PQ`, `SQ`, `RQ`, `mIoU` as MGLMM's script prints them. All masks of a category are one segment and stuff;
    pixels without prediction are the first category ("person" in COCO's order); later masks overwrite earlier ones; images
    without prediction are left out; mIoU divides by the number of categories in ground truth or prediction. There is none
    where the script stops, at an unknown category.

    What the data cannot tell stands in `skipped`.

    Args:
        categories: As in COCO's panoptic files: `{"id": int, "isthing": 0 or 1}` each, in the order of the benchmark.
    """

    def __init__(self, categories: Iterable[Mapping[str, Any]]) -> None:
        self.is_thing = {int(category["id"]): bool(category["isthing"]) for category in categories}
        if not self.is_thing:
            raise ValueError("there are no categories")
        self._clean, self._printed = _Counts(), _Counts()
        self._printed_stop: str | None = None
        self._missing = 0
        self._unknown = 0
        self._images: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        self._references: list[dict[str, Any]] = []  # of things, for AP
        self._detections: list[dict[str, Any]] = []

    def update(
        self,
        predictions: Sequence[Mapping[str, Any]],
        references: Sequence[Mapping[str, Any]],
        image_id: str | None = None,
    ) -> None:
        """
        Add an image. Nothing is added when an error is raised.

        Args:
            predictions: `{"category_id": int, "segmentation": bool (H, W) or COCO RLE, "score": float}` each, the score 1 by
                default. None: nothing was predicted.
            references: `{"category_id": int, "segmentation": bool (H, W) or COCO RLE, "iscrowd": 0 or 1}` each, a crowd being
                0 by default. Every pixel belongs to at most one, those of none are void.
            image_id: To find out about an image that comes twice.

        Raises:
            ValueError: sizes differ, true segments overlap or have an unknown category, a score is not finite, or the image
                comes twice.
        """
        name = f"image {image_id!r}" if image_id is not None else f"image {len(self._images)}"
        masks, truths = (
            [read_prediction(segment["segmentation"]) for segment in each] for each in (predictions, references)
        )
        shape = check_shapes([*masks, *truths])
        scores = [float(segment.get("score", 1.0)) for segment in predictions]
        if not np.isfinite(scores).all():
            raise ValueError(f"scores must be finite to rank masks, got {scores} in {name}")
        foreign = {segment["category_id"] for segment in references} - self.is_thing.keys()
        if foreign:
            raise ValueError(f"{name} has segments of the categories {sorted(foreign)}, which are not in the list")
        truth = _canvas(truths, shape)
        if sum(np.count_nonzero(mask) for mask in truths) > np.count_nonzero(truth):
            raise ValueError(f"true segments of {name} overlap: a panoptic ground truth gives a pixel one segment")
        check_new(image_id, self._ids)
        labels = [int(segment["category_id"]) for segment in predictions]
        known = [index for index, label in enumerate(labels) if label in self.is_thing]
        true_labels = [int(segment["category_id"]) for segment in references]
        crowds = [bool(segment.get("iscrowd", 0)) for segment in references]

        self._add_printed(name, masks, labels, truth, true_labels)
        ranked = sorted(known, key=lambda index: (scores[index], -index))  # the last painted has the pixel
        painted = _canvas([masks[index] for index in ranked], shape)
        segments = [(labels[index], False) for index in ranked]
        self._clean.add(
            *self._join_stuff(painted, segments),
            *self._join_stuff(truth, list(zip(true_labels, crowds, strict=True))),
        )

        self._missing += not predictions
        self._unknown += len(labels) - len(known)
        self._images.append({"id": len(self._images) + 1, "height": shape[0], "width": shape[1]})
        for segment, label, score in zip(predictions, labels, scores, strict=True):
            if self.is_thing.get(label):
                self._detections.append({**self._annotation(segment, label), "score": score})
        for segment, mask, label, crowd in zip(references, truths, true_labels, crowds, strict=True):
            if self.is_thing[label]:
                # COCOeval takes an id of 0 for "unmatched"
                more = {"id": len(self._references) + 1, "iscrowd": int(crowd), "area": int(np.count_nonzero(mask))}
                self._references.append({**self._annotation(segment, label), **more})

    def _annotation(self, segment: Mapping[str, Any], label: int) -> dict[str, Any]:
        mask = segment["segmentation"]
        if isinstance(mask, np.ndarray):
            mask = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
        return {"image_id": len(self._images), "category_id": label, "segmentation": dict(mask)}

    def _join_stuff(
        self, canvas: np.ndarray, segments: Sequence[tuple[int, bool]]
    ) -> tuple[np.ndarray, list[tuple[int, bool]]]:
        """Renumber the (category, crowd) segments of a canvas so that those of one category of stuff are one."""
        joined: list[tuple[int, bool]] = []
        numbers = [0]
        for segment in segments:
            if self.is_thing[segment[0]] or segment not in joined:
                joined.append(segment)
                numbers.append(len(joined))
            else:
                numbers.append(joined.index(segment) + 1)
        return canvas if len(joined) == len(segments) else np.array(numbers, dtype=np.int32)[canvas], joined

    def _add_printed(
        self, name: str, masks: list[np.ndarray], labels: list[int], truth: np.ndarray, true_labels: list[int]
    ) -> None:
        if not labels or self._printed_stop:
            return
        order = list(self.is_thing)
        position = {label: index for index, label in enumerate(order)}
        if any(label not in position for label in labels):
            self._printed_stop = f"MGLMM's script stops at a category that is not in the list ({name})"
            return
        canvas = _canvas(masks, truth.shape, [position[label] + 1 for label in labels], default=1)
        by_category = np.array([0, *(position[label] + 1 for label in true_labels)], dtype=np.int32)[truth]
        segments = [(label, False) for label in order]
        self._printed.add(canvas, segments, by_category, segments)

    def compute(self) -> dict[str, dict[str, Any]]:
        """`{"parity", "clean", "skipped"}`; fractions and counts. Raises `ValueError` without any image."""
        if not self._images:
            raise ValueError("there is no image to score: call update first")
        clean: dict[str, float] = {}
        skipped: dict[str, str] = {}
        for suffix, wanted in (("", (True, False)), ("_things", (True,)), ("_stuff", (False,))):
            quality = self._clean.quality([label for label, thing in self.is_thing.items() if thing in wanted])
            clean |= {f"{key}{suffix}": value for key, value in quality.items()}
            if not quality:
                skipped |= dict.fromkeys((f"{key}{suffix}" for key in ("PQ", "SQ", "RQ")), "no such segment occurs")
        _, true, _ = self._clean.pixels(self.is_thing)
        if true.any():
            clean["mIoU"] = self._clean.sum_of_ious(self.is_thing) / np.count_nonzero(true)
        else:
            skipped["mIoU"] = "the ground truth has no segment"
        precision = self._average_precision()
        if precision is None:
            skipped["AP"] = "the ground truth has no thing (or crowds alone)"
        else:
            clean["AP"] = precision
        clean |= {
            "images": len(self._images),
            "missing": self._missing,
            "unknown_categories": self._unknown,
        }
        parity: dict[str, float] = {}
        if self._printed_stop:
            skipped["parity"] = self._printed_stop
        else:
            parity = self._printed.quality(self.is_thing)
            _, true, predicted = self._printed.pixels(self.is_thing)
            if occurring := np.count_nonzero(true + predicted):
                parity["mIoU"] = self._printed.sum_of_ious(self.is_thing) / occurring
            if not parity:
                skipped["parity"] = "no image has both predictions and a ground truth"
        return {"parity": parity, "clean": clean, "skipped": skipped}

    def _average_precision(self) -> float | None:
        if not any(not annotation["iscrowd"] for annotation in self._references):
            return None
        if not self._detections:  # COCO.loadRes cannot take an empty list
            return 0.0
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            reference = COCO()
            reference.dataset = {
                "images": self._images,
                "categories": [{"id": label} for label, thing in self.is_thing.items() if thing],
                "annotations": self._references,
            }
            reference.createIndex()
            evaluation = COCOeval(reference, reference.loadRes(self._detections), "segm")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(evaluation.stats[0])


@dataclass
class _Counts:
    """Sums by category: matches and their IoU, misses, false alarms, and pixels."""

    ious: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    missed: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    false: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    common: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # pixels in both
    true: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    predicted: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def add(
        self,
        painted: np.ndarray,
        segments: Sequence[tuple[int, bool]],
        truth: np.ndarray,
        true_segments: Sequence[tuple[int, bool]],
    ) -> None:
        """Add an image: canvases of segment numbers from 1 (0 is void), (category, crowd) of each number."""
        size = (len(segments) + 1, len(true_segments) + 1)
        table = np.bincount((painted * np.int32(size[1]) + truth).ravel(), minlength=size[0] * size[1]).reshape(size)
        areas, true_areas = table.sum(axis=1).tolist(), table.sum(axis=0).tolist()
        void = table[:, 0].tolist()
        matched, found = set(), set()
        excused = list(void)  # pixels of a prediction on void and on crowds of its category
        for p, t in (np.argwhere(table[1:, 1:]) + 1).tolist():
            (label, _), (true_label, crowd) = segments[p - 1], true_segments[t - 1]
            if label != true_label:
                continue
            common = int(table[p, t])
            self.common[label] += common
            if crowd:
                excused[p] += common
                continue
            iou = common / (areas[p] + true_areas[t] - common - void[p])
            if iou > 0.5:  # above a half a segment has at most one partner
                self.ious[label].append(iou)
                matched.add(p)
                found.add(t)
        for t, (label, crowd) in enumerate(true_segments, start=1):
            self.true[label] += true_areas[t]
            if true_areas[t] and t not in found and not crowd:
                self.missed[label] += 1
        for p, (label, _) in enumerate(segments, start=1):
            self.predicted[label] += areas[p] - void[p]
            if areas[p] and p not in matched and excused[p] / areas[p] <= 0.5:
                self.false[label] += 1

    def quality(self, labels: Iterable[int]) -> dict[str, float]:
        """`{"PQ", "SQ", "RQ"}` over the categories that occur; empty if none does."""
        rows = []
        for label in labels:
            matches, half = len(self.ious[label]), (self.missed[label] + self.false[label]) / 2
            if matches + half:
                total = math.fsum(self.ious[label])
                rows.append((total / (matches + half), total / matches if matches else 0.0, matches / (matches + half)))
        if not rows:
            return {}
        return dict(
            zip(("PQ", "SQ", "RQ"), (math.fsum(column) / len(rows) for column in zip(*rows, strict=True)), strict=True)
        )

    def pixels(self, labels: Iterable[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pixels in both, of the ground truth and of the prediction, `(categories,)` each."""
        counts = np.array(
            [(self.common[each], self.true[each], self.predicted[each]) for each in labels], dtype=np.int64
        )
        return counts[:, 0], counts[:, 1], counts[:, 2]

    def sum_of_ious(self, labels: Iterable[int]) -> float:
        """Sum of the IoUs of the categories that the ground truth has."""
        common, true, predicted = self.pixels(labels)
        there = true > 0
        return math.fsum(common[there] / (true + predicted - common)[there])


def _canvas(
    masks: Sequence[np.ndarray], shape: tuple[int, ...], numbers: Sequence[int] | None = None, default: int = 0
) -> np.ndarray:
    """int32 `(H, W)`: the number (by default from 1 on) of the mask that has a pixel, of the last one if several do."""
    canvas = np.full(shape, default, dtype=np.int32)
    for number, mask in zip(numbers or range(1, len(masks) + 1), masks, strict=True):
        np.copyto(canvas, np.int32(number), where=mask)
    return canvas


class PanopticSegmentation(evaluate.Metric):
    """`PanopticSegmentationScore` for `evaluate`: a row is an image, its segments in COCO's form."""

    def _info(self) -> evaluate.MetricInfo:
        segment = {"category_id": datasets.Value("int32"), "segmentation": MASK_FEATURE}
        return evaluate.MetricInfo(
            description=PanopticSegmentationScore.__doc__,
            citation="Kirillov et al.: Panoptic Segmentation. CVPR 2019",
            inputs_description="""
    predictions: For each image its segments, {"category_id", "segmentation" (COCO RLE), "score"}.
    references: For each image its segments, {"category_id", "segmentation" (COCO RLE), "iscrowd"}.
    categories: [{"id", "isthing"}, ...] in the order of the benchmark.
    image_ids: Optional; for each image its id.
""",
            features=datasets.Features(
                {
                    "predictions": datasets.List({**segment, "score": datasets.Value("float64")}),
                    "references": datasets.List({**segment, "iscrowd": datasets.Value("int8")}),
                }
            ),
        )

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        categories: Sequence[Mapping[str, Any]],
        image_ids: Sequence[str] | None = None,
    ) -> dict[str, dict[str, Any]]:
        score = PanopticSegmentationScore(categories)
        names: Sequence[Any] = image_ids or [None] * len(predictions)
        for row in zip(predictions, references, names, strict=True):
            score.update(*row)
        return score.compute()
