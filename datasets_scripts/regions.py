"""Text of boxes -> USCDF rows of the task region: each `<region>` of a question stands for one box.

Layouts, below the data folder or in the sub-folder that GLaMM gives them; all files are COCO-style JSON with `images`
(`id`, `file_name`, `height`, `width`) and `annotations` (`image_id`, `bbox` as xywh):

- Visual Genome: `visual_genome/train.json` and `test_caption.json`, with `caption` in the annotations; `images/`.
- RefCOCO, RefCOCO+, RefCOCOg: `mdetr_annotations/finetune_{refcoco,refcoco+,refcocog}_{train,val,...}.json`, where an
  `images` entry is one expression (`caption`) for one annotation; `finetune_refcocog_val_captions.json` with `caption` in
  the annotations; images of COCO train2014.
- Flickr30k Entities: `flickr_30k/mdetr_annotations/final_flickr_mergedGT_{train,val,test}.json`, where an `images` entry
  is one sentence (`caption`), and an annotation has `tokens_positive` `[[start, end], ...]`; `images/`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from mglmm.processing.uscdf import REGION_TOKEN

from . import phrase_templates
from .builder import Row, make_row, reason_of
from .conversations import Turn, listed
from .layouts import FLICKR_IMAGES, SplitPatterns, SplitTables, coco_images, flickr_annotations
from .phrases import clean, clean_caption
from .sources import JsonTables, check_image_size, displayed_size, inside
from .templates import choose, loosen

Box = tuple[float, float, float, float]
MAX_BOXES = 10  # of a row
MIN_SIDE = 32  # of an image, in pixels
EXPRESSION_QUESTIONS: tuple[str, ...] = (
    "Give a short expression that tells <region> apart from the rest of the picture.",
    "How would you refer to <region> in a few words?",
    "Which short phrase points at <region> and at nothing else here?",
    "Name <region> so that somebody else finds it.",
    "Write a referring expression for <region>.",
    "In a few words, which thing is <region>?",
    "I want to point at <region>. What should I say?",
    "What do I call <region> to pick it out of this image?",
)


def clip_box(bbox: Sequence[float], height: int, width: int) -> Box:
    """
    xywh -> xyxy within the image.

    Raises `ValueError` if it is no box, has no pixel in the image, or a side of less than one pixel.
    """
    if len(bbox) != 4 or not all(isinstance(value, int | float) and math.isfinite(value) for value in bbox):
        raise ValueError("box is not four numbers")
    x, y, w, h = map(float, bbox)
    if w < 1 or h < 1:
        raise ValueError("box below one pixel")
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if right <= left or bottom <= top:
        raise ValueError("box outside the image")
    if right - left < 1 or bottom - top < 1:
        raise ValueError("box below one pixel")
    return left, top, right, bottom


def checked_size(path: Path, image: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) of the image on disk, to which the boxes must belong."""
    size = displayed_size(path)
    if "height" in image:
        check_image_size(path, int(image["height"]), int(image["width"]))
    if min(size) < MIN_SIDE:
        raise ValueError(f"image side below {MIN_SIDE} pixels")
    return size


def region_turn(
    rng: Random, box: Box, text: str, questions: tuple[str, ...] = phrase_templates.REGION_QUESTIONS
) -> Turn:
    return Turn(loosen(rng, choose(rng, questions)), text, regions=(box,))


