"""COCO compressed RLE <-> boolean masks, with the checks that untrusted input needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

try:
    from pycocotools import mask as mask_utils
except ModuleNotFoundError as error:  # copied with a model, this file may run where the package was not installed
    raise ImportError("masks are stored with pycocotools, which is missing: run `pip install pycocotools`") from error

# The largest picture Pillow opens (twice its `Image.MAX_IMAGE_PIXELS`); a mask of a bigger one cannot be meant.
MAX_MASK_PIXELS = 178_956_970


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode one mask as COCO compressed RLE that `json.dumps` accepts.

    Args:
        mask (`np.ndarray`): bool, shape (H, W).

    Returns:
        `dict`: `{"size": [H, W], "counts": str}`.

    Raises:
        ValueError: the array is not bool, not two-dimensional, or has no pixels.
    """
    if mask.dtype != np.bool_ or mask.ndim != 2 or mask.size == 0:
        raise ValueError(
            f"encode_mask takes one bool mask of shape (H, W) with at least one pixel, got {mask.dtype} {mask.shape}; "
            "threshold logits (mask > 0) or cast with mask.astype(bool) first."
        )
    rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def decode_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Decode COCO compressed RLE into a mask.

    The runs are checked and expanded here because pycocotools reads past the end of truncated counts and returns
    uninitialised memory where the runs cover too few pixels.

    Args:
        rle (`Mapping`): `{"size": [H, W], "counts": str}`, from any source.

    Returns:
        `np.ndarray`: bool, shape (H, W), C-contiguous.

    Raises:
        ValueError: size or counts are missing or of a wrong type, the mask exceeds `MAX_MASK_PIXELS`, or the runs do
            not cover exactly H * W pixels.
    """
    height, width = check_size(rle)
    runs = check_mask(rle)
    pixels = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    return np.ascontiguousarray(pixels.reshape(width, height).T)


def check_mask(rle: Mapping[str, Any]) -> np.ndarray:
    """Run lengths (int64, background first) of a mask from any source, checked like `decode_mask` but not decoded.

    Raises:
        ValueError: as `decode_mask`.
    """
    height, width = check_size(rle)
    counts = rle.get("counts")
    if not isinstance(counts, str):
        raise ValueError(f"RLE counts must be a compressed COCO string, got {type(counts).__name__}.")
    runs = _run_lengths(counts)
    # The runs are bounded one by one first, so that their sum cannot overflow.
    if runs.min() < 0 or runs.max() > height * width:
        raise ValueError(f"RLE counts hold a run outside 0..{height * width}, the pixels of size {[height, width]}.")
    if runs.sum() != height * width:
        raise ValueError(f"RLE counts cover {runs.sum()} pixels, size {[height, width]} has {height * width}.")
    return runs


def check_size(rle: Mapping[str, Any]) -> tuple[int, int]:
    """Return `(H, W)` of an RLE without decoding it.

    Raises:
        ValueError: it is no mapping, `size` is not two positive ints, or the mask exceeds `MAX_MASK_PIXELS`.
    """
    size = rle.get("size") if isinstance(rle, Mapping) else None
    if (
        not isinstance(size, (list, tuple))
        or len(size) != 2
        or not all(type(side) is int and side > 0 for side in size)
    ):
        raise ValueError(
            f"a mask must be {{'size': [height, width], 'counts': str}} with positive ints, got {rle!r:.80}."
        )
    height, width = size
    if height * width > MAX_MASK_PIXELS:
        raise ValueError(f"mask of {height}x{width} = {height * width} pixels exceeds the limit of {MAX_MASK_PIXELS}.")
    return height, width


def _run_lengths(counts: str) -> np.ndarray:
    """Run lengths (int64, background first) of a compressed counts string.

    Each number is a little-endian group of characters "0".."o" that carry five bits and a continuation bit (0x20); bit
    0x10 of the last one is the sign. From the fourth on, a number is the difference to the one two places before.
    """
    codes = np.frombuffer(counts.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64) - ord("0")
    if codes.size == 0 or codes.min() < 0 or codes.max() > 0x3F or codes[-1] & 0x20:
        raise ValueError(f"RLE counts are no complete COCO string: {counts!r:.80}.")
    last = np.flatnonzero(codes & 0x20 == 0)
    first = np.concatenate(([0], last[:-1] + 1))
    digits = last - first + 1
    if digits.max() > 7:  # 35 bits: COCO runs are 32-bit
        raise ValueError(f"RLE counts hold a number of {digits.max()} characters, at most 7 are possible.")
    place = np.arange(codes.size) - np.repeat(first, digits)
    numbers = np.add.reduceat((codes & 0x1F) << (5 * place), first)
    numbers -= np.where(codes[last] & 0x10, np.int64(1) << (5 * digits), 0)
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers
