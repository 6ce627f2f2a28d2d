"""Files of annotated pictures, and what is shown of what was read from them."""

import json
from pathlib import Path
from typing import Any

import PIL.Image
from PIL import ExifTags

from mglmm.datasets_scripts.annotation.image_item import ImageItem
from mglmm.datasets_scripts.annotation.records import InputMask
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)  # height, width
CAT, DOG = (5, 5, 25, 35), (30, 10, 50, 30)
CAT_RLE, DOG_RLE = box_rle(SIZE, CAT), box_rle(SIZE, DOG)


def write_picture(path: Path, size: tuple[int, int] = SIZE, *, orientation: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = PIL.Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    PIL.Image.new("RGB", size[::-1], (90, 120, 30)).save(path, exif=exif)
    return path


def write_json(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def one(items: list[ImageItem]) -> ImageItem:
    (item,) = items
    return item


def shown(masks: list[InputMask]) -> list[tuple[Any, ...]]:
    return [(mask.ann_id, mask.rle, mask.known_label) for mask in masks]
