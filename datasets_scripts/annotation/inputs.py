"""
What is to be annotated: images with masks, from five layouts.

- `sa1b`: `*.json` of one image each, in a folder or folders in it: `image` (`file_name`, `width`, `height`) and `annotations`
  (`id`, `segmentation` as RLE, `area`, `bbox`, `predicted_iou`, `stability_score`). The pictures lie beside them, or below
  the image folder, there in the same sub-folders or in none.
- `coco`: an instances JSON; polygons, RLE and crowds are masks alike. Names of categories are known labels.
- `coco_panoptic`: a panoptic JSON, and the folder of PNGs of its name beside it or beside its folder.
- `index_png`: PNGs of one index per pixel with the names of the pictures. 0 is background and, in maps of 8 bits, 255 is
  void, unless `labels.json` (`{"1": "dog"}`) or `labels.txt` (lines `1: dog`) in the folder names them. Where there is such a
  file, it gives the known labels; indices that it lacks are masks without one.
- `uscdf`: what `mglmm prepare` writes. All rows of a picture give its masks, equal ones once; their phrases are known labels.

The id of an image is its file name below the image folder without suffix (for `sa1b` that of its annotation), for `uscdf`
its source and id.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mglmm.processing.rle import check_mask, check_size

from ..layouts import inside_any
from ..masks import read_index_image
from ..sources import inside, read_json
from .image_item import (
    BACKGROUND,
    FileItem,
    ImageItem,
    Size,
    hint_of,
    invalid_mask,
    make_mask,
    name_of,
    rles_of_map,
    sha256_of,
    size_of,
)
from .inputs_coco import find_coco, find_panoptic
from .inputs_uscdf import find_uscdf
from .records import InputMask

Kind = Literal["sa1b", "coco", "coco_panoptic", "index_png", "uscdf"]

VOID = 255
SUFFIXES = tuple(
    suffix for lower in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff") for suffix in (lower, lower.upper())
)


def find_images(kind: Kind, annotations: Path, images: Path | None = None, *, cache: Path) -> list[ImageItem]:
    """
    All images of a source, sorted by id.

    Args:
        annotations: Folder (`sa1b`, `index_png`, `uscdf`) or JSON file.
        images: Folder of the pictures, by default that of the annotations. `uscdf` needs it only if the rows hold
            references; paths outside of it are then refused.
        cache: Folder for large annotation files as databases, found again while the source is the same.

    Raises:
        FileNotFoundError: a file or folder is not there.
        ValueError: the source is of another form, or has no image.
    """
    for place in (annotations, images):
        if place is not None and not place.exists():
            raise FileNotFoundError(f"there is no {place}")
    if annotations.is_dir() == kind.startswith("coco"):
        raise ValueError(
            f"{kind} masks are in a {'JSON file' if annotations.is_dir() else 'folder'}: {annotations} is none"
        )
    root = image_root(kind, annotations, images, cache)
    if kind == "sa1b":
        items = list(_find_sa1b(annotations, root))
    elif kind == "coco":
        items = list(find_coco(annotations, root, cache))
    elif kind == "coco_panoptic":
        items = list(find_panoptic(annotations, root, cache))
    elif kind == "index_png":
        items = list(_find_maps(annotations, root))
    else:
        items = find_uscdf(annotations, images, cache)
    if not items:
        raise ValueError(f"{annotations} holds no image with masks: is it of the layout {kind}?")
    items.sort(key=lambda item: item.image_id)
    if twins := [one.image_id for one, other in zip(items, items[1:], strict=False) if one.image_id == other.image_id]:
        raise ValueError(f"{len(twins)} images of {annotations} have the name of another one, such as {twins[0]!r}")
    return items


def image_root(kind: Kind, annotations: Path, images: Path | None, run: Path) -> Path:
    """The folder below which `ImageInfo.file_name` lies; of `uscdf` it is in the run's, see `ImageItem.store_picture`."""
    if kind == "uscdf":
        return run / "pictures"
    return images or (annotations.parent if kind.startswith("coco") else annotations)


# ------------------------------------------------------------------ SA-1B


