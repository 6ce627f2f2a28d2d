"""Grounded captions of GranD-f, in its four parts -> USCDF rows of the task grounded_caption.

Layout of the data folder: the JSON files in `GranDf/annotations/train/` (or as in the Hub repository, in `train/`) and the
images where LISA, GLaMM and MGLMM put them.

- human annotated, `GranDf_HA_GCG_train.json`, and OpenPSG, `OpenPsgGCG_{train,val}.json`: a list of `file_name`, `height`,
  `width`, `caption`, `groundings`: phrase -> `token_positives` `[start, end]`, `rle_masks`.
- Flickr30k, `flickr_mergedGT_GCG_{train,val}.json`: `images` (`id`, `file_name`, `height`, `width`, `caption`: one entry
  per sentence) and `annotations` (`image_id`, `tokens_positive` `[[start, end], ...]`, `sam_mask`, `ignore`).
- RefCOCOg, `RefCOCOg_GCG_{train,val}.json`: a list of objects with one name each, whose value holds `img_file_name`,
  `caption` and `refs` (`sentence`, `segmentation` polygons).

The ground truth of the evaluation, `gcg_ground_truth.py`, lies in `val_test/` beside `train/`, its images in
`GranDf_HA_images/val_test/`. It has splits `validation` and `test`, in the human annotated part.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import phrase_templates
from .builder import Row, make_row, reason_of
from .conversations import Turn
from .gcg_ground_truth import CAPTIONS, GroundTruth
from .layouts import FLICKR_IMAGES, SplitTables, coco_images, split_sources
from .masks import rle_of, union
from .phrases import Rle, Span, grounded, unquote
from .sources import JsonTables, check_image_size, displayed_size, inside
from .templates import choose, loosen

MIN_SIDE = 32  # of an image, in pixels
MIN_WORDS = 3  # of a caption of Flickr30k
MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)


def grandf_file(name: str) -> tuple[str, ...]:
    return tuple(f"{folder}{name}" for folder in ("", "*/", "annotations/*/", "GranDf/*/", "GranDf/annotations/*/"))


@dataclass(frozen=True)
class GroundedCaption:
    """A caption of an image and the spans of it that carry masks."""

    path: Path
    size: tuple[int, int]
    text: str
    spans: Sequence[Span]


class GroundedCaptionBuilder(SplitTables):
    """A subclass defines where its files lie, what to keep of them (`TABLES`, the first being the items) and `caption`."""

    LICENSE = "apache-2.0 (annotations), terms of use of the images' sources"
    TABLES = {"entries": ("item", "")}

    def caption(self, tables: JsonTables, folder: Path, key: Any) -> GroundedCaption:
        raise NotImplementedError

    def rows(self, item: Any) -> Iterator[Row]:
        split, key = item
        caption = self.caption(*self._sources[split], key)
        if min(caption.size) < MIN_SIDE:
            raise ValueError(f"image side below {MIN_SIDE} pixels")
        spans = merge_spans(caption.spans)
        answer, masks = grounded(caption.text, spans)
        if not masks:
            raise ValueError("caption without a grounded phrase")
        if len(masks) < len(spans):
            self.skipped["phrase that overlaps a longer one"] += len(spans) - len(masks)
        for variant in range(self.config.variants if split == "train" else 1):
            rng = self.generator(self.SOURCE, split, key, variant)
            turn = Turn(loosen(rng, choose(rng, phrase_templates.GROUNDED_CAPTION_QUESTIONS)), answer, masks)
            yield make_row(caption.path, caption.path.stem, self.SOURCE, "grounded_caption", [turn], size=caption.size)


class PhraseKeyedCaptions(GroundedCaptionBuilder):
    """
    The layout that the human annotated part and OpenPSG share. Offsets are believed only where the caption says the phrase:
    those of some captions count the quote or blanks before it, those of others do not, and some are simply wrong.
    """

    def image(self, folder: Path, name: str) -> Path:
        return inside(folder, name)

    def caption(self, tables: JsonTables, folder: Path, key: Any) -> GroundedCaption:
        entry = tables.one("entries", key)
        path = self.image(folder, entry["file_name"])
        height, width = size = int(entry["height"]), int(entry["width"])
        check_image_size(path, height, width)
        raw = entry["caption"]
        text = unquote(raw)
        lead = raw.find(text)
        spans = []
        for phrase, grounding in entry["groundings"].items():
            try:
                start, end = read_offsets(grounding["token_positives"])
                found = locate(text, phrase, ((start, end), (start - lead, end - lead)))
                spans.append(Span(*found, rle_of(grounding["rle_masks"], height, width)))
            except MALFORMED as error:
                self.skipped[reason_of(error)] += 1
        return GroundedCaption(path, size, text, spans)


def human_images(name: str) -> tuple[str, ...]:
    return (f"GranDf/GranDf_HA_images/{name}", f"GranDf_HA_images/{name}", f"images/{name}", "images")


class GrandfHuman(PhraseKeyedCaptions):
    """Its validation and test are the ground truth of GranD-f's evaluation, with the images of every part."""

    SOURCE = "grandf_human"
    SPLITS = {
        "train": (grandf_file("GranDf_HA_GCG_train.json"), human_images("train")),
        **{split: (grandf_file(name), human_images("val_test")) for split, name in CAPTIONS.items()},
    }

    def items(self) -> dict[str, Sequence[Any]]:
        self._sources: dict[str, tuple[JsonTables, Path]] = {}
        self._truths: dict[str, GroundTruth] = {}
        items: dict[str, Sequence[Any]] = {}
        for split, (file, folder) in split_sources(self, self.SPLITS).items():
            if split in CAPTIONS:
                self._truths[split] = GroundTruth(self, file, folder)
                keys = self._truths[split].keys()
            else:
                tables = self.tables(file, **self.TABLES)
                self._sources[split] = tables, folder
                keys = tables.keys("entries")
            items[split] = [(split, key) for key in keys]
        return items

    def rows(self, item: Any) -> Iterator[Row]:
        split, key = item
        if split not in CAPTIONS:
            yield from super().rows(item)
            return
        rng = self.generator(self.SOURCE, split, key, 0)
        question = loosen(rng, choose(rng, phrase_templates.GROUNDED_CAPTION_QUESTIONS))
        path, size, turns = self._truths[split].read(key, question)
        yield make_row(path, key, self.SOURCE, "grounded_caption", turns, size=size)


