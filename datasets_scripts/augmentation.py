"""
Other views of an annotated image: mirrored, cropped, in other colours, with masks and labels that stay true.

It works on the record of an image, before any text is made, so that the text is right by construction.
"""

from __future__ import annotations

import hashlib
import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pycocotools import mask as mask_utils

from mglmm.processing.rle import decode_mask, encode_mask

from .labels import readable

FLIP_SHARE, CROP_SHARE, COLOUR_SHARE = 0.5, 0.8, 0.8
HUE_SHARE, GREY_SHARE = 0.5, 0.05
MIN_SIDE = 0.5  # of the image that a crop keeps
MAX_STRETCH = 4 / 3  # of the image's aspect ratio
MIN_LARGEST = 0.6  # share of the largest object that stays in the crop
CROP_TRIES = 20
MIN_REMAINING = 0.25  # share of a thing that a crop must leave for it to be asked for
MIN_PIXELS = 16
MAX_CHANGE = 0.3  # of brightness, contrast and saturation
MAX_HUE = 6  # of 256 steps around the circle
JPEG_QUALITY = 92
OTHER_SIDE = {"left": "right", "right": "left"}
SIDE = re.compile(r"(?<![^\W\d_])(left|right)(?![^\W\d_])", re.IGNORECASE)  # not within a longer word

Annotation = Mapping[str, Any]
Window = tuple[slice, slice]
"""Rows and columns that a crop keeps."""


def augment(
    picture: Image.Image, image: Mapping[str, Any], annotations: Sequence[Annotation], rng: random.Random
) -> tuple[Image.Image, dict[str, Any], list[dict[str, Any]]]:
    """
    A random view of an image and what is annotated in it.

    - Mirrored (half of the views): the words left and right change places in labels, whether they are the picture's or
      the thing's own: the mirror image of a car's left door is the right door of a car.
    - Cropped (most views) to 50 to 100 % of each side, with at least 60 % of the largest object. Nothing is resampled.
    - Other brightness, contrast, saturation and a slightly other hue (most views); a few are grey.

    Nothing that was annotated may be called absent afterwards, for a crop can leave a rest of it that is in no mask: all
    its names are `known`. What the crop leaves less than 25 % or 16 pixels of, and its parts, is not asked for.

    Args:
        picture: RGB, as it is displayed: EXIF orientation applied, `(width, height)` of the record.
        image, annotations: A record as described in `SceneBuilder.record`.
        rng: Decides alone: the same state gives the same view.

    Returns:
        The picture (RGB), the image with its new `width`, `height`, `ignore_mask` and `known` and with `grey`, whether
        its colours were taken away (so that none should be told), and new annotations in the same order, without those
        of which nothing is left. The arguments are not changed.

    Raises:
        ValueError: the picture or a mask has another size than the image, or a mask is broken.
        KeyError: the image or an annotation lacks a field.
    """
    size = int(image["height"]), int(image["width"])
    masks = [_decode(each["segmentation"], size) for each in annotations]
    if picture.size != size[::-1]:
        raise ValueError(f"picture of {picture.size} pixels, image of {size[::-1]} (width, height)")
    flip = rng.random() < FLIP_SHARE
    window = (slice(0, size[0]), slice(0, size[1]))
    if rng.random() < CROP_SHARE:
        window = _draw_window(rng, size, _largest(annotations, masks))
    views = [_view(mask, window, flip) for mask in masks]
    named = [_named(each, flip) for each in annotations]

    rows, columns = window
    picture = picture.crop((columns.start, rows.start, columns.stop, rows.stop))
    if flip:
        picture = ImageOps.mirror(picture)
    grey = False
    if rng.random() < COLOUR_SHARE:
        grey = rng.random() < GREY_SHARE
        picture = _recolour(picture, rng, grey)
    known = {swap_sides(name) if flip else name for name in image.get("known", ())}
    changed: dict[str, Any] = {
        "width": picture.width,
        "height": picture.height,
        "grey": grey,
        "known": frozenset(known | {readable(each["label"]).name for each in named}),
    }
    if image.get("ignore_mask") is not None:
        ignored = _view(_decode(image["ignore_mask"], size), window, flip)
        changed["ignore_mask"] = encode_mask(ignored) if ignored.any() else None
    return picture, {**image, **changed}, _kept(named, masks, views)


def save_picture(picture: Image.Image, folder: Path) -> Path:
    """
    Write a picture as JPEG into a folder, which is made, and return its absolute path.

    The name is a hash of the content. So a file is never out of date, and processes that write the same one, or share
    a folder without knowing of one another, do no harm.

    Raises:
        RuntimeError: the folder cannot be written, for example because the disk is full.
    """
    buffer = BytesIO()
    picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    content = buffer.getvalue()
    path = folder.absolute() / f"{hashlib.sha256(content).hexdigest()[:32]}.jpg"
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:  # not a broken image, which would only be skipped
        raise RuntimeError(f"augmented pictures cannot be written into {folder}: {error}") from error
    return path


