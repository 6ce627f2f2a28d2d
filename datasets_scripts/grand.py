"""Referring expressions of GranD -> USCDF rows of the task referring.

Layout of the data folder, directly or below `GranD/` or `GranD_Data/`: one JSON file per image in `referring_expression/`, or
the raw annotations in `annotations/`; `anno_files.txt`, one file name per line, tells which to use (all if it is absent). The
images of SA-1B in `SegmentAnything/imgs/`, `GranD_Data/images/`, `images/` or `imgs/`.

Each file is an object with one name, that of the image. Its value is a list of `attribute` (the expression) and
`segmentation` (RLE, or null where no mask was found); in raw annotations it holds `objects` with `labels`, `attributes` (a
list, a string or null) and `segmentation`. Raw `floating_objects` are left out, as in the published conversion: they are
phrases of captions ("the vibrant atmosphere") with a box of what a detector did not find.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .builder import Row, UscdfBuilder, make_row, reason_of
from .masks import Rle, rle_of, union
from .phrases import Expression, clean_phrase, refer_to
from .sources import displayed_size, first_existing, inside, read_json

PLACES = ("GranD/", "", "GranD_Data/")
IMAGE_FOLDERS = (
    "SegmentAnything/imgs",
    "*/SegmentAnything/imgs",
    "GranD_Data/images",
    "GranD/images",
    "images",
    "imgs",
)
MAX_OBJECTS = 10  # of a row, as in the original
MALFORMED = (KeyError, TypeError, AttributeError, ValueError)


class GrandReferring(UscdfBuilder):
    """
    Each variant is one conversation about up to `MAX_OBJECTS` expressions of an image, in one to three per question.

    The expressions come from a captioner that saw one object at a time, so that several objects often have the same: it
    then means all of them, and its mask is their union.
    """

    SOURCE = "grand_referring"
    LICENSE = "apache-2.0 (annotations), SA-1B dataset research license (images)"

    def items(self) -> dict[str, Sequence[Any]]:
        folders = [f"{place}{name}" for name in ("referring_expression", "annotations") for place in PLACES]
        self._annotations = first_existing(self.data_dir, *folders)
        self._images = first_existing(self.data_dir, *IMAGE_FOLDERS)
        listed = self._annotations.parent / "anno_files.txt"
        if listed.is_file():
            names = [line.strip() for line in listed.read_text("utf-8").splitlines() if line.strip()]
        else:
            names = sorted(path.name for path in self._annotations.glob("*.json"))
        return {"train": names}

    def rows(self, item: str) -> Iterator[Row]:
        name = item if item.endswith(".json") else f"{item}.json"
        content = read_json(inside(self._annotations, name, "annotation file"))
        if not isinstance(content, Mapping) or len(content) != 1:
            raise ValueError("annotation file is not about one image")
        image, objects = next(iter(content.items()))
        path = inside(self._images, image)
        size = displayed_size(path)
        expressions = self._expressions(objects, size)
        if not expressions:
            raise ValueError("image without a usable expression")
        for variant in range(self.config.variants):
            rng = self.generator(self.SOURCE, image, variant)
            chosen = rng.sample(expressions, min(MAX_OBJECTS, len(expressions)))
            for turns in refer_to(rng, chosen, per_row=MAX_OBJECTS):
                yield make_row(path, path.stem, self.SOURCE, "referring", turns, size=size)

    def _expressions(self, objects: Any, size: tuple[int, int]) -> list[Expression]:
        raw = isinstance(objects, Mapping)
        parts: dict[str, list[Rle]] = {}
        for entry in objects["objects"] if raw else objects:
            try:
                texts = describe(entry["attributes"], entry["labels"]) if raw else [without_role(entry["attribute"])]
                if not texts:  # most raw objects have a label alone
                    continue
                if entry.get("segmentation") is None:
                    raise ValueError("object without a mask")
                mask = rle_of(entry["segmentation"], *size)
                phrases = [clean_phrase(text) for text in texts]
            except MALFORMED as error:
                self.skipped[reason_of(error)] += 1
                continue
            for phrase in phrases:
                parts.setdefault(phrase, []).append(mask)
        return [Expression(phrase, union(masks)) for phrase, masks in parts.items()]


def describe(attributes: Sequence[str] | str | None, labels: Sequence[str]) -> list[str]:
    """The attributes that name the object by one of its labels; the first where none does."""
    texts = [attributes] if isinstance(attributes, str) else attributes or []
    texts = [text for text in map(without_role, texts) if text]
    names = [label.replace("_", " ").lower() for label in labels]
    return [text for text in texts if any(name in text.lower() for name in names)] or texts[:1]


def without_role(text: str) -> str:
    """
    Without the role that the captioner's prompt left in front, often cut short.

    Example:
        >>> without_role("Assistant: a clear sky"), without_role("istant: a red chair"), without_role("sign: exit")
        ('a clear sky', 'a red chair', 'sign: exit')
    """
    role, colon, rest = text.partition(":")
    return (rest if colon and "assistant".endswith(role.strip(" #").lower()) else text).strip()
