"""Held-out photographs: referring, refusals, descriptions, by source."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mglmm.evaluation.benchmarks import phrase_of
from mglmm.evaluation.metrics.referring_segmentation import ReferringSegmentationScore, union
from mglmm.evaluation.metrics.segcap import SegCapScore
from mglmm.evaluation.predictions import Question
from mglmm.evaluation.sample import RECALLED, Numbers, Record, Row, Sample
from mglmm.evaluation.text_similarity import ExactSimilarity
from mglmm.processing import SegCap
from mglmm.processing.rle import decode_mask
from mglmm.processing.uscdf import parse

REFERRING = ("object", "part")
DESCRIPTIONS = ("panoptic", "fine")
# Scored together besides each source alone, by name.
GROUPS = {"fashion+cars": ("clothing-co-parsing", "Car-Parts-Segmentation")}


class PhotosScorer:
    """
    The scorer of the benchmark "photos". `compute().clean` holds, for the group "all", those of `GROUPS` that occur, and
    each source, a dict with

    - `rows`, `malformed`, `truncated`: counts; `well_formed`: share of the answers that keep to the grammar;
    - `object`, `part`: what `ReferringSegmentationScore` computes ("clean"); the prediction is the union of an answer's masks;
    - `refused`: share of the absent targets answered without any mask; `absent`: their number;
    - `false_refusals`: share of the present targets (object and part) answered without any mask;
    - `panoptic`, `fine`: what `SegCapScore` computes ("clean") against the masks and phrases of the reference description,
      with `images`, `masks`, `predicted_masks`; two phrases are the same if `same_noun` says so.

    What a group has no rows for is left out.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = defaultdict(_Group)

    def update(self, question: Question, rows: Sequence[Row], record: Record) -> Sample | None:
        (row,) = rows
        names = {"all", row["source"], *(name for name, sources in GROUPS.items() if row["source"] in sources)}
        reference = [decode_mask(mask) for mask in row["masks"]]
        # A question that failed has no picture to have the size of.
        size = {"image_size": row["masks"][0]["size"]} if "error" in record and row["masks"] else {}
        answer = SegCap.from_dict({**record, **size})
        samples = [self._groups[name].update(row, reference, record, answer) for name in names]
        return samples[0]

    def compute(self) -> Numbers:
        combined = [name for name in (*GROUPS, "all") if name in self._groups]
        names = (*combined, *sorted(self._groups.keys() - set(combined)))
        return Numbers(
            {name: self._groups[name].compute() for name in names}, marked={"text_similarity": ExactSimilarity().name}
        )


class _Group:
    """Scores of the rows of one group."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.referring = {task: ReferringSegmentationScore() for task in REFERRING}
        self.descriptions = {task: SegCapScore(ExactSimilarity()) for task in DESCRIPTIONS}

    def update(self, row: Row, reference: list[np.ndarray], prediction: Record, answer: SegCap) -> Sample:
        task = row["task"]
        self.counts.update([task, "rows"])
        self.counts["malformed"] += not prediction["well_formed"]
        self.counts["truncated"] += prediction["truncated"]
        if task in DESCRIPTIONS:
            labels = [mention.phrase for mention in parse(row["messages"][-1]["content"]).mentions]
            result = self.descriptions[task].update(
                prediction["row"],
                [segment.mask for segment in answer.segments],
                [segment.phrase if segment.span else "" for segment in answer.segments],
                [segment.score for segment in answer.segments],
                reference,
                labels,
            )
            found = {truth for truth, _ in result["clean"]["pairs"]}
            return Sample(
                result["clean"]["mIoU_gt"], tuple((label, number in found) for number, label in enumerate(labels))
            )
        if not answer.segments:
            self.counts["refused" if task == "absent" else "false refusals"] += 1
        if task not in REFERRING:
            return Sample(None)
        score, shape = self.referring[task], answer.image_size
        masks = [segment.mask for segment in answer.segments]
        if any(mask.shape != shape for mask in (*masks, *reference)):
            shapes = sorted({mask.shape for mask in (*masks, *reference)})
            raise ValueError(f"masks of the sizes {shapes} in a picture of {shape}")
        score.update([union(masks, shape)], [union(reference, shape)])
        return Sample(score.ious[-1], ((phrase_of(row), score.ious[-1] >= RECALLED),))

    def compute(self) -> dict[str, Any]:
        counts = self.counts
        result: dict[str, Any] = {name: counts[name] for name in ("rows", "malformed", "truncated")}
        result["well_formed"] = 1 - counts["malformed"] / counts["rows"]
        result |= {task: value.compute()["clean"] for task, value in self.referring.items() if counts[task]}
        present = sum(counts[task] for task in REFERRING)
        if counts["absent"]:
            result |= {"absent": counts["absent"], "refused": counts["refused"] / counts["absent"]}
        if present:
            result["false_refusals"] = counts["false refusals"] / present
        for task in DESCRIPTIONS:
            if counts[task]:
                described = self.descriptions[task].compute()
                sizes = {name: described[name] for name in ("images", "masks", "predicted_masks")}
                result[task] = {
                    **described["clean"],
                    **sizes,
                    "text_similarity": described["marked"]["text_similarity"],
                }
        return result


def table(groups: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The groups of `PhotosScorer` as cells, one column for each group under a header."""
    lines: list[list[str]] = [["", *groups]]

    def add(title: str, style: str, *path: str) -> None:
        cells = []
        for group in groups.values():
            value: Any = group
            for key in path:
                value = value.get(key, {})
            cells.append("–" if value == {} else format(value, style))
        if set(cells) != {"–"}:
            lines.append([title, *cells])

    add("rows", ",d", "rows")
    for task in REFERRING:
        add(f"{task} gIoU", ".3f", task, "gIoU")
        add(f"{task} cIoU", ".3f", task, "cIoU")
        add(f"{task} P@0.5", ".1%", task, "P@0.5")
    add("absent targets refused", ".1%", "refused")
    add("present targets refused", ".1%", "false_refusals")
    add("well-formed answers", ".1%", "well_formed")
    add("answers cut at the length limit", ",d", "truncated")
    for task in DESCRIPTIONS:
        add(f"{task} mask recall (exact noun)", ".3f", task, "mask_recall")
        add(f"{task} AP50", ".3f", task, "AP50")
        add(f"{task} mIoU over ground truth", ".3f", task, "mIoU_gt")
    return lines
