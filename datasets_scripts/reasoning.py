"""Questions that take reasoning -> USCDF rows of the task reasoning.

Layouts, below the data folder or in the sub-folder that LISA gives them (`reason_seg/ReasonSeg/`, `reason_seg/MUSE/`):

- ReasonSeg: `{train,val,test}/{name}.jpg` with `{name}.json` beside it: `text` (ways to ask), `is_sentence`, `shapes` of
  `label` (contains target or ignore; flag is meaningless) and `points`. `explanatory/train.json` is a list of `image` and
  `outputs`, an explanation in plain text.
- MUSE: `MUSE_{train,val,test_less,test_many}.json`, a list of images: `file_name` (in COCO train2014) or `coco_url`,
  `height`, `width`, `questions`, `answers`: for each question its targets (`segmentation`, `category_name`,
  `rephrased_name`), and `text_answers`: for each question null or a text with a `{seg}` after each target it names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import render_phrase

from . import phrase_templates, templates
from .builder import Row, UscdfBuilder, make_row, reason_of
from .conversations import Turn, listed
from .layouts import coco_images
from .masks import rle_of
from .phrases import Expression, Rle, Span, ask_for_expression, clean, clean_phrase, grounded
from .sources import JsonTables, check_image_size, displayed_size, first_existing, inside, read_json
from .templates import choose, loosen

MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)
WORDS_ONLY = 0.1  # of the training rows with an explanation; the others are half mask, half mask and explanation

# An explanation says early what it is about: "The camera lens is made for ...". A noun phrase ends before one of these.
AFTER_NOUN = (
    "is are was were has have had can could may might will would should must does do there it they he she this these "
    "the a an in on at for to with by from as that which who whose where because since and or but not also "
    "shows show wears wear holds hold stands stand sits sit lies looks look seems seem appears appear provides provide "
    "helps help allows allow contains contain uses use makes make serves serve plays play keeps keep belongs belong "
    "wearing holding standing sitting lying looking shown used made placed located hanging riding carrying"
)
NOUN_PHRASE = re.compile(
    rf"\b((?:the|an?) (?:[a-z][\w'-]* ){{0,3}}?[a-z][\w'-]*)(?<! of)(?=[,.;:]| (?:{AFTER_NOUN.replace(' ', '|')})\b)"
)
# It is no answer to call the target one of these.
GENERAL = frozenset(
    "image picture photo photograph scene view object objects thing things item items part parts area region place "
    "answer reason one question background foreground following".split()
)
NAMELESS = "the target"


class ReasonSeg(UscdfBuilder):
    """
    In train each way to ask is a row. In the other splits an image is one row with its first question, as in LISA's
    evaluation. A question that is a phrase names its target; for a sentence the name comes from the explanation of the
    image, if there is one.
    """

    SOURCE = "reasonseg"
    LICENSE = "research (annotations), terms of use of OpenImages and ScanNet (images)"
    ROOTS = ("reason_seg/ReasonSeg/", "ReasonSeg/", "")

    def items(self) -> dict[str, Sequence[Any]]:
        self._folders: dict[str, Path] = {}
        missing = None
        for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
            try:
                self._folders[split] = first_existing(self.data_dir, *(root + name for root in self.ROOTS))
            except FileNotFoundError as error:
                missing = error
                self.skipped[f"split {split} without a folder"] += 1
        if missing and not self._folders:
            raise missing
        self._explanations: dict[str, str] = {}
        for root in self.ROOTS:
            file = self.data_dir / root / "explanatory" / "train.json"
            if file.is_file():
                self._explanations = self._read_explanations(read_json(file))
                break
        return {
            split: [(split, path.stem) for path in sorted(folder.glob("*.json"))]
            for split, folder in self._folders.items()
        }

    def _read_explanations(self, entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        explanations = {}
        for entry in entries:
            try:
                explanations[Path(entry["image"]).stem] = clean(entry["outputs"])
            except (KeyError, TypeError) as error:
                self.skipped[f"explanation: {reason_of(error)}"] += 1
        return explanations

    def rows(self, item: tuple[str, str]) -> Iterator[Row]:
        split, name = item
        path = inside(self._folders[split], f"{name}.jpg")
        annotation = read_json(inside(self._folders[split], f"{name}.json", "annotation file"))
        size = displayed_size(path)
        target, ignored, unused = read_shapes(annotation["shapes"], size)
        self.skipped.update(unused)
        texts = [text for text in map(clean, annotation["text"]) if text]
        if not texts:
            raise ValueError("image without a question")
        is_train = split == "train"
        explanation = self._explanations.get(name, "") if is_train else ""
        for variant in range(self.config.variants if is_train else 1):
            for number, text in enumerate(texts if is_train else texts[:1]):
                rng = self.generator(self.SOURCE, split, name, variant, number)
                turn = ask_with_reason(rng, text, annotation["is_sentence"], target, explanation)
                task = "reasoning" if turn.masks else "conversation"
                yield make_row(path, name, self.SOURCE, task, [turn], size=size, ignore_mask=ignored)


def read_shapes(shapes: Sequence[Mapping[str, Any]], size: tuple[int, int]) -> tuple[Rle, Rle | None, Counter[str]]:
    """
    The target, what is to be ignored (`None` if nothing), and what could not be used, by reason.

    Larger shapes are drawn first, so that a smaller one lies upon them: an ignored part of a target, or the reverse.
    Raises `ValueError` if nothing of the target is left.
    """
    drawn: list[tuple[str, np.ndarray]] = []
    unused: Counter[str] = Counter()
    for shape in shapes:
        label = shape["label"].lower()
        if label == "flag":
            continue
        kind = next((kind for kind in ("ignore", "target") if kind in label), None)
        points = shape["points"]
        if kind is None:
            unused["shape of an unknown label"] += 1
        elif len(points) < 3:
            unused["shape of fewer than three points"] += 1
        else:
            drawn.append((kind, _draw(points, size)))
    values = np.zeros(size, dtype=np.uint8)
    for kind, mask in sorted(drawn, key=lambda shape: -int(shape[1].sum())):
        values[mask] = 1 if kind == "target" else 2
    if not (values == 1).any():
        raise ValueError("image without a target")
    return encode_mask(values == 1), encode_mask(values == 2) if (values == 2).any() else None, unused


def _draw(points: Sequence[Sequence[float]], size: tuple[int, int]) -> np.ndarray:
    """A filled polygon with its outline; the original cuts the coordinates to whole pixels."""
    canvas = PIL.Image.new("L", size[::-1])
    PIL.ImageDraw.Draw(canvas).polygon([(int(x), int(y)) for x, y in points], fill=1, outline=1)
    return np.asarray(canvas, dtype=bool)


def ask_with_reason(rng: Random, text: str, is_sentence: bool, mask: Rle, explanation: str = "") -> Turn:
    """A question in an annotator's words: answered with the mask and, given an explanation, with it too or instead."""
    draw = rng.random()
    if not explanation or WORDS_ONLY <= draw < (1 + WORDS_ONLY) / 2:
        if not is_sentence:
            return ask_for_expression(rng, Expression(text, mask))
        tails, reason = phrase_templates.REASONING_TAILS, ""
    elif draw < WORDS_ONLY:
        return Turn(choose(rng, phrase_templates.EXPLANATION_QUESTIONS).format(s=as_sentence(text)), explanation)
    else:
        tails, reason = phrase_templates.EXPLAIN_TAILS, f" {explanation}"
    name = name_in(explanation) if is_sentence else clean_phrase(text)
    answer = choose(rng, templates.PRESENT_ANSWERS, first=0.6).format(p=render_phrase(name))
    return Turn(loosen(rng, choose(rng, tails).format(s=as_sentence(text))), answer + reason, (mask,))


