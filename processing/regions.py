"""Boxes of regions: from pixels of a picture to fractions of what the vision tower sees of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from .uscdf import IMAGE_TOKEN, REGION_TOKEN

MAX_ASPECT_RATIO = 16  # of what a tower with a centre crop is shown; it sees a square in the middle
TOLERANCE = 1.0  # pixels that a box may stick out of its picture: annotations are rounded

View = tuple[float, float, float, float]
"""left, top, right, bottom in pixels of a picture; beyond its border where the tower is shown padding."""


def read_regions(
    regions: Any, text: str | Sequence[str] | None, sizes: Sequence[Sequence[int]], processor: Any
) -> tuple[np.ndarray, Any]:
    """
    The boxes that a model gets, float32 `(n, 4)`, and `text` with its own token in place of each `<region>`.

    Args:
        regions: Boxes as in `region_boxes`, or `None`.
        text: One prompt, several, or none.
        sizes: Height, width of each picture.
        processor: `MglmmProcessor`, for its `region_token`, `region_box_frame` and image processor.

    Raises:
        ValueError: regions for a model without region encoder, and all that `region_boxes` raises.
    """
    regions = [] if regions is None else regions
    prompts = [] if text is None else [text] if isinstance(text, str) else text
    token = processor.region_token or REGION_TOKEN
    images = images_of_regions(prompts, {REGION_TOKEN, token})
    if processor.region_token is None and (images or len(regions)):
        raise ValueError(
            f"{len(images)} {REGION_TOKEN} in the text and {len(regions)} regions, but this model has no region encoder: "
            "use one that has, such as an imported GLaMM, or say in words where to look"
        )
    if images:
        prompts = [prompt.replace(REGION_TOKEN, token) for prompt in prompts]
        text = prompts[0] if isinstance(text, str) else prompts
    return region_boxes(regions, images, sizes, processor.image_processor, processor.region_box_frame), text


def middle_of(size: tuple[int, int]) -> tuple[int, int, int, int]:
    """
    The middle of a very long picture of `size` (height, width), as (left, top, right, bottom): no more is left after the
    tower's centre crop, and its resize stays small. Of other pictures all.
    """
    height, width = size
    short, long = sorted(size)
    if long <= MAX_ASPECT_RATIO * short:
        return 0, 0, width, height
    # An even rest: the centre stays in place.
    kept = MAX_ASPECT_RATIO * short + (long - MAX_ASPECT_RATIO * short) % 2
    left, top = ((side - kept) // 2 if side == long else 0 for side in (width, height))
    return left, top, left + min(kept, width), top + min(kept, height)


def tower_view(size: tuple[int, int], image_processor: Any) -> View:
    """What `image_processor` shows the vision tower of a picture of `size` (height, width)."""
    left, top, right, bottom = middle_of(size) if image_processor.do_center_crop else (0, 0, size[1], size[0])
    height, width = resized = bottom - top, right - left
    wanted = dict(image_processor.size)
    if image_processor.do_resize and {"height", "width"} <= wanted.keys():
        resized = wanted["height"], wanted["width"]
    elif image_processor.do_resize and wanted.keys() == {"shortest_edge"}:
        edge = wanted["shortest_edge"]
        long = int(edge * max(resized) / min(resized))
        resized = (edge, long) if height <= width else (long, edge)
    elif image_processor.do_resize:
        raise ValueError(
            f"regions need an image processor whose size is a height and width or a shortest_edge: {wanted}"
        )
    if not image_processor.do_center_crop:
        return left, top, right, bottom
    crop = image_processor.crop_size
    step_y, step_x = height / resized[0], width / resized[1]
    view_top = top + (resized[0] - crop["height"]) // 2 * step_y
    view_left = left + (resized[1] - crop["width"]) // 2 * step_x
    return view_left, view_top, view_left + crop["width"] * step_x, view_top + crop["height"] * step_y


def images_of_regions(texts: Sequence[str], tokens: Collection[str]) -> list[int]:
    """
    For each region in `texts`, written as one of `tokens`, the number of its picture: the last `<image>` before it in its
    text, counted over all texts.

    Raises `ValueError` for a region that no image precedes.
    """
    pattern = re.compile("|".join(map(re.escape, [IMAGE_TOKEN, *tokens])))
    image, found = -1, []
    for i, text in enumerate(texts):
        seen = False
        for match in pattern.finditer(text):
            if match[0] == IMAGE_TOKEN:
                image, seen = image + 1, True
            elif not seen:
                raise ValueError(f"prompt {i} holds {match[0]} before any {IMAGE_TOKEN}: a region is one of an image")
            else:
                found.append(image)
    return found


def region_boxes(
    regions: Any,
    images: Sequence[int],
    sizes: Sequence[Sequence[int]],
    image_processor: Any,
    frame: Literal["tower", "picture"],
) -> np.ndarray:
    """
    Boxes in pixels as fractions of what the vision tower sees (`"tower"`) or of the whole picture (`"picture"`).

    Args:
        regions: `(n, 4)` numbers, x1, y1, x2, y2 in pixels of the upright picture.
        images: `(n,)` number of the picture of each region.
        sizes: Height, width of each picture.

    Returns:
        float32 `(n, 4)` in [0, 1]. What lies outside of the frame is cut off.

    Raises:
        ValueError: not as many boxes as regions, not boxes, outside of the picture, or wholly outside of what the tower
            sees: nothing could be said about it.
    """
    if len(regions) != len(images):
        raise ValueError(
            f"{len(images)} {REGION_TOKEN} in the text but {len(regions)} regions; they are matched in order, so every "
            f"{REGION_TOKEN} needs exactly one box"
        )
    if images and max(images) >= len(sizes):
        raise ValueError(
            f"{max(images) + 1} {IMAGE_TOKEN} stand before the regions of the text but {len(sizes)} images"
        )
    result = np.zeros((len(images), 4), dtype=np.float32)
    for i, (region, image) in enumerate(zip(regions, images, strict=True)):
        height, width = (int(side) for side in sizes[image])
        box = _checked(region, f"region {i}", height, width)
        view = (0, 0, width, height) if frame == "picture" else tower_view((height, width), image_processor)
        origin, extent = np.array([*view[:2]] * 2), np.array([view[2] - view[0], view[3] - view[1]] * 2)
        result[i] = ((box - origin) / extent).clip(0, 1)
        if (
            result[i, 0] >= result[i, 2] or result[i, 1] >= result[i, 3]
        ):  # as rounded, so that the model gets no empty box
            raise ValueError(
                f"region {i}, {[round(float(x), 2) for x in box]}, lies outside of what the vision tower sees of a picture of "
                f"{width} x {height} pixels, x {view[0]:.1f} to {view[2]:.1f} and y {view[1]:.1f} to {view[3]:.1f}: crop the "
                "picture around it"
            )
    return result


def _checked(region: Any, name: str, height: int, width: int) -> np.ndarray:
    """The box as float64 `(4,)` within its picture."""
    try:
        box = np.asarray(region, dtype=np.float64)
    except (TypeError, ValueError):
        box = np.empty(0)
    if box.shape != (4,):
        raise ValueError(f"{name} must be a box [x1, y1, x2, y2] in pixels, got {region!r}"[:300])
    shown = [round(float(x), 2) for x in box]
    if not np.isfinite(box).all() or box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{name}, {shown}, is no box: it needs numbers x1 < x2 and y1 < y2")
    if min(box[:2]) < -TOLERANCE or box[2] > width + TOLERANCE or box[3] > height + TOLERANCE:
        raise ValueError(
            f"{name}, {shown}, does not lie in its picture of {width} x {height} pixels: boxes are x1, y1, x2, y2 in pixels "
            "of the picture as a viewer shows it"
        )
    return box.clip(0, [width, height] * 2)


__all__ = ["images_of_regions", "middle_of", "read_regions", "region_boxes", "tower_view"]