@dataclass(frozen=True)
class _Sa1bItem(FileItem):
    file: Path
    folder: str  # of the annotation, below that of all

    def _annotation(self) -> Any:
        try:
            return read_json(self.file)
        except FileNotFoundError as error:
            raise ValueError("annotation file is missing") from error
        except ValueError as error:
            reason = str(error).partition(":")[0]
            raise ValueError(reason.replace(self.file.name, "annotation file")) from error

    def _file(self) -> Path:
        return self._file_of(self._annotation()["image"])

    def _file_of(self, image: Mapping[str, Any]) -> Path:
        name = image["file_name"]
        return inside_any([self.images], f"{self.folder}/{name}", name)

    def _load(self) -> tuple[str, Size, list[InputMask]]:
        content = self._annotation()
        size = size_of(content["image"])
        masks = [_sa1b_mask(index, annotation, size) for index, annotation in enumerate(content["annotations"])]
        return self._checked_name(self._file_of(content["image"]), size), size, masks


def _find_sa1b(annotations: Path, images: Path) -> Iterator[ImageItem]:
    for file in annotations.rglob("*.json"):
        relative = file.relative_to(annotations)
        name = relative.with_suffix("").as_posix().encode("utf-8", "backslashreplace").decode()  # it may be no text
        yield _Sa1bItem(name, images, file, relative.parent.as_posix())


def _sa1b_mask(index: int, annotation: Any, size: Size) -> InputMask:
    number = annotation.get("id") if isinstance(annotation, Mapping) else None
    try:
        rle = annotation["segmentation"]
        if check_size(rle) != size:
            raise ValueError("mask size differs from the image size")
        area = int(check_mask(rle)[1::2].sum())  # expanding a hundred masks would take longer than all that follows
        if area == 0:
            raise ValueError("empty mask")
        if annotation.get("area", area) != area:
            raise ValueError("area is not that of the mask")
        x, y, width, height = annotation.get("bbox", (0, 0, 1, 1))
        if not (0 <= x <= x + width <= size[1] and 0 <= y <= y + height <= size[0]):
            raise ValueError("box leaves the image")
        iou, stability = (min(float(annotation.get(name, 1)), 1.0) for name in ("predicted_iou", "stability_score"))
        if not (math.isfinite(iou) and math.isfinite(stability)):
            raise ValueError("confidence that is no number")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        return invalid_mask(number, index, error)
    return InputMask(name_of(number, index), {"size": list(size), "counts": rle["counts"]}, iou, stability)


# ------------------------------------------------------------------ index PNG


@dataclass(frozen=True)
class _MapItem(FileItem):
    map: Path
    labels: Mapping[int, str]

    def _annotation(self) -> Any:
        return {"map": sha256_of(self.map), "labels": sorted(self.labels.items())}

    def _file(self) -> Path:
        for suffix in SUFFIXES:
            path = self.images / f"{self.image_id}{suffix}"
            if path.is_file() and path.resolve() != self.map.resolve():
                return inside(self.images, f"{self.image_id}{suffix}")
        raise ValueError("image file is missing")

    def _load(self) -> tuple[str, Size, list[InputMask]]:
        values = read_index_image(self.map)
        if values.ndim != 2:
            raise ValueError("label image holds colours instead of one index per pixel")
        size = values.shape[0], values.shape[1]
        name = self._checked_name(self._file(), size)
        ignored = {BACKGROUND, VOID} if values.dtype == np.uint8 else {BACKGROUND}
        rles = rles_of_map(values, size, ignored - self.labels.keys())
        masks = [make_mask(value, value, rle, hint_of(self.labels.get(value))) for value, rle in rles.items()]
        return name, size, masks


def _find_maps(annotations: Path, images: Path) -> Iterator[ImageItem]:
    labels = _read_labels(annotations)
    for file in annotations.rglob("*.png"):
        yield _MapItem(file.relative_to(annotations).as_posix().removesuffix(".png"), images, file, labels)


def _read_labels(folder: Path) -> dict[int, str]:
    """Raises `ValueError` that names the file and the line that cannot be read."""
    if (file := folder / "labels.json").is_file():
        content = read_json(file)
        if not isinstance(content, dict) or not all(map(str.isdecimal, content)):
            raise ValueError(f'{file} is not of the form {{"1": "dog", "2": "cat"}}')
        return {int(key): str(name) for key, name in content.items()}
    if not (file := folder / "labels.txt").is_file():
        return {}
    labels = {}
    for line in file.read_text("utf-8", errors="replace").splitlines():
        number, colon, name = line.partition(":")
        if line.strip() and not (colon and number.strip().isdecimal()):
            raise ValueError(f"{file}: a line is not 'number: name': {line!r:.80}")
        if line.strip():
            labels[int(number)] = name.strip()
    return labels
