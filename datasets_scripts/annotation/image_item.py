"""An image that is to be annotated, whatever its layout, and what reading one takes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from mglmm.processing.images import load_image

from ..builder import reason_of
from ..masks import rles_of_values
from ..sources import check_image_size
from .config import digest_of
from .records import ImageInfo, InputMask, Rle

Size = tuple[int, int]  # height, width

BACKGROUND = 0
MAX_VALUES = 2000  # of a map; one with more is a photograph
MAX_LABEL = 80  # characters of a hint


@dataclass(frozen=True)
class ImageItem:
    """
    An image and where its masks are. It pickles, and its methods may be called in any process and thread.

    Every method raises `ValueError` with one line that says what is wrong and does not name the image.
    """

    image_id: str

    def fingerprint(self) -> str:
        """sha256 of the annotation that the masks are made of."""
        with reasons():
            return digest_of(self._annotation())

    def load(self) -> tuple[ImageInfo, list[InputMask]]:
        """
        The image and its masks at its displayed size; a mask of no use says so in `invalid`.

        Raises `ValueError` also if there is no mask, or the picture is missing, broken or of another size.
        """
        with reasons():
            file_name, (height, width), masks = self._load()
        if not masks:
            raise ValueError("image without a mask")
        return {"image_id": self.image_id, "file_name": file_name, "width": width, "height": height}, masks

    def picture(self) -> PIL.Image.Image:
        """RGB, as displayed."""
        with reasons():
            content = self._picture()
        try:
            return load_image(content)
        except ValueError as error:
            raise ValueError(str(error).replace("image (bytes)", "image")) from error

    def store_picture(self, folder: Path) -> None:
        """Put the picture as it is encoded below the image root `folder`, where that is not where it lies already."""

    def _annotation(self) -> Any:
        """JSON that decides what `_load` gives."""
        raise NotImplementedError

    def _load(self) -> tuple[str, Size, list[InputMask]]:
        """File name below the image root, size, and masks."""
        raise NotImplementedError

    def _picture(self) -> bytes:
        raise NotImplementedError


def hint_of(name: object) -> str | None:
    """A name from a source as a hint for a prompt: words alone, so that it cannot give it another meaning."""
    words = re.sub(r"[^\w'-]+|_", " ", name).split() if isinstance(name, str) else []
    while len(" ".join(words)) > MAX_LABEL:
        words.pop()
    return " ".join(words) or None


@contextmanager
def reasons() -> Iterator[None]:
    """Whatever a malformed annotation leads to becomes a `ValueError` that reads the same for all such images."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(reason_of(error)) from error
    except OSError as error:
        raise ValueError(f"file cannot be read ({type(error).__name__})") from error


def size_of(entry: Mapping[str, Any]) -> Size:
    """(height, width) of an image's entry."""
    size = entry["height"], entry["width"]
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError("image size is not two positive integers")
    return size


def make_mask(ann_id: object, index: int, rle: Rle, label: str | None) -> InputMask:
    return InputMask(name_of(ann_id, index), rle, known_label=label)


def invalid_mask(ann_id: object, index: int, error: Exception) -> InputMask:
    reason = reason_of(error)
    # What is wrong with the runs differs from mask to mask.
    broken = reason.startswith(("RLE ", "a mask must be", "mask of "))
    return InputMask(name_of(ann_id, index), {}, invalid="broken RLE" if broken else reason)


def name_of(ann_id: object, index: int) -> int | str:
    return ann_id if type(ann_id) is int or isinstance(ann_id, str) else index


@dataclass(frozen=True)
class FileItem(ImageItem):
    """An image whose picture is a file below `images`."""

    images: Path

    def _file(self) -> Path:
        raise NotImplementedError

    def _checked_name(self, file: Path, size: Size) -> str:
        check_image_size(file, *size)
        return file.relative_to(self.images.resolve()).as_posix()

    def _picture(self) -> bytes:
        return self._file().read_bytes()


def rles_of_map(values: np.ndarray, size: Size, ignored: set[int]) -> dict[int, Rle]:
    """The mask of each value of an integer map (H, W) of an image of that size."""
    if values.shape != size:
        raise ValueError("mask size differs from the image size")
    if len(np.unique(values)) > MAX_VALUES:
        raise ValueError(f"label image holds more than {MAX_VALUES:,} values: is it a photograph?")
    return rles_of_values(values, ignored)


def sha256_of(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise ValueError("label image is missing") from error
