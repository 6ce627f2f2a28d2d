"""From answers and ground-truth rows to the numbers of a benchmark; nothing of an image is kept but what its metric keeps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mglmm.evaluation.benchmarks import GENERATE, LISTED, Benchmark, ground_truth, phrase_of
from mglmm.evaluation.held_out import PhotosScorer
from mglmm.evaluation.label_names import ADE20K_LABELS, COCO_PANOPTIC_LABELS, LabelNames
from mglmm.evaluation.metrics.captioning import CaptioningScore
from mglmm.evaluation.metrics.generalized_referring_segmentation import GeneralizedReferringSegmentationScore
from mglmm.evaluation.metrics.panoptic_segmentation import PanopticSegmentationScore
from mglmm.evaluation.metrics.referring_segmentation import ReferringSegmentationScore, union
from mglmm.evaluation.metrics.region_captioning import RegionCaptioningScore
from mglmm.evaluation.metrics.segcap import SegCapScore
from mglmm.evaluation.predictions import Question
from mglmm.evaluation.sample import RECALLED, Numbers, Record, Row, Sample, masks_of, union_iou
from mglmm.evaluation.text_similarity import TextSimilarity
from mglmm.processing.rle import decode_mask

_PHRASE = re.compile(r"<p>(.*?)</p>")


class Scorer(Protocol):
    """How a family of benchmarks is scored."""

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        """
        Add an answer; `None` for one that the report does not show.

        Args:
            rows: The ground truth of `question.rows`, without pictures.
            record: Of `Predictions`.

        Raises:
            ValueError: masks of another size, or whatever else the metric refuses.
        """
        ...

    def compute(self) -> Numbers: ...


def make_scorer(name: str, benchmark: Benchmark, similarity: TextSimilarity) -> Scorer:
    """The scorer of a benchmark; `similarity` is for those that compare phrases."""
    match benchmark.family:
        case "photos":
            return PhotosScorer()
        case "referring":
            return ReferringScorer(benchmark)
        case "generalized":
            return GeneralizedScorer()
        case "segcap":
            return SegCapScorer(benchmark, similarity)
        case "captions":
            return CaptionScorer(CaptioningScore())
        case "regions":
            return CaptionScorer(RegionCaptioningScore())
        case "panoptic":
            return PanopticScorer(COCO_PANOPTIC_LABELS if name == "coco_panoptic" else ADE20K_LABELS)


class ReferringScorer:
    """Expressions with one target each: generated answers for `clean`, teacher forcing for the originals' numbers."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._clean = ReferringSegmentationScore()
        self._merged = ReferringSegmentationScore("mglmm", merge=True) if benchmark.answers_parity else None
        self._forced = {protocol: ReferringSegmentationScore() for protocol in benchmark.forced}
        self._originals = benchmark.forced

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        if question.protocol != GENERATE:
            ignored = rows[0]["ignore_mask"]
            targets = [row["masks"][0] for row in rows]
            self._forced[question.protocol].update(masks_of(record), targets, ignored)
            return None
        (row,) = rows
        masks = [decode_mask(mask) for mask in masks_of(record)]
        targets = [decode_mask(mask) for mask in row["masks"]]
        shape = (targets or masks or [np.zeros((1, 1), dtype=bool)])[0].shape
        target = union(targets, shape)
        if any(mask.shape != shape for mask in masks):
            raise ValueError(f"masks of {sorted({mask.shape for mask in masks})} in a picture of {shape}")
        self._clean.update([union(masks, shape)] if masks else [], [target], row["ignore_mask"])
        if self._merged is not None:
            self._merged.update(masks, [target], row["ignore_mask"])
        iou = self._clean.ious[-1]
        return Sample(iou, ((phrase_of(row), iou >= RECALLED),)) if targets else Sample(None)

    def compute(self) -> Numbers:
        numbers = Numbers()
        if self._clean.ious:
            numbers.clean = self._clean.compute()["clean"]
        if self._merged is not None and self._merged.ious:
            numbers.parity["mglmm"] = self._merged.compute()["parity"]
        for protocol, score in self._forced.items():
            for original in self._originals[protocol]:
                if score.ious:
                    numbers.parity[original] = {**score.compute()["parity"], "questions": len(score.ious)}
                else:
                    numbers.skipped[f"parity {original}"] = "no teacher-forced answer: these need the model"
        return numbers


class GeneralizedScorer:
    """Expressions with any number of targets, also none."""

    def __init__(self) -> None:
        self._score = GeneralizedReferringSegmentationScore()

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        (row,) = rows
        self._score.update(masks_of(record), row["masks"], str(question.row))
        if not row["masks"]:
            return Sample(None)
        iou = union_iou(masks_of(record), row["masks"])
        return Sample(iou, ((phrase_of(row), iou >= RECALLED),))

    def compute(self) -> Numbers:
        result = self._score.compute()
        return Numbers(result["clean"], {"mglmm": result["parity"]}, result["skipped"])