class GrandfOpenPsg(PhraseKeyedCaptions):
    SOURCE = "grandf_openpsg"
    # Images of either split may come from either COCO folder, which the file name says.
    SPLITS = {
        split: (grandf_file(f"OpenPsgGCG_{name}.json"), coco_images("train2017") + coco_images("val2017"))
        for split, name in (("train", "train"), ("validation", "val"))
    }

    def image(self, folder: Path, name: str) -> Path:
        return inside(folder.parent, name) if "/" in name else inside(folder, name)


class GrandfFlickr30k(GroundedCaptionBuilder):
    """Boxes of one phrase are one mask: the phrase means all of them."""

    SOURCE = "grandf_flickr30k"
    TABLES = {"images": ("images.item", "id"), "annotations": ("annotations.item", "image_id")}
    SPLITS = {
        split: (grandf_file(f"flickr_mergedGT_GCG_{name}.json"), FLICKR_IMAGES)
        for split, name in (("train", "train"), ("validation", "val"))
    }

    def caption(self, tables: JsonTables, folder: Path, key: Any) -> GroundedCaption:
        image = tables.one("images", key)
        path = inside(folder, image["file_name"])
        height, width = size = int(image["height"]), int(image["width"])
        check_image_size(path, height, width)
        text = image["caption"]
        if len(text.split()) < MIN_WORDS:
            raise ValueError(f"caption of fewer than {MIN_WORDS} words")
        spans = []
        for annotation in tables.get("annotations", key):
            if annotation.get("ignore"):
                self.skipped["phrase marked as ignored"] += 1
                continue
            try:
                start, end = read_offsets(annotation["tokens_positive"][0])
                if not 0 <= start < end <= len(text) or not re.search(r"\w", text[start:end]):
                    raise ValueError("phrase outside its caption")
                spans.append(Span(start, end, rle_of(annotation["sam_mask"], height, width)))
            except MALFORMED as error:
                self.skipped[reason_of(error)] += 1
        return GroundedCaption(path, size, text, spans)


class GrandfRefcocog(GroundedCaptionBuilder):
    """No offsets are given: a phrase is where its words stand, whatever their case."""

    SOURCE = "grandf_refcocog"
    SPLITS = {
        split: (grandf_file(f"RefCOCOg_GCG_{name}.json"), coco_images("train2014"))
        for split, name in (("train", "train"), ("validation", "val"))
    }

    def caption(self, tables: JsonTables, folder: Path, key: Any) -> GroundedCaption:
        keyed = tables.one("entries", key)
        if len(keyed) != 1:
            raise ValueError("entry is no object with a single name")
        (entry,) = keyed.values()
        path = inside(folder, entry["img_file_name"])
        size = displayed_size(path)
        text = entry["caption"]
        spans: list[Span] = []
        # Long phrases first, so that "man" does not take the words of "man in a red shirt".
        for reference in sorted(entry["refs"], key=lambda reference: -len(reference.get("sentence", ""))):
            try:
                found = occurrences(text, reference["sentence"])
                if not found:
                    raise ValueError("phrase is not in its caption")
                free = [
                    (start, end)
                    for start, end in found
                    if all(end <= other.start or start >= other.end for other in spans)
                ]
                spans.append(Span(*(free or found)[0], rle_of(reference["segmentation"], *size)))
            except MALFORMED as error:
                self.skipped[reason_of(error)] += 1
        return GroundedCaption(path, size, text, spans)


def read_offsets(value: Any) -> tuple[int, int]:
    """(start, end); (-1, -1) where the annotation gives none."""
    return (int(value[0]), int(value[1])) if value else (-1, -1)


def locate(caption: str, phrase: str, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """
    The first of `offsets` that holds the phrase, else the place of the phrase in the caption that is nearest to them.

    Raises `ValueError` if the caption does not hold the phrase.
    """
    found = occurrences(caption, phrase)
    for start, end in offsets:
        if 0 <= start < end and caption[start:end].strip().lower() == phrase.strip().lower():
            return start, end
    if not found:
        raise ValueError("phrase is not in its caption")
    return min(found, key=lambda span: abs(span[0] - offsets[0][0]))


def occurrences(caption: str, phrase: str) -> list[tuple[int, int]]:
    """Where the words of the phrase stand in the caption, as whole words in any case."""
    words = phrase.strip().rstrip(".").split()
    if not re.search(r"\w", phrase):
        raise ValueError("empty phrase")
    pattern = r"(?<!\w)" + r"\s+".join(map(re.escape, words)) + r"(?!\w)"
    return [match.span() for match in re.finditer(pattern, caption, re.IGNORECASE)]


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """One span for each place, with the union of its masks."""
    masks: dict[tuple[int, int], list[Rle]] = defaultdict(list)
    for span in spans:
        masks[span.start, span.end].append(span.mask)
    return [Span(start, end, union(rles)) for (start, end), rles in masks.items()]