class RegionBuilder(SplitTables):
    """
    One question for each box. All boxes of an image are used, up to `MAX_BOXES` in a row of train and one in a row of the
    other splits; boxes with several texts come back in another row.
    """

    # By file name, because many files have one entry per expression or box of an image.
    TABLES = {"images": ("images.item", "file_name"), "annotations": ("annotations.item", "image_id")}
    QUESTIONS: tuple[str, ...] = phrase_templates.REGION_QUESTIONS

    def rows(self, item: Any) -> Iterator[Row]:
        split, name = item
        tables, folder = self._sources[split]
        path = inside(folder, name)
        entries = tables.get("images", name)
        size = checked_size(path, entries[0])
        texts = self._texts(tables, entries, size)
        if not texts:
            raise ValueError("image without a usable region")
        train = split == "train"
        for variant in range(self.config.variants if train else 1):
            rng = self.generator(self.SOURCE, split, name, variant)
            for group in group_regions(rng, texts, MAX_BOXES if train else 1):
                turns = [region_turn(rng, box, text, self.QUESTIONS) for box, text in group]
                yield make_row(path, path.stem, self.SOURCE, "region", turns, size=size)

    def _texts(
        self, tables: JsonTables, entries: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> dict[Box, list[str]]:
        texts: dict[Box, list[str]] = defaultdict(list)
        for entry in entries:
            for annotation in tables.get("annotations", entry["id"]):
                try:
                    box = clip_box(annotation["bbox"], *size)
                    text = clean(annotation["caption"] if "caption" in annotation else entry["caption"])
                    if not text:
                        raise ValueError("region without a text")
                except (KeyError, TypeError, ValueError) as error:
                    self.skipped[reason_of(error)] += 1
                    continue
                if text not in texts[box]:
                    texts[box].append(text)
        return texts


def group_regions(rng: Random, texts: Mapping[Box, Sequence[str]], per_row: int) -> Iterator[list[tuple[Box, str]]]:
    """All (box, text) in random order, in groups in which no box comes twice."""
    order = {box: rng.sample(list(texts[box]), len(texts[box])) for box in rng.sample(list(texts), len(texts))}
    for turn in range(max(map(len, order.values()))):
        left = [(box, of_box[turn]) for box, of_box in order.items() if turn < len(of_box)]
        for start in range(0, len(left), per_row):
            yield left[start : start + per_row]


class VisualGenomeRegions(RegionBuilder):
    SOURCE = "visual_genome_regions"
    LICENSE = "cc-by-4.0"
    SPLITS = {
        split: ((f"visual_genome/{name}.json", f"{name}.json"), ("visual_genome/images", "images"))
        for split, name in (("train", "train"), ("test", "test_caption"))
    }


def _mdetr_splits(dataset: str, **splits: tuple[str, ...]) -> SplitPatterns:
    roots = ("", "mdetr_annotations/", "RefCoco_Reg/mdetr_annotations/", "*/mdetr_annotations/")
    return {
        split: (
            tuple(f"{root}finetune_{dataset}_{name}.json" for name in names for root in roots),
            coco_images("train2014"),
        )
        for split, names in splits.items()
    }


class RefcocogRegions(RegionBuilder):
    SOURCE = "refcocog_regions"
    LICENSE = "cc-by-4.0 (annotations), Flickr terms of use (images)"
    SPLITS = _mdetr_splits("refcocog", train=("train",), validation=("val_captions", "val"), test=("test",))


class RefcocoRegions(RegionBuilder):
    """Unlike the published code, which reads the training file for validation too, each split has a file of its own."""

    SOURCE = "refcoco_regions"
    LICENSE = "research (annotations), Flickr terms of use (images)"
    QUESTIONS = EXPRESSION_QUESTIONS
    SPLITS = _mdetr_splits("refcoco", train=("train",), validation=("val",), testA=("testA",), testB=("testB",))


class RefcocoPlusRegions(RefcocoRegions):
    SOURCE = "refcoco+_regions"
    SPLITS = _mdetr_splits("refcoco+", train=("train",), validation=("val",), testA=("testA",), testB=("testB",))


class Flickr30kEntities(SplitTables):
    """A sentence about all of its boxes in one question, then the phrase of each box; in train as one conversation."""

    SOURCE = "flickr30k_entities"
    LICENSE = "non-commercial research (annotations), Flickr terms of use (images)"
    SPLITS = {
        split: (flickr_annotations(part), FLICKR_IMAGES)
        for split, part in (("train", "train"), ("validation", "val"), ("test", "test"))
    }

    def rows(self, item: Any) -> Iterator[Row]:
        split, key = item
        tables, folder = self._sources[split]
        image = tables.one("images", key)
        path = inside(folder, image["file_name"])
        size = checked_size(path, image)
        sentence = clean_caption(image["caption"])
        regions: list[tuple[Box, str]] = []
        for annotation in tables.get("annotations", key):
            try:
                regions.append((clip_box(annotation["bbox"], *size), _phrase(image["caption"], annotation)))
            except (KeyError, TypeError, IndexError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
        if not regions:
            raise ValueError("image without a usable region")
        for variant in range(self.config.variants if split == "train" else 1):
            rng = self.generator(self.SOURCE, split, key, variant)
            # The same boxes for the sentence and for the phrases.
            chosen = rng.sample(regions, min(len(regions), MAX_BOXES))
            turns = [region_turn(rng, box, phrase) for box, phrase in chosen]
            if len(chosen) > 1:
                question = choose(rng, phrase_templates.REGIONS_QUESTIONS).format(
                    x=listed([REGION_TOKEN] * len(chosen))
                )
                turns.insert(0, Turn(loosen(rng, question), sentence, regions=tuple(box for box, _ in chosen)))
            for group in [turns] if split == "train" else [[turn] for turn in turns]:
                yield make_row(path, path.stem, self.SOURCE, "region", group, size=size)


def _phrase(caption: str, annotation: Mapping[str, Any]) -> str:
    """What the first span of an annotation says."""
    start, end = annotation["tokens_positive"][0]
    phrase = clean(caption[start:end]) if 0 <= start < end <= len(caption) else ""
    if not phrase:
        raise ValueError("phrase outside its caption")
    return phrase