class SegCapScorer:
    """Descriptions whose phrases carry masks."""

    def __init__(self, benchmark: Benchmark, similarity: TextSimilarity) -> None:
        self._splits = benchmark.splits
        self._score = SegCapScore(similarity)
        # The originals cut phrases out of the text, whether or not a mask follows, and pair them with masks by number.
        self._printed = SegCapScore(similarity, original="mglmm")
        self._ids: set[str] = set()

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        (row,) = rows
        # Several descriptions of one image are samples of their own; ids rank equal scores in the originals' AP.
        name = question.image_id if question.image_id not in self._ids else f"{question.image_id}/{question.row}"
        self._ids.add(name)
        labels, captions = ground_truth(row)
        segments, split = record["segments"], self._splits.get(question.task)
        result = self._score.update(
            name,
            masks_of(record),
            [segment["phrase"] if segment["span"] else "" for segment in segments],
            [segment["score"] for segment in segments],
            row["masks"],
            labels,
            None if "error" in record else record["text"],
            captions,
            split,
        )
        phrases = [phrase.strip() for phrase in _PHRASE.findall(record["text"])]
        self._printed.update(name, masks_of(record), phrases, None, row["masks"], labels, split=split)
        found = {truth for truth, _ in result["clean"]["pairs"]}
        return Sample(
            result["clean"]["mIoU_gt"], tuple((label, number in found) for number, label in enumerate(labels))
        )

    def compute(self) -> Numbers:
        score, printed = self._score.compute(), self._printed.compute()
        numbers = Numbers(*_both(score, printed), score["skipped"], score["marked"])
        for split, of_split in score.get("splits", {}).items():
            numbers.clean[split], numbers.parity[split] = _both(of_split, printed["splits"][split])
        if "parity" in printed["marked"]:
            numbers.marked["parity"] = printed["marked"]["parity"]
        return numbers


def _both(score: Mapping[str, Any], printed: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`clean` and `parity`: the captions are in the first score only."""
    counts = {name: score[name] for name in ("images", "masks", "predicted_masks")}
    failures = {"original_failures": printed["original_failures"]}
    return {**score["clean"], **counts}, {**score["parity"], **printed["parity"], **failures}


class CaptionScorer:
    """Texts with references: of images all their captions, of regions the one of their row."""

    def __init__(self, score: CaptioningScore) -> None:
        self._score = score

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        texts = [row["messages"][-1]["content"] for row in rows]
        self._score.update(question.row, None if "error" in record else record["text"], texts)
        return Sample(None)

    def compute(self) -> Numbers:
        result = self._score.compute(per_image=True)
        each = {mode: result[mode].pop("per_image", {}) for mode in ("clean", "parity")}["clean"]
        values = {int(row): numbers["CIDEr"] for row, numbers in each.items() if "CIDEr" in numbers}
        return Numbers(
            {**result["clean"], "missing": result["missing"]},
            result["parity"],
            result["skipped"],
            result["marked"],
            values,
        )


class PanopticScorer:
    """A description of everything, whose phrases are taken for labels; the ground truth has one mask for each label."""

    def __init__(self, labels: Sequence[str]) -> None:
        categories = [{"id": index, "isthing": 0} for index in range(len(labels))]
        self._names = LabelNames(labels)
        self._unknown = len(labels)
        self._scores = {protocol: PanopticSegmentationScore(categories) for protocol in (GENERATE, LISTED)}
        self._used: set[str] = set()

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        truths = {}
        for number, row in zip(question.rows, rows, strict=True):
            label = self._names.find(phrase_of(row))
            if label is None:
                raise ValueError(f"the target of row {number}, {phrase_of(row)!r}, is no label of this benchmark")
            if label in truths:
                raise ValueError(f"row {number} is about the label {phrase_of(row)!r}, which another row has, too")
            truths[label] = row["masks"][0]
        if question.protocol == GENERATE:
            predictions = [
                {
                    "category_id": self._category(segment["phrase"]),
                    "segmentation": segment["mask"],
                    "score": segment["score"],
                }
                for segment in record["segments"]
            ]
        else:
            predictions = [
                {"category_id": label, "segmentation": mask}
                for label, mask in zip(truths, masks_of(record), strict=False)
            ]
        references = [{"category_id": label, "segmentation": mask} for label, mask in truths.items()]
        self._scores[question.protocol].update(predictions, references, f"{question.source}/{question.image_id}")
        self._used.add(question.protocol)
        if question.protocol != GENERATE:
            return None
        ious = {
            label: union_iou([p["segmentation"] for p in predictions if p["category_id"] == label], [mask])
            for label, mask in truths.items()
        }
        return Sample(
            float(np.mean(list(ious.values()))) if ious else None,
            tuple((phrase_of(row), iou >= RECALLED) for row, iou in zip(rows, ious.values(), strict=True)),
        )

    def _category(self, phrase: str) -> int:
        label = self._names.find(phrase)
        return self._unknown if label is None else label

    def compute(self) -> Numbers:
        numbers = Numbers()
        if GENERATE in self._used:
            result = self._scores[GENERATE].compute()
            numbers.clean = {name: value for name, value in result["clean"].items() if "_stuff" not in name}
            numbers.skipped = {
                name: why for name, why in result["skipped"].items() if name in ("PQ", "SQ", "RQ", "mIoU")
            }
            numbers.skipped["AP"] = "prepared rows do not tell instances nor things from stuff"
        if LISTED in self._used:
            result = self._scores[LISTED].compute()
            if result["parity"]:
                numbers.parity["mglmm"] = result["parity"]
            else:
                numbers.skipped["parity mglmm"] = result["skipped"]["parity"]
        return numbers