def name_in(explanation: str) -> str:
    """
    What an explanation is about: its first noun phrase that is more than "the object in the image".

    Example:
        >>> name_in("In the picture, the camera lens is made for close objects."), name_in("It is soft.")
        ('the camera lens', 'the target')
    """
    phrases = (match[1] for match in NOUN_PHRASE.finditer(explanation.lower()))
    return next((phrase for phrase in phrases if phrase.split()[-1] not in GENERAL), NAMELESS)


def as_sentence(text: str) -> str:
    text = templates.capitalise(text)
    return text if text[-1] in ".?!" else f"{text}."


@dataclass(frozen=True)
class MuseTarget:
    category: str
    name: str  # the category within the words of an annotator, or the category alone
    mask: Rle


class Muse(UscdfBuilder):
    """
    Questions with several targets each; in train in conversations of up to three, elsewhere one to a row. A published text
    answer is kept where each `{seg}` follows the category of its target; in other cases the answer lists the targets, so
    that no question is lost.
    """

    SOURCE = "muse"
    LICENSE = "research (annotations made with GPT-4V), COCO: Flickr terms of use (images)"
    FILES = {"train": "train", "validation": "val", "test_less": "test_less", "test_many": "test_many"}
    PER_ROW = 3

    def items(self) -> dict[str, Sequence[Any]]:
        self._images = {
            name: next(
                (path for path in (self.data_dir / folder for folder in coco_images(name)) if path.is_dir()), None
            )
            for name in ("train2014", "train2017", "val2017")
        }
        self._tables: dict[str, JsonTables] = {}
        missing = None
        for split, name in self.FILES.items():
            roots = ("reason_seg/MUSE/", "MUSE/", "")
            names = [f"{root}{prefix}_{name}.json" for root in roots for prefix in ("MUSE", "muse")]
            try:
                self._tables[split] = self.tables(first_existing(self.data_dir, *names), entries=("item", ""))
            except FileNotFoundError as error:
                missing = error
                self.skipped[f"split {split} without annotations"] += 1
        if missing and not self._tables:
            raise missing
        return {split: [(split, key) for key in tables.keys("entries")] for split, tables in self._tables.items()}

    def rows(self, item: tuple[str, int]) -> Iterator[Row]:
        split, key = item
        entry = self._tables[split].one("entries", key)
        path = self._image(entry)
        size = int(entry["height"]), int(entry["width"])
        check_image_size(path, *size)
        questions = list(self._questions(entry, size))
        if not questions:
            raise ValueError("image without a usable question")
        is_train = split == "train"
        for variant in range(self.config.variants if is_train else 1):
            rng = self.generator(self.SOURCE, split, key, variant)
            order = rng.sample(questions, len(questions)) if is_train else questions
            per_row = self.PER_ROW if is_train else 1
            for start in range(0, len(order), per_row):
                turns = [answer_question(rng, *question) for question in order[start : start + per_row]]
                yield make_row(path, path.stem, self.SOURCE, "reasoning", turns, size=size)

    def _image(self, entry: Mapping[str, Any]) -> Path:
        if "file_name" in entry:
            folder, name = "train2014", entry["file_name"]
        else:
            folder = "train2017" if "train2017" in entry["coco_url"] else "val2017"
            name = entry["coco_url"].rpartition("/")[2]
        if (images := self._images[folder]) is None:
            raise ValueError(f"there is no folder of COCO {folder}")
        return inside(images, name)

    def _questions(
        self, entry: Mapping[str, Any], size: tuple[int, int]
    ) -> Iterator[tuple[str, list[MuseTarget], str | None]]:
        """Question, targets and text answer of what is whole."""
        texts = entry.get("text_answers") or [None] * len(entry["questions"])
        if not len(entry["questions"]) == len(entry["answers"]) == len(texts):
            raise ValueError("numbers of questions and answers differ")
        for question, answer, text in zip(entry["questions"], entry["answers"], texts, strict=True):
            try:
                if "[" in question and "]" in question:
                    raise ValueError("question about a box")
                if not (cleaned := clean(question)):
                    raise ValueError("empty question")
                if not answer:
                    raise ValueError("question without a target")
                yield cleaned, [read_target(target, size) for target in answer], text
            except MALFORMED as error:
                self.skipped[reason_of(error)] += 1


