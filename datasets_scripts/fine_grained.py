"""
Fine-grained text: Osprey-724K (conversations about regions) and DCI (trees of described masks) -> USCDF rows.

- Osprey-724K: `osprey_{conversation,detail_description,part_level,short_form,lvis_positive_negative}*.json` in the data
  folder, `osprey/` or `osprey/less/`: lists of `file_name` (of COCO), `height`, `width`, `annotation` (`segmentation`), and
  either `conversations` (`from` human or gpt, `value`), whose texts say `<region1>`, `region1` or `<mask><pos>`, or
  `description`, a list of "<region1>: text".
- DCI: `{train,val}/*.json` in the data folder or `DCI/`, images in `SegmentAnything/imgs/`. A file holds `image`,
  `short_caption`, `extra_caption` and `mask_data`: id -> `label`, `caption`, `parent` (-1 for the image), `outer_mask` (PNG
  of the image's size as base64) and `mask_quality` (0 is good, 1 poor, 2 unusable).
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
from pycocotools import mask as mask_utils

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import REGION_TOKEN, render_phrase

from . import templates
from .builder import Row, UscdfBuilder, make_row, reason_of
from .captions import read_conversation
from .conversations import MAX_MENTIONS, Turn, listed
from .layouts import coco_images, existing, inside_any
from .masks import area, rle_of
from .mgscdata import SAM_IMAGES, definite_phrase
from .phrases import Rle, clean_caption, clean_lines, clean_phrase
from .regions import MAX_BOXES, Box, clip_box, region_turn
from .sources import JsonTables, check_image_size, displayed_size, first_existing, inside, read_json
from .templates import choose, loosen

OSPREY_KINDS = ("conversation", "detail_description", "part_level", "short_form", "lvis_positive_negative")
COCO_FOLDERS = ("train2014", "train2017", "val2017")
SHORT_ANSWERS = ("part_level", "short_form")
SHORT_ANSWER_TAILS = ("Answer with a word or a short phrase.", "A word or two will do.", "Keep the answer very short.")
DETAIL_QUESTIONS: tuple[str, ...] = (
    "Describe <region> in detail.",
    "Give a detailed description of <region>.",
    "What can you say about <region>? Be thorough.",
    "Take a close look at <region> and describe all that you see.",
    "Tell me everything about the thing in <region>.",
    "How does <region> look? Go into detail.",
)
PLACEHOLDER = "<mask><pos>"
MENTION = re.compile(r"<region\s?(\d+)>")
DESCRIPTION = re.compile(r"\s*<?region\s?(\d+)>?\s*:\s*(\S.*)", re.DOTALL)

IMAGE_NODE = "-1"  # the parent of masks that lie in no other
MIN_CHILDREN = 2  # of a mask that is asked about
MAX_QUESTIONS = 2  # about masks, in a conversation
DESCRIBED: tuple[str, ...] = (
    "In detail:",
    "One by one:",
    "Here is what can be seen:",
    "A closer look shows:",
    "More about what is there:",
)


class Osprey(UscdfBuilder):
    """The region of a question is the bounding box of the published mask."""

    SOURCE = "osprey"
    LICENSE = "apache-2.0 (annotations made with GPT-4: OpenAI terms of use), terms of use of the images' sources"

    def items(self) -> dict[str, Sequence[Any]]:
        self._images = existing(self.data_dir, *map(coco_images, COCO_FOLDERS))
        self._tables: dict[str, JsonTables] = {}
        roots = ("osprey/", "osprey/less/", "less/", "Osprey-724K/", "")
        for kind in OSPREY_KINDS:
            try:
                file = first_existing(self.data_dir, *(f"{root}osprey_{kind}*.json" for root in roots))
            except FileNotFoundError:
                self.skipped[f"no file osprey_{kind}.json"] += 1
                continue
            self._tables[kind] = self.tables(file, entries=("item", ""))
        return {"train": [(kind, key) for kind, tables in self._tables.items() for key in tables.keys("entries")]}

    def rows(self, item: tuple[str, Any]) -> Iterator[Row]:
        kind, key = item
        entry = self._tables[kind].one("entries", key)
        name = Path(entry["file_name"]).name
        number = name.rpartition("_")[2]  # COCO photographs have the same number in all releases, after another prefix
        path = inside_any(self._images, name, number, f"COCO_train2014_{number}")
        height, width = size = int(entry["height"]), int(entry["width"])
        check_image_size(path, height, width)
        segmentations = [annotation["segmentation"] for annotation in entry["annotation"]]
        source = f"{self.SOURCE}_{kind}"
        if "description" not in entry:
            boxes = [mask_box(segmentation, *size) for segmentation in segmentations]
            rng = self.generator(self.SOURCE, kind, key)
            turns = converse(rng, entry["conversations"], boxes, short=kind in SHORT_ANSWERS)
            yield make_row(path, path.stem, source, "region", turns, size=size)
            return
        described = self._described(entry["description"], segmentations, size)
        for variant in range(self.config.variants):
            rng = self.generator(self.SOURCE, kind, key, variant)
            turns = [region_turn(rng, box, text, DETAIL_QUESTIONS) for box, text in described]
            for start in range(0, len(turns), MAX_BOXES):
                yield make_row(path, path.stem, source, "region", turns[start : start + MAX_BOXES], size=size)

    def _described(
        self, descriptions: Sequence[str], segmentations: Sequence[Any], size: tuple[int, int]
    ) -> list[tuple[Box, str]]:
        described = []
        for description in descriptions:
            try:
                match = DESCRIPTION.fullmatch(description)
                if match is None or not 1 <= int(match[1]) <= len(segmentations):
                    raise ValueError("description of no region")
                described.append((mask_box(segmentations[int(match[1]) - 1], *size), clean_lines(match[2])))
            except (TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
        if not described:
            raise ValueError("image without a usable region")
        return described


def mask_box(segmentation: Any, height: int, width: int) -> Box:
    return clip_box(mask_utils.toBbox(rle_of(segmentation, height, width)).tolist(), height, width)


def converse(
    rng: Random, messages: Sequence[Mapping[str, str]], boxes: Sequence[Box], *, short: bool = False
) -> list[Turn]:
    """
    A conversation about regions that its texts call `region1`, `region2`, ...

    The questions say where they are: where they hold one `<mask><pos>` for each region, there; else, where they mention
    `<region1>` and the like in brackets, at the first mention of each; regions left over are named before the first
    question.

    Raises:
        ValueError: as `read_conversation`, a region is mentioned that is not there, or placeholders and regions differ in
            number.
    """
    turns, _ = read_conversation(messages)
    placed = sum(turn.question.count(PLACEHOLDER) for turn in turns)
    if placed not in (0, len(boxes)):
        raise ValueError("number of placeholders differs from the number of regions")
    if any(not 1 <= int(number) <= len(boxes) for turn in turns for number in MENTION.findall(turn.question)):
        raise ValueError("question about a region that is not there")
    left = dict(enumerate(boxes, 1))
    located = []
    for turn in turns:
        held: list[Box] = []

        def locate(match: re.Match, held: list[Box] = held) -> str:
            if match[0] == PLACEHOLDER:
                number = min(left)
            elif placed or int(match[1]) not in left:
                return f"region{match[1]}"
            else:
                number = int(match[1])
            held.append(left.pop(number))
            return f" {REGION_TOKEN}" if match[0] == PLACEHOLDER else f"region{number} {REGION_TOKEN}"

        question = re.sub(rf"{re.escape(PLACEHOLDER)}|{MENTION.pattern}", locate, turn.question)
        question = question.replace("  ", " ").strip()
        located.append((question, MENTION.sub(r"region\1", turn.answer), held))
    if left:
        question, answer, held = located[0]
        names = listed([f"region{number} at {REGION_TOKEN}" for number in left])
        located[0] = (f"The picture has {names}. {question}", answer, [*left.values(), *held])
    tail = f" {choose(rng, SHORT_ANSWER_TAILS)}" if short else ""
    return [Turn(f"{question}{tail}", answer, regions=tuple(held)) for question, answer, held in located]


@dataclass(frozen=True)
class Node:
    """The image (without label and mask) or a described mask; `children` are the good masks directly below it."""

    label: str
    caption: str
    mask: Rle
    children: tuple[str, ...]


class Dci(UscdfBuilder):
    """
    Densely Captioned Images. What lies in the image is described, then what lies in up to two of its masks: in train as one
    conversation, elsewhere one question to a row.
    """

    SOURCE = "dci"
    LICENSE = "cc-by-nc-4.0 (annotations), SA-1B dataset research license (images)"

    def items(self) -> dict[str, Sequence[Any]]:
        self._images = existing(self.data_dir, SAM_IMAGES)
        self._folders: dict[str, Path] = {}
        items: dict[str, Sequence[Any]] = {}
        for split, name in (("train", "train"), ("validation", "val")):
            try:
                file = first_existing(self.data_dir, f"DCI/{name}/*.json", f"{name}/*.json")
            except FileNotFoundError:
                self.skipped[f"split {split} without annotations"] += 1
                continue
            self._folders[split] = file.parent
            items[split] = [(split, path.name) for path in sorted(file.parent.glob("*.json"))]
        return items

    def rows(self, item: tuple[str, str]) -> Iterator[Row]:
        split, name = item
        entry = read_json(inside(self._folders[split], name, "annotation file"))
        path = inside_any(self._images, entry["image"])
        size = displayed_size(path)
        nodes = self._tree(entry, size)
        inner = [key for key, node in nodes.items() if key != IMAGE_NODE and len(node.children) >= MIN_CHILDREN]
        for variant in range(self.config.variants if split == "train" else 1):
            rng = self.generator(self.SOURCE, split, name, variant)
            chosen = rng.sample(inner, min(MAX_QUESTIONS, len(inner))) if split == "train" else inner
            keys = [IMAGE_NODE, *chosen] if nodes[IMAGE_NODE].children else chosen
            turns = [describe_node(rng, nodes, key) for key in keys]
            if not turns:
                raise ValueError("image without a usable mask")
            for task, group in [("fine", turns)] if split == "train" else _single(keys, turns):
                yield make_row(path, path.stem, self.SOURCE, task, group, size=size)

    def _tree(self, entry: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Node]:
        """The image and its good masks; those below a poor one lie in the next good one above it."""
        good: dict[str, tuple[str, str, Rle]] = {}
        parents = {key: str(mask.get("parent")) for key, mask in entry["mask_data"].items()}
        for key, mask in entry["mask_data"].items():
            try:
                if mask["mask_quality"] != 0:
                    raise ValueError("mask of poor quality")
                caption = clean_caption(mask["caption"]) if mask["caption"] else ""
                good[key] = clean_phrase(mask["label"]), caption, read_png(mask["outer_mask"], *size)
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
        children: dict[str, list[str]] = defaultdict(list)
        for key in good:
            parent, passed = parents[key], {key}
            while parent in parents and parent not in good and parent not in passed:
                passed.add(parent)
                parent = parents[parent]
            # Masks that lie in themselves or in one that is not listed belong to the image.
            children[parent if parent in good and parent not in passed else IMAGE_NODE].append(key)
        caption = clean_caption(entry["extra_caption"].strip() or entry["short_caption"])
        nodes = {IMAGE_NODE: Node("", caption, {}, tuple(children[IMAGE_NODE]))}
        return nodes | {key: Node(*described, tuple(children[key])) for key, described in good.items()}


def _single(keys: Sequence[str], turns: Sequence[Turn]) -> list[tuple[str, list[Turn]]]:
    return [("panoptic" if key == IMAGE_NODE else "fine", [turn]) for key, turn in zip(keys, turns, strict=True)]


def describe_node(rng: Random, nodes: Mapping[str, Node], key: str) -> Turn:
    """The caption of a node, then its `MAX_MENTIONS` largest children, each with its own caption."""
    node = nodes[key]
    largest = sorted(node.children, key=lambda child: -area(nodes[child].mask))[:MAX_MENTIONS]
    chosen = [nodes[child] for child in node.children if child in largest]
    if key == IMAGE_NODE:
        question = choose(rng, templates.PANOPTIC_QUESTIONS)
    else:
        question = choose(rng, templates.FINE_QUESTIONS).format(x=definite_phrase(node.label))
    sentences = [_sentence(node.caption)] if node.caption else []
    sentences.append(choose(rng, DESCRIBED))
    for child in chosen:
        caption = f": {child.caption}" if child.caption else ""
        sentences.append(_sentence(f"{render_phrase(child.label)}{caption}"))
    return Turn(loosen(rng, question), " ".join(sentences), tuple(child.mask for child in chosen))


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def read_png(text: str, height: int, width: int) -> Rle:
    """The mask in a PNG as base64: all that is not 0. Raises `ValueError` if it is broken, empty or of another size."""
    try:
        with PIL.Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            if image.size != (width, height):
                raise ValueError("mask size differs from the image size")
            pixels = np.asarray(image.convert("L"))
    except (binascii.Error, OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"mask is no PNG as base64 ({type(error).__name__})") from error
    return rle_of(encode_mask(pixels > 0), height, width)
