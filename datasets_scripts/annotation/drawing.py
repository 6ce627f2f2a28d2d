"""
Pictures for a language model: numbered outlines around masks, and one object out of its surroundings.

Nothing is filled and every outline runs outside of its mask, so that no colour of an object changes (MGLMM's own figure
has a yellow surfboard that was only called so because of the overlay). Same input, same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from scipy.ndimage import distance_transform_cdt

from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_html import resize_mask

from .records import Rle

Color = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels, right and bottom exclusive

# Names that a language model uses in the same sense, neighbours far apart.
COLORS: dict[str, Color] = {
    "red": (235, 20, 30),
    "cyan": (0, 225, 235),
    "yellow": (255, 225, 0),
    "blue": (35, 70, 255),
    "green": (20, 190, 40),
    "magenta": (255, 0, 220),
    "orange": (255, 135, 0),
    "purple": (130, 30, 190),
    "white": (255, 255, 255),
    "brown": (140, 75, 25),
    "pink": (255, 165, 195),
    "black": (0, 0, 0),
}
LINE = 2  # pixels
DIMMED = 0.6  # brightness of what surrounds an object
QUALITY = 90


class Drawing(NamedTuple):
    """A picture as JPEG, and its (width, height)."""

    jpeg: bytes
    size: tuple[int, int]


class Outline(NamedTuple):
    """A mask to draw: COCO RLE of the size of the picture, the number beside it, and the name of its colour."""

    rle: Rle
    number: int
    color: str


def color_name(index: int) -> str:
    """Distinct for the first twelve; then they begin anew, and numbers tell outlines apart."""
    return list(COLORS)[index % len(COLORS)]


def drawn_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    """(width, height) of a picture with at most this long side; small ones are not enlarged."""
    scale = min(1.0, long_side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def crop_box(bbox: Sequence[int], size: tuple[int, int], margin: float, least: int = 0) -> Box:
    """
    The part of a picture that shows a box with its surroundings.

    Args:
        bbox: x, y, width, height in pixels.
        size: (width, height) of the picture, whose borders cut the result.
        margin: Share of the box by which it grows, half of it on either side.
        least: Shortest side, in pixels.

    Example:
        >>> crop_box([100, 100, 200, 100], (640, 480), 0.3)
        (70, 85, 330, 215)
    """
    sides = []
    for start, length, limit in zip(bbox[:2], bbox[2:], size, strict=True):
        wanted = min(max(round(length * (1 + margin)), least, 1), limit)
        first = min(max(round(start + length / 2 - wanted / 2), 0), limit - wanted)
        sides.append((first, first + wanted))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def draw_outlines(picture: Image.Image, outlines: Sequence[Outline], long_side: int, box: Box | None = None) -> Drawing:
    """
    The picture, or the part of it in `box`, with a numbered line around each mask.

    Raises `ValueError` if a mask is broken or of another size than the picture.
    """
    part = _part(picture, long_side, box)
    masks = [_mask(outline.rle, picture.size, box, part.size) for outline in outlines]
    for outline, mask in zip(outlines, masks, strict=True):
        _draw_line(part, mask, COLORS[outline.color])
    _draw_numbers(part, masks, outlines)
    return _encoded(part)


def draw_picture(picture: Image.Image, long_side: int, box: Box | None = None) -> Drawing:
    """The picture, or the part of it in `box`, with nothing drawn on it."""
    return _encoded(_part(picture, long_side, box))


def draw_object(picture: Image.Image, outline: Outline, long_side: int, box: Box) -> Drawing:
    """
    The part of a picture in `box` with one outline, darkened outside of its mask. The number is not drawn.

    Raises `ValueError` if the mask is broken or of another size than the picture.
    """
    part = _part(picture, long_side, box)
    mask = _mask(outline.rle, picture.size, box, part.size)
    pixels = np.asarray(part)
    dark = (pixels * DIMMED + 0.5).astype(np.uint8)
    part = Image.fromarray(np.where(mask[..., None], pixels, dark))
    _draw_line(part, mask, COLORS[outline.color])
    return _encoded(part)


def _part(picture: Image.Image, long_side: int, box: Box | None) -> Image.Image:
    part = picture.crop(box) if box else picture
    size = drawn_size(part.size, long_side)
    return part.convert("RGB").resize(size, Image.Resampling.LANCZOS) if size != part.size else part.convert("RGB")


def _mask(rle: Rle, size: tuple[int, int], box: Box | None, drawn: tuple[int, int]) -> np.ndarray:
    mask = decode_mask(rle)
    if mask.shape != size[::-1]:
        raise ValueError(f"mask of {mask.shape[1]}x{mask.shape[0]} pixels for a picture of {size[0]}x{size[1]}")
    if box:
        mask = mask[box[1] : box[3], box[0] : box[2]]
    # The middle of each pixel: ten times as fast as an average, which is needed only for what would be missed.
    rows, columns = (
        ((np.arange(length) + 0.5) * before / length).astype(int)
        for length, before in zip(drawn[::-1], mask.shape, strict=True)
    )
    sampled = mask[rows][:, columns]
    return sampled if sampled.any() else resize_mask(mask, drawn)


def _draw_line(part: Image.Image, mask: np.ndarray, color: Color) -> None:
    """A line outside of the mask; where the picture ends it is left out."""
    if not mask.any():
        return
    (top, bottom), (left, right) = (
        (int(hits[0]), int(hits[-1]) + 1) for hits in (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    )
    top, left = max(top - LINE, 0), max(left - LINE, 0)
    inside = mask[top : bottom + LINE, left : right + LINE]
    wide = np.asarray(Image.fromarray(inside).convert("L").filter(ImageFilter.MaxFilter(2 * LINE + 1))) > 0
    part.paste(color, (left, top), Image.fromarray(wide & ~inside).convert("L"))


def _draw_numbers(part: Image.Image, masks: Sequence[np.ndarray], outlines: Sequence[Outline]) -> None:
    """
    A plate for each number: in the middle of what shows of its mask where there is room, else beside the mask, and apart
    from other plates where possible.
    """
    font = _font(max(11, min(16, max(part.size) // 48)))
    draw = ImageDraw.Draw(part)
    areas = [int(mask.sum()) for mask in masks]
    by_area = sorted(range(len(masks)), key=lambda index: (areas[index], index))
    owner = np.full((part.height, part.width), -1)  # what lies in a mask covers it
    for index in reversed(by_area):
        owner[masks[index]] = index
    taken: list[tuple[float, float, float, float]] = []
    for index in by_area:  # small ones have the fewest places to choose from
        text, color = str(outlines[index].number), COLORS[outlines[index].color]
        width, height = draw.textlength(text, font=font) + 8, font.size + 5
        places = _places(owner == index, width, height) + _corners(masks[index], width, height)
        plates = [_plate(x, y, width, height, part.size) for x, y in places]
        plate = min(plates, key=lambda plate: sum(_overlap(plate, other) for other in taken))  # the first of equal ones
        taken.append(plate)
        bright = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
        ink = (0, 0, 0) if bright else (255, 255, 255)
        # The rim keeps a plate apart from a background of its own colour.
        draw.rounded_rectangle(plate, 3, fill=color, outline=ink)
        draw.text(((plate[0] + plate[2]) / 2, (plate[1] + plate[3]) / 2), text, fill=ink, font=font, anchor="mm")


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)


def _places(visible: np.ndarray, width: float, height: float) -> list[tuple[float, float]]:
    """The point furthest from the border of the mask, if a plate leaves most of the object free."""
    step = max(1, max(visible.shape) // 128)  # a coarse grid is exact enough
    depth = distance_transform_cdt(np.pad(visible[::step, ::step], 1), metric="chessboard")[1:-1, 1:-1]
    if depth.size == 0 or depth.max() * step < max(width, height):
        return []
    deepest = np.argwhere(depth == depth.max())
    y, x = deepest[np.abs(deepest - deepest.mean(axis=0)).sum(axis=1).argmin()] * step  # the most central of these
    return [(float(x), float(y))]


def _corners(mask: np.ndarray, width: float, height: float) -> list[tuple[float, float]]:
    """Points outside of the box of the mask, or the middle of the picture for an empty one."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not ys.size:
        return [(mask.shape[1] / 2, mask.shape[0] / 2)]
    left, right = xs[0] - LINE - width / 2, xs[-1] + LINE + width / 2
    top, bottom = ys[0] - LINE - height / 2, ys[-1] + LINE + height / 2
    middle_x, middle_y = (xs[0] + xs[-1]) / 2, (ys[0] + ys[-1]) / 2
    return [
        (left, top),
        (right, top),
        (middle_x, top),
        (left, middle_y),
        (right, middle_y),
        (left, bottom),
        (right, bottom),
    ]


def _plate(x: float, y: float, width: float, height: float, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The plate around a point, moved into the picture."""
    left = round(min(max(x - width / 2, 0), max(size[0] - width - 1, 0)))
    top = round(min(max(y - height / 2, 0), max(size[1] - height - 1, 0)))
    return left, top, left + round(width), top + round(height)


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _encoded(picture: Image.Image) -> Drawing:
    buffer = io.BytesIO()
    # Without subsampling, which would take the colour out of a line of two pixels.
    picture.save(buffer, "JPEG", quality=QUALITY, subsampling=0)
    return Drawing(buffer.getvalue(), picture.size)
