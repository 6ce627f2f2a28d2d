"""Where published layouts put the folders that several datasets share, and how a family finds its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from .builder import UscdfBuilder
from .sources import JsonTables, first_existing, inside

SplitPatterns = Mapping[str, tuple[Sequence[str], Sequence[str]]]
"""Split -> where its annotation file may lie, and where its image folder."""

FLICKR_ROOTS = ("flickr_30k/", "flikcr_30k/", "")  # the second as GLaMM spells it
FLICKR_IMAGES = tuple(f"{root}{name}" for root in FLICKR_ROOTS for name in ("images", "train", "flickr30k-images"))


def coco_images(name: str) -> tuple[str, ...]:
    """Where published layouts keep the COCO image folder `name`, such as train2014."""
    roots = ("", "coco/", "coco_2017/", "coco_2014/", "images/", "coco/images/")
    return tuple(f"{root}{name}" for root in (*roots, "refer_seg/images/mscoco/images/", "Refer_Segm/coco_2014/"))


def flickr_annotations(part: str) -> tuple[str, ...]:
    name = f"final_flickr_mergedGT_{part}.json"
    return tuple(f"{root}{folder}{name}" for root in FLICKR_ROOTS for folder in ("", "mdetr_annotations/"))


def split_sources(builder: UscdfBuilder, splits: SplitPatterns) -> dict[str, tuple[Path, Path]]:
    """
    Annotation file and image folder of every split that the data folder holds; a split without one of them is counted as
    skipped, because annotations of all splits often come in one archive and images do not.

    Raises `FileNotFoundError` if there is no complete split.
    """
    found, missing = {}, []
    for split, (files, folders) in splits.items():
        try:
            found[split] = first_existing(builder.data_dir, *files), first_existing(builder.data_dir, *folders)
        except FileNotFoundError as error:
            missing.append(error)
            builder.skipped[f"split {split} without annotations or images"] += 1
    if not found:
        raise missing[0]
    return found


def existing(root: Path, *searches: Sequence[str]) -> list[Path]:
    """What `first_existing` finds by each search; raises its error if that is nothing."""
    found, missing = [], []
    for names in searches:
        try:
            found.append(first_existing(root, *names))
        except FileNotFoundError as error:
            missing.append(error)
    if not found:
        raise missing[0]
    return found


def inside_any(folders: Sequence[Path], *names: str) -> Path:
    """The first file that one of the folders holds under one of the names; raises the `ValueError` of `inside`."""
    for folder in folders:
        for name in names:
            try:
                return inside(folder, name)
            except ValueError as error:
                problem = error
    raise problem


class SplitTables(UscdfBuilder):
    """Families of which each split is one JSON file, read as `TABLES`, and one image folder; the first table has the items."""

    SPLITS: ClassVar[SplitPatterns] = {}
    TABLES: ClassVar[Mapping[str, tuple[str, str]]] = {
        "images": ("images.item", "id"),
        "annotations": ("annotations.item", "image_id"),
    }

    def items(self) -> dict[str, Sequence[Any]]:
        self._sources: dict[str, tuple[JsonTables, Path]] = {}
        items: dict[str, Sequence[Any]] = {}
        for split, (file, folder) in split_sources(self, self.SPLITS).items():
            tables = self.tables(file, **self.TABLES)
            self._sources[split] = tables, folder
            items[split] = [(split, key) for key in tables.keys(next(iter(self.TABLES)))]
        return items
