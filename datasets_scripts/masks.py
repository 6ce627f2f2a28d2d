"""Masks of every published form -> COCO compressed RLE: polygons, RLE (compressed or not), bitmaps, index images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
from pycocotools import mask as mask_utils

from mglmm.processing.rle import check_size, decode_mask, encode_mask

Rle = dict[str, Any]
MAX_LABEL_PIXELS = 10**8


def rle_of(segmentation: Any, height: int, width: int) -> Rle:
    """
    The union of everything in a COCO `segmentation`, clipped to {0, 1} and to the image.

    Args:
        segmentation: List of polygons `[x1, y1, x2, y2, ...]` in pixels, RLE dict with a list (uncompressed), string or
            bytes as `counts`, or a list of such RLE dicts.

    Raises:
        ValueError: the form is none of these, a polygon has fewer than three points or a coordinate that is no number, or
            an RLE is broken or of another size.
    """
    parts = segmentation if isinstance(segmentation, list) else [segmentation]
    if not parts:
        raise ValueError("empty segmentation")
    polygons = [part for part in parts if isinstance(part, list)]
    rles = [_checked_rle(part, height, width) for part in parts if not isinstance(part, list)]
    if polygons:
        rles += mask_utils.frPyObjects([_checked_polygon(part) for part in polygons], height, width)
    return union(rles)


def union(rles: Iterable[Mapping[str, Any]]) -> Rle:
    """The union of RLEs of one size; raises `ValueError` if there is none or it is empty."""
    rles = list(rles)
    if not rles:
        raise ValueError("no mask")
    merged = mask_utils.merge(rles) if len(rles) > 1 else rles[0]
    if mask_utils.area(merged) == 0:
        raise ValueError("empty mask")
    counts = merged["counts"]
    return {
        "size": [int(side) for side in merged["size"]],
        "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts,
    }


def area(rle: Mapping[str, Any]) -> int:
    return int(mask_utils.area(rle))


def _checked_polygon(points: Sequence[Any]) -> list[float]:
    if len(points) < 6 or len(points) % 2:
        raise ValueError("polygon of fewer than three points")
    if not all(isinstance(value, int | float) and np.isfinite(value) for value in points):
        raise ValueError("polygon with a coordinate that is no number")
    return [float(value) for value in points]


def _checked_rle(part: Any, height: int, width: int) -> Rle:
    if not isinstance(part, Mapping):
        raise ValueError(f"segmentation is neither polygons nor RLE but {type(part).__name__}")
    size = list(part.get("size", []))
    if size != [height, width]:
        raise ValueError("mask size differs from the image size")
    counts = part.get("counts")
    if isinstance(counts, list):
        if not all(type(run) is int and run >= 0 for run in counts) or sum(counts) != height * width:
            raise ValueError("uncompressed RLE does not cover the image")
        compressed = mask_utils.frPyObjects({"size": size, "counts": counts}, height, width)
        return {"size": size, "counts": compressed["counts"].decode("ascii")}
    rle = {"size": size, "counts": counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts}
    check_size(rle)
    decode_mask(rle)  # raises on truncated or overlong runs, on which pycocotools reads foreign memory
    return rle


def read_index_image(path: Path | BinaryIO) -> np.ndarray:
    """
    An index, grey or colour PNG as an array: `(H, W)` integers, or `(H, W, 3)` uint8 for colours.

    Raises:
        ValueError: it cannot be read or has more pixels than the limit.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.size[0] * image.size[1] > MAX_LABEL_PIXELS:
                raise ValueError(f"label image of more than {MAX_LABEL_PIXELS:,} pixels")
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image.convert("RGB"))
            return np.asarray(image)  # palettes stay indices
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"label image cannot be read ({type(error).__name__})") from error


def rles_of_values(values: np.ndarray, ignored: Iterable[int] = ()) -> dict[int, Rle]:
    """One RLE for each value of an integer array `(H, W)`, but for those in `ignored`."""
    skip = set(ignored)
    return {int(v): encode_mask(values == v) for v in np.unique(values) if int(v) not in skip}
