"""COCO's JSON as the source of masks: instances and panoptic."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..coco import read_segment_map
from ..labels import readable
from ..masks import rle_of
from ..sources import JsonTables, first_existing, inside
from .image_item import (
    BACKGROUND,
    FileItem,
    ImageItem,
    Size,
    hint_of,
    invalid_mask,
    make_mask,
    rles_of_map,
    sha256_of,
    size_of,
)
from .records import InputMask


@dataclass(frozen=True)
class _CocoItem(FileItem):
    tables: JsonTables
    key: int | str

    def _annotation(self) -> Any:
        tables = copy.copy(self.tables)  # with a connection of its own, which is this thread's
        image, entries = tables.one("images", self.key), tables.get("annotations", self.key)
        segments = [
            part for entry in entries for part in (entry["segments_info"] if "segments_info" in entry else [entry])
        ]
        numbers = [segment.get("category_id") for segment in segments]
        known = sorted({number for number in numbers if isinstance(number, int | str)}, key=str)
        names = [[number, category["name"]] for number in known for category in tables.get("categories", number)]
        return {"image": image, "entries": entries, "names": names}

    def _file(self) -> Path:
        return inside(self.images, copy.copy(self.tables).one("images", self.key)["file_name"])

    def _load(self) -> tuple[str, Size, list[InputMask]]:
        content = self._annotation()
        labels = {number: _category_hint(name) for number, name in content["names"]}
        size = size_of(content["image"])
        return self._checked_name(self._file(), size), size, self._masks(content["entries"], size, labels)

    def _masks(self, entries: list[Any], size: Size, labels: Mapping[Any, str | None]) -> list[InputMask]:
        masks = []
        for index, entry in enumerate(entries):
            try:
                rle = rle_of(entry["segmentation"], *size)
                masks.append(make_mask(entry.get("id"), index, rle, labels.get(entry.get("category_id"))))
            except (KeyError, TypeError, ValueError) as error:
                masks.append(invalid_mask(entry.get("id"), index, error))
        return masks


@dataclass(frozen=True)
class _PanopticItem(_CocoItem):
    maps: Path

    def _annotation(self) -> Any:
        content = super()._annotation()
        content["map"] = sha256_of(self._map(content["entries"])) if content["entries"] else None
        return content

    def _map(self, entries: list[Any]) -> Path:
        return inside(self.maps, entries[0]["file_name"], "label image")

    def _masks(self, entries: list[Any], size: Size, labels: Mapping[Any, str | None]) -> list[InputMask]:
        if not entries:
            return []
        rles = rles_of_map(read_segment_map(self._map(entries)), size, {BACKGROUND})
        masks = []
        for index, segment in enumerate(entries[0]["segments_info"]):
            rle = rles.pop(segment["id"], None)
            if rle is None:
                masks.append(invalid_mask(segment["id"], index, ValueError("segment without a pixel")))
            else:
                masks.append(make_mask(segment["id"], index, rle, labels.get(segment.get("category_id"))))
        return masks + [make_mask(number, number, rle, None) for number, rle in rles.items()]


def _tables(annotations: Path, cache: Path) -> JsonTables:
    tables = {
        "images": ("images.item", "id"),
        "annotations": ("annotations.item", "image_id"),
        "categories": ("categories.item", "id"),
    }
    return JsonTables(annotations, tables, cache)


def find_coco(annotations: Path, images: Path, cache: Path) -> Iterator[ImageItem]:
    tables = _tables(annotations, cache)
    for key, entry in tables.all("images"):
        yield _CocoItem(_coco_id(key, entry), images, tables, key)


def find_panoptic(annotations: Path, images: Path, cache: Path) -> Iterator[ImageItem]:
    name = annotations.stem
    maps = first_existing(
        annotations.parent if (annotations.parent / name).is_dir() else annotations.parent.parent, name
    )
    tables = _tables(annotations, cache)
    for key, entry in tables.all("images"):
        yield _PanopticItem(_coco_id(key, entry), images, tables, key, maps)


def _category_hint(name: object) -> str | None:
    """ "sky-other-merged" -> "sky"."""
    return hint_of(readable(name).name) if isinstance(name, str) and hint_of(name) else None


def _coco_id(key: object, entry: Any) -> str:
    name = entry.get("file_name") if isinstance(entry, Mapping) else None
    path = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    return path.with_suffix("").as_posix() if path.name else f"image {key}"  # such an entry fails when it is loaded
