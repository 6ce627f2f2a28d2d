"""The ground truth of GranD-f's evaluation: captions, labels and masks of the splits val and test -> turns of USCDF rows.

Files: `{val,test}_gcg_coco_caption_gt.json` with `images` (`id`, `file_name`) and `annotations` (`image_id`, `caption`,
`labels`), and beside each `{val,test}_gcg_coco_mask_gt.json` with `annotations` (`image_id`, `segmentation`). The i-th label
of an image names its i-th mask. Where an image has several captions the labels are the first one's, as in GLaMM's evaluation.

Nothing of it is corrected or left out, so that the numbers are the published ones. A label that its caption says, letter by
letter, is marked there. The labels that it does not say are the answer of a second turn, and further captions of the image
are turns without masks: `mglmm.evaluation.benchmarks.ground_truth` reads all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import (
    CONTROL_TOKENS,
    REGION_TOKEN,
    escape_control_tokens,
    parse,
    render_list,
    render_phrase,
)

from .builder import UscdfBuilder
from .conversations import Turn
from .masks import Rle, rle_of
from .sources import displayed_size, first_existing, inside

CAPTIONS = {"validation": "val_gcg_coco_caption_gt.json", "test": "test_gcg_coco_caption_gt.json"}
UNSAID = "What else is in the picture? Give a mask for each thing."
AGAIN = "Describe the picture again in other words, without masks."
# Blanks that parsing an answer drops around its tags; no tokeniser of captions sees them.
_LOOSE = re.compile(r"(?<=[(\[{“‘«])\s+|\s+(?=[.,;:!?)\]}”’»…])")

Place = tuple[int, int]


class GroundTruth:
    """One split.

    Args:
        builder: Keeps the tables.
        file: The captions; the masks lie beside it.
        images: Folder of the images.

    Raises:
        FileNotFoundError: there are no masks beside the captions.
    """

    def __init__(self, builder: UscdfBuilder, file: Path, images: Path) -> None:
        masks = first_existing(file.parent, file.name.replace("_caption_", "_mask_"))
        annotations = ("annotations.item", "image_id")
        self._captions = builder.tables(file, images=("images.item", "id"), annotations=annotations)
        self._masks = builder.tables(masks, annotations=annotations)
        self._images = images

    def keys(self) -> list[Any]:
        """Ids of the images, in the order of the file."""
        return self._captions.keys("images")

    def read(self, key: Any, question: str) -> tuple[Path, tuple[int, int], list[Turn]]:
        """
        Path and (height, width) of an image, and its turns, the first of which asks `question`.

        Raises `ValueError` (or `KeyError`, `TypeError`) if anything of it is broken: part of a ground truth is none.
        """
        path = inside(self._images, self._captions.one("images", key)["file_name"])
        size = displayed_size(path)
        described = self._captions.get("annotations", key)
        if not described:
            raise ValueError("image without a caption")
        masks = [_mask(each["segmentation"], size) for each in self._masks.get("annotations", key)]
        labels = described[0]["labels"]
        if len(labels) != len(masks):
            raise ValueError("image with another number of labels than of masks")
        first, *more = [each["caption"] for each in described]
        again = [Turn(AGAIN, _single_spaced(text)) for text in more]
        return path, size, [*marked_turns(question, first, labels, masks), *again]


def marked_turns(question: str, caption: str, labels: Sequence[str], masks: Sequence[Rle]) -> list[Turn]:
    """The caption with the labels that it says, and a turn with the others if there are any."""
    caption, *labels = map(_single_spaced, (caption, *labels))
    answer, said = mark(caption, places(caption, labels, masks))
    if _LOOSE.sub("", parse(answer).clean_text) != _LOOSE.sub("", caption):
        answer, said = caption, []  # the tags would part or join words
    turns = [Turn(question, answer, tuple(masks[index] for index in said))]
    unsaid = [index for index in range(len(labels)) if index not in said]
    if unsaid:
        phrases = render_list([labels[index] for index in unsaid])
        turns.append(Turn(UNSAID, phrases, tuple(masks[index] for index in unsaid)))
    return turns


def places(caption: str, labels: Sequence[str], masks: Sequence[Rle]) -> list[Place | None]:
    """Where the caption says each label, in whole words and without overlap; longer labels choose first."""
    found: list[Place | None] = [None] * len(labels)
    for index in sorted(range(len(labels)), key=lambda index: -len(labels[index])):
        for match in re.finditer(rf"(?<!\w){re.escape(labels[index])}(?!\w)", caption):
            start, end = match.span()
            if start < end and all(end <= taken[0] or start >= taken[1] for taken in found if taken):
                found[index] = start, end
                break
    # Of equal masks the originals take the first one's label, so those keep their order.
    reached: dict[str, int] = {}
    for index, (place, mask) in enumerate(zip(found, masks, strict=True)):
        if place is None or place[0] < reached.get(mask["counts"], 0):
            found[index], reached[mask["counts"]] = None, len(caption)
        else:
            reached[mask["counts"]] = place[1]
    return found


def mark(caption: str, found: Sequence[Place | None]) -> tuple[str, list[int]]:
    """The caption with `<p> label </p> [SEG]` in these places, and the numbers of the labels in the order they come."""
    pieces, position = [], 0
    ordered = sorted((place, index) for index, place in enumerate(found) if place is not None)
    for (start, end), _ in ordered:
        pieces += [caption[position:start], render_phrase(caption[start:end])]
        position = end
    return "".join([*pieces, caption[position:]]), [index for _, index in ordered]


def _mask(segmentation: Any, size: tuple[int, int]) -> Rle:
    try:
        return rle_of(segmentation, *size)
    except ValueError as error:
        if str(error) != "empty mask":
            raise
        return encode_mask(np.zeros(size, dtype=bool))  # nothing can match it, and it counts


def _single_spaced(text: str) -> str:
    return " ".join(escape_control_tokens(text, (*CONTROL_TOKENS, REGION_TOKEN)).split())
