"""MGSCData, the published dataset of multi-granularity descriptions -> USCDF rows of the tasks panoptic and fine.

Layout of the data folder: `MGLMM_{train,val}_split.txt` with one annotation file name a line, in the folder of the dataset
or in its `annotations/`; `annotations/mglmm_sa_{n}.json`; images in `SegmentAnything/imgs/` (the COCO variant: in
`train2017/`). An annotation file is a list of entries of one image:

- `file_name`; `label`: "root", or "subtree: " and the name of an object;
- `gcg_caption`: text in which `<KEY1>a man</KEY1>` stands for a phrase with a mask; `gcg_labels`: the names of its keys;
- for each key an object with `mask`: a JSON string of an RLE whose `counts` are base64.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import templates
from .builder import Row, UscdfBuilder, UscdfConfig, make_row, reason_of
from .conversations import Turn
from .layouts import coco_images, existing, inside_any
from .masks import rle_of
from .phrases import Rle, Span, clean_phrase, grounded, unquote
from .sources import displayed_size, first_existing, inside, read_json
from .templates import choose, loosen

SAM_IMAGES = ("SegmentAnything/imgs", "*/SegmentAnything/imgs", "imgs", "images")
SPLITS = {"train": "train", "validation": "val"}
# The published converter looks for the lists in `annotations/`, the published training code beside it.
LIST_FOLDERS = ("", "annotations/", "MGLMM_gcg/", "MGLMM_gcg_new/", "MGLMM_gcg_new/MGLMM_gcg/", "*/", "*/*/")


class MgscData(UscdfBuilder):
    BUILDER_CONFIGS = [UscdfConfig(name="mgsc")]
    DEFAULT_CONFIG_NAME = "mgsc"
    SOURCE = "mgscdata"
    LICENSE = "research (annotations), SA-1B dataset research license (images)"

    def items(self) -> dict[str, Sequence[Any]]:
        self._images = existing(self.data_dir, SAM_IMAGES, coco_images("train2017"))
        self._annotations: dict[str, Path] = {}
        items: dict[str, Sequence[Any]] = {}
        missing = None
        for split, name in SPLITS.items():
            name = f"MGLMM_{name}_split.txt"
            try:
                file = first_existing(self.data_dir, *(f"{folder}{name}" for folder in LIST_FOLDERS))
            except FileNotFoundError as error:
                missing = error
                self.skipped[f"split {split} without a list"] += 1
                continue
            folder = file.parent / "annotations"
            self._annotations[split] = folder if folder.is_dir() else file.parent
            items[split] = [(split, line.strip()) for line in file.read_text("utf-8").splitlines() if line.strip()]
        if not items and missing:
            raise missing
        return items

    def rows(self, item: Any) -> Iterator[Row]:
        split, name = item
        entries = read_json(inside(self._annotations[split], name, "annotation file"))
        if not isinstance(entries, list) or not entries:
            raise ValueError("annotation file holds no list of entries")
        for index, entry in enumerate(entries):
            try:
                path = inside_any(self._images, entry["file_name"])
                size = displayed_size(path)
                answer, masks = self._answer(entry, size)
                label = object_label(entry["label"])
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
                continue
            for variant in range(self.config.variants if split == "train" else 1):
                rng = self.generator(self.SOURCE, split, name, index, variant)
                if label is None:
                    task, question = "panoptic", choose(rng, templates.PANOPTIC_QUESTIONS)
                else:
                    task, question = "fine", choose(rng, templates.FINE_QUESTIONS).format(x=label)
                turn = Turn(loosen(rng, question), answer, masks)
                yield make_row(path, path.stem, self.SOURCE, task, [turn], size=size)

    def _answer(self, entry: Mapping[str, Any], size: tuple[int, int]) -> tuple[str, tuple[Rle, ...]]:
        keys = {key for key, value in entry.items() if isinstance(value, Mapping)} | set(entry["gcg_labels"])
        text, tagged = read_tags(entry["gcg_caption"] or "", keys)
        if not text:
            raise ValueError("empty caption")
        masks: dict[str, Rle] = {}
        for key in sorted(keys):
            if key not in {name for name, _, _ in tagged}:
                self.skipped["key that its caption never names"] += 1
                continue
            try:
                masks[key] = read_mask(entry[key]["mask"], *size)
            except KeyError:
                self.skipped["key without a mask"] += 1
            except (TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
        spans = [Span(start, end, masks[key]) for key, start, end in tagged if key in masks]
        answer, ordered = grounded(text, spans)
        if not ordered:
            raise ValueError("caption without a grounded phrase")
        if len(ordered) < len(spans):
            self.skipped["phrase that overlaps a longer one"] += len(spans) - len(ordered)
        return answer, ordered


def read_tags(caption: str, keys: set[str]) -> tuple[str, list[tuple[str, int, int]]]:
    """
    A caption without its tags, and (key, start, end) of what stood between the tags of a key, in their order.

    Tags that do not pair are left out with no trace, and so are those of other names: the published converter deletes all
    text between the first and the last of them.
    """
    names = "|".join([*map(re.escape, sorted(keys)), r"[\w-]+"])
    text, tagged, opened = "", [], {}
    caption = unquote(caption)
    position = 0
    for tag in re.finditer(rf"<(/?)({names})>", caption):
        text += caption[position : tag.start()]
        position = tag.end()
        if tag[2] not in keys:
            continue
        if not tag[1]:
            opened[tag[2]] = len(text)
        elif tag[2] in opened:
            start = opened.pop(tag[2])
            if not caption[position : position + 1].isalnum():
                text = text.rstrip()  # blanks between the tags would stand before a comma
            if start < len(text):
                tagged.append((tag[2], start, len(text)))
    return text + caption[position:], tagged


def read_mask(text: str | None, height: int, width: int) -> Rle:
    """The RLE in a JSON string with base64 counts. Raises `ValueError` if it is broken or of another size."""
    if text in (None, "None", ""):
        raise ValueError("key without a mask")
    try:
        rle = json.loads(text)
        counts = base64.b64decode(rle["counts"], validate=True)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"mask is no JSON string of an RLE with base64 counts ({type(error).__name__})") from error
    return rle_of({"size": rle["size"], "counts": counts}, height, width)


def object_label(label: str) -> str | None:
    """What a subtree describes, as one asks for it: "subtree: man" -> "the man"; `None` for the root."""
    kind, _, name = label.partition(":")
    return None if kind.strip().lower() == "root" else definite_phrase(name)


def definite_phrase(label: str) -> str:
    """ "Red hat", "a red hat" -> "the red hat"; other determiners stay."""
    phrase = re.sub(r"^(an?|the) (?=.)", "", clean_phrase(label))
    return phrase if re.match(r"(this|that|these|those|his|her|its|their|my|your|our)\b", phrase) else f"the {phrase}"