def read_target(target: Mapping[str, Any], size: tuple[int, int]) -> MuseTarget:
    # LVIS puts the meaning of a word in brackets: "bow_(decorative_ribbons)".
    category = clean_phrase(target["category_name"].partition("(")[0].replace("_", " "))
    name = clean(target.get("rephrased_name") or "").rstrip(" .").lower()
    return MuseTarget(category, name if find_name(name, category) else category, rle_of(target["segmentation"], *size))


def answer_question(rng: Random, question: str, targets: Sequence[MuseTarget], text: str | None) -> Turn:
    question = loosen(
        rng, choose(rng, phrase_templates.SEVERAL_TARGETS_TAILS, first=0.3).format(s=as_sentence(question))
    )
    if text and (found := read_text_answer(text, targets)):
        return Turn(question, *found)
    answers = templates.SEVERAL_ANSWERS if len(targets) > 1 else templates.PRESENT_ANSWERS
    answer = choose(rng, answers, first=0.6).format(p=listed(numbered(targets)))
    return Turn(question, answer, tuple(target.mask for target in targets))


def numbered(targets: Sequence[MuseTarget]) -> list[str]:
    """The names of the targets with their categories tagged: "the red <p> cup </p> [SEG]"; equal ones get numbers."""
    total = Counter(target.name for target in targets)
    seen: Counter[str] = Counter()
    result = []
    for target in targets:
        seen[target.name] += 1
        start, end = find_name(target.name, target.category) or (0, len(target.name))  # `read_target` saw to it
        suffix = f"-{seen[target.name]}" if total[target.name] > 1 else ""
        tagged = render_phrase(target.name[start:end] + suffix)
        result.append(f"{target.name[:start]}{tagged}{target.name[end:]}")
    return result


def read_text_answer(text: str, targets: Sequence[MuseTarget]) -> tuple[str, tuple[Rle, ...]] | None:
    """
    A text with `{seg}`s as an answer and its masks; `None` unless there is one `{seg}` for each target, not more than five
    characters after the last mention of the target's category since the `{seg}` before.
    """
    text = re.sub(r"\(\s*\{seg\}\s*\)", " {seg}", text.replace("</s>", ""))
    *pieces, last = (piece.replace("{{", "{").replace("}}", "}") for piece in text.split("{seg}"))
    if len(pieces) != len(targets):
        return None
    caption, spans = "", []
    for piece, target in zip(pieces, targets, strict=True):
        piece = piece.rstrip()
        found = find_name(piece, target.category)
        if found is None or len(piece) - found[1] > 5:
            return None
        spans.append(Span(len(caption) + found[0], len(caption) + found[1], target.mask))
        caption += piece
    return grounded(caption + last, spans)


def find_name(text: str, category: str) -> tuple[int, int] | None:
    """Where a category stands last in a text, also in the plural or with underscores."""
    words = "[ _]".join(map(re.escape, category.split()))
    matches = [match.span() for match in re.finditer(rf"\b{words}(?:e?s)?\b", text, re.IGNORECASE)]
    return matches[-1] if matches else None