def swap_sides(text: str) -> str:
    """
    The words left and right change places.

    Example:
        >>> swap_sides("front_left_door"), swap_sides("Right-Hand"), swap_sides("leftover bright")
        ('front_right_door', 'Left-Hand', 'leftover bright')
    """

    def other(match: re.Match[str]) -> str:
        word = match[0]
        swapped = OTHER_SIDE[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return SIDE.sub(other, text)


def _decode(rle: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    mask = decode_mask(rle)
    if mask.shape != size:
        raise ValueError(f"mask size {list(mask.shape)}, image size {list(size)} (height, width)")
    return mask


def _view(mask: np.ndarray, window: Window, flip: bool) -> np.ndarray:
    cropped = mask[window]
    return cropped[:, ::-1] if flip else cropped


def _named(annotation: Annotation, flip: bool) -> dict[str, Any]:
    return {**annotation, "label": swap_sides(annotation["label"])} if flip else dict(annotation)


def _largest(annotations: Sequence[Annotation], masks: Sequence[np.ndarray]) -> np.ndarray | None:
    """The mask of the largest object, or of the largest thing of any level where there is no object."""
    objects = [mask for each, mask in zip(annotations, masks, strict=True) if each["level"] == "object"]
    return max(objects or masks, key=np.count_nonzero, default=None)


def _draw_window(rng: random.Random, size: tuple[int, int], largest: np.ndarray | None) -> Window:
    """A crop that keeps enough of the largest object; the whole image if none was found."""
    height, width = size
    needed = 0.0 if largest is None else MIN_LARGEST * np.count_nonzero(largest)
    for _ in range(CROP_TRIES):
        shares = rng.uniform(MIN_SIDE, 1), rng.uniform(MIN_SIDE, 1)
        rows, columns = math.ceil(height * shares[0]), math.ceil(width * shares[1])
        if not 1 / MAX_STRETCH <= (columns / width) / (rows / height) <= MAX_STRETCH:
            continue
        top, left = rng.randint(0, height - rows), rng.randint(0, width - columns)
        window = slice(top, top + rows), slice(left, left + columns)
        if largest is None or np.count_nonzero(largest[window]) >= needed:
            return window
    return slice(0, height), slice(0, width)


def _kept(
    annotations: Sequence[dict[str, Any]], masks: Sequence[np.ndarray], views: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    """What is left of the annotations; those that the crop left too little of are not asked for."""
    place = {each["id"]: index for index, each in enumerate(annotations)}
    owners = [place.get(each["parent_id"]) if each["level"] == "part" else None for each in annotations]
    left = [view.any() for view in views]
    seen = list(views)
    dropped = set()
    for index, (mask, view) in enumerate(zip(masks, views, strict=True)):
        area, remaining = np.count_nonzero(mask), np.count_nonzero(view)
        if remaining < area and remaining < max(MIN_REMAINING * area, MIN_PIXELS):
            dropped.add(index)
    above = [_ancestors(index, owners) for index in range(len(annotations))]
    for index, ancestors in enumerate(above):
        for owner in ancestors:
            # Of an owner whose mask ends before its part, the part is what there is to see.
            if left[index] and not left[owner]:
                seen[owner] = seen[owner] | views[index]
    kept = []
    for index, annotation in enumerate(annotations):
        if not seen[index].any():
            continue
        rle = encode_mask(seen[index])
        changed: dict[str, Any] = {"segmentation": rle}
        if "area" in annotation:
            changed["area"] = int(mask_utils.area(rle))
        if "bbox" in annotation:
            changed["bbox"] = mask_utils.toBbox(rle).tolist()
        if dropped.intersection((index, *above[index])):
            changed["asked"] = False
        kept.append({**annotation, **changed})
    return kept


def _ancestors(index: int, owners: Sequence[int | None]) -> list[int]:
    """What a part belongs to, the nearest first; a circle in a broken annotation is walked once."""
    found: list[int] = []
    owner = owners[index]
    while owner is not None and owner != index and owner not in found:
        found.append(owner)
        owner = owners[owner]
    return found


def _recolour(picture: Image.Image, rng: random.Random, grey: bool) -> Image.Image:
    if grey:
        picture = picture.convert("L").convert("RGB")
    elif rng.random() < HUE_SHARE:
        hue, saturation, value = picture.convert("HSV").split()
        shift = rng.randint(-MAX_HUE, MAX_HUE)
        hue = hue.point([(step + shift) % 256 for step in range(256)])
        picture = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = enhancer(picture).enhance(rng.uniform(1 - MAX_CHANGE, 1 + MAX_CHANGE))
    return picture
