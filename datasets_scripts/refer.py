"""
Referring expressions of the REFER family and gRefCOCO -> USCDF rows.

Layout of the data folder, directly or below `refer_seg/` or `Refer_Segm/`: `{refclef,refcoco,refcoco+,refcocog,grefcoco}/`
with the references and `instances.json`; the images in `images/mscoco/images/train2014/` (also `coco_2014/train2014/` or
`coco/train2014/`) and `images/saiapr_tc-12/`.

References: `refs(unc).p`, `refs(umd).p` or `grefs(unc).json`, a list of `image_id`, `ann_id` (a number; for gRefCOCO a list,
`[-1]` where nothing fits), `split`, `sentences` (`sent`). `instances.json`: `images` (`id`, `file_name`, `height`, `width`) and
`annotations` (`id`, `image_id`, `segmentation` as polygons, RLE or list of RLE).

The images of all these sets but RefCLEF are those of COCO train2014, and a training image of one set may be a validation or
test image of another. Nothing is left out for that, as in the originals: a mixture to be evaluated on one set needs it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .builder import Row, UscdfBuilder, make_row, reason_of
from .layouts import coco_images
from .masks import Rle, rle_of, union
from .phrases import Expression, clean_phrase, refer_to
from .sources import JsonTables, check_image_size, first_existing, inside, load_pickle

PLACES = ("", "refer_seg/", "Refer_Segm/")
COCO = ("images/mscoco/images/train2014", *coco_images("train2014"))
NO_TARGET = -1
EMPTY = ("empty segmentation", "empty mask")  # how `rle_of` names a mask without a pixel


class Refer(UscdfBuilder):
    """
    What the sets have in common. All expressions of an image are asked for: in the split train in conversations of up to
    three, elsewhere one to a row, because a benchmark scores each by itself. An expression that nothing fits, or whose
    objects have no pixels, is absent: its answer is a refusal.
    """

    FOLDER: str  # of the set
    REFERENCES: tuple[str, ...]  # files that may hold the references, the first one wins
    IMAGES: tuple[str, ...] = COCO
    LICENSE = "annotations: Apache-2.0 (REFER); images: COCO, each under its own Flickr licence"

    def items(self) -> dict[str, Sequence[Any]]:
        names = [f"{place}{self.FOLDER}/{name}" for place in PLACES for name in self.REFERENCES]
        references = first_existing(self.data_dir, *names)
        self._images = first_existing(self.data_dir, *(place + folder for place in PLACES for folder in self.IMAGES))
        self._instances: JsonTables = self.tables(
            first_existing(references.parent, "instances.json"),
            images=("images.item", "id"),
            annotations=("annotations.item", "id"),
        )
        if references.suffix == ".p":
            references = _as_json(references, Path(self._cache_dir_root) / "tables")
        self._references: JsonTables = self.tables(references, references=("item", "image_id"))
        splits: dict[str, dict[Any, None]] = {}
        for image_id, reference in self._references.all("references"):
            named = splits_of(reference)
            if not named:
                self.skipped["reference of an unknown split"] += 1
            for split in named:
                splits.setdefault(split, {})[image_id] = None
        return {split: [(split, image_id) for image_id in image_ids] for split, image_ids in splits.items()}

    def rows(self, item: tuple[str, Any]) -> Iterator[Row]:
        split, image_id = item
        images = self._instances.get("images", image_id)
        if not images:
            raise ValueError("image is not listed in instances.json")
        size = images[0]["height"], images[0]["width"]
        path = inside(self._images, images[0]["file_name"])
        check_image_size(path, *size)
        expressions = self._expressions(split, image_id, size)
        if not expressions:
            raise ValueError("image without a usable expression")
        is_train = split == "train"
        if is_train:  # annotators often chose the same words; a benchmark counts each of them
            expressions = [e for index, e in enumerate(expressions) if e not in expressions[:index]]
        for variant in range(self.config.variants if is_train else 1):
            rng = self.generator(self.SOURCE, split, image_id, variant)
            for turns in refer_to(rng, expressions, per_row=3 if is_train else 1):
                task = "referring" if any(turn.masks for turn in turns) else "absent"
                yield make_row(path, image_id, self.SOURCE, task, turns, size=size)

    def _expressions(self, split: str, image_id: Any, size: tuple[int, int]) -> list[Expression]:
        expressions = []
        for reference in self._references.get("references", image_id):
            if split not in splits_of(reference):
                continue
            try:
                mask = self._mask(reference, size)
                texts = [sentence["sent"] for sentence in reference["sentences"]]
            except (KeyError, TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
                continue
            for text in texts:
                try:
                    expressions.append(Expression(clean_phrase(text), mask))
                except (AttributeError, TypeError, ValueError) as error:
                    self.skipped[reason_of(error)] += 1
        return expressions

    def _mask(self, reference: Mapping[str, Any], size: tuple[int, int]) -> Rle | None:
        """The union of what a reference means, or `None` for nothing."""
        ids = reference["ann_id"] if isinstance(reference["ann_id"], list) else [reference["ann_id"]]
        if not ids:
            raise ValueError("reference without annotation")
        parts = []
        for number in ids:
            if number == NO_TARGET:
                continue
            annotations = self._instances.get("annotations", number)
            if not annotations:
                raise ValueError("annotation of a reference is missing")
            if annotations[0]["image_id"] != reference["image_id"]:
                raise ValueError("annotation of a reference lies in another image")
            try:
                parts.append(rle_of(annotations[0]["segmentation"], *size))
            except ValueError as error:
                if str(error) not in EMPTY:
                    raise
        return union(parts) if parts else None


class RefClef(Refer):
    SOURCE = "refclef"
    LICENSE = "annotations: Apache-2.0 (REFER); images: IAPR TC-12, free of charge"
    FOLDER = "refclef"
    REFERENCES = ("refs(unc).p",)
    IMAGES = ("images/saiapr_tc-12", "saiapr_tc-12")


class RefCoco(Refer):
    SOURCE = "refcoco"
    FOLDER = "refcoco"
    REFERENCES = ("refs(unc).p",)


class RefCocoPlus(Refer):
    SOURCE = "refcoco+"
    FOLDER = "refcoco+"
    REFERENCES = ("refs(unc).p",)


class RefCocoG(Refer):
    SOURCE = "refcocog"
    FOLDER = "refcocog"
    REFERENCES = ("refs(umd).p",)


class GRefCoco(Refer):
    """Expressions for one object, for several (one mask, their union) and for none."""

    SOURCE = "grefcoco"
    LICENSE = "annotations: terms of the gRefCOCO authors; images: COCO, each under its own Flickr licence"
    FOLDER = "grefcoco"
    REFERENCES = ("grefs(unc).json", "grefs(unc).p")


def splits_of(reference: Any) -> tuple[str, ...]:
    """
    Names of the splits a reference belongs to, none if it is malformed. Several letters name several test splits:
    `"testAB"` (in RefCLEF) is in testA and in testB.
    """
    split = reference.get("split") if isinstance(reference, Mapping) else None
    if split in ("train", "val"):
        return ("validation",) if split == "val" else ("train",)
    if not isinstance(split, str) or not split.startswith("test"):
        return ()
    letters = split.removeprefix("test")
    return tuple(f"test{letter}" for letter in letters if letter in "ABC") if letters else ("test",)


def _as_json(path: Path, folder: Path) -> Path:
    """The same list as JSON in `folder`: a pickle can only be read whole, and the rows need one image's references."""
    stat = path.stat()
    target = folder / f"{path.parent.name}-{path.stem}-{stat.st_size}-{stat.st_mtime_ns}.json"
    if not target.is_file():
        references = load_pickle(path)
        if not isinstance(references, list):
            raise ValueError(f"{path} holds no list of references but {type(references).__name__}")
        folder.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        try:
            with partial.open("w") as file:
                json.dump(references, file)
        except TypeError as error:
            raise ValueError(f"{path} holds more than lists, dicts, strings and numbers: {error}") from error
        partial.replace(target)
    return target
