"""A picture of an answer with its masks: overlay, legend beside it, caption below."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from .segment import Segment

Color = tuple[int, int, int]

# Bright enough to show on photographs, in an order that keeps neighbours apart.
_PALETTE = (
    "ff4a4a 2e8bff 1fbf68 ffae1a a259ff 10bfd3 ff69b0 86cf00 ff7a1f 5a6bff 00a48e c48a55 d64dff d8c400 6f9dc0 b9405c"
)
_PICTURE = 960  # long side of the picture, all lengths in pixels
_MARGIN = 24
_LEGEND = 300  # width of a legend column
_ROW = 54
_BADGE = 15  # radius
_LINE, _PAD = 38, 5  # distance of caption lines, padding of a phrase in the caption
_INK, _GREY, _PAPER = (28, 31, 38), (110, 116, 128), (255, 255, 255)


def segment_color(index: int) -> Color:
    """RGB of the segment at `index`: hand-picked ones first, then ever new hues."""
    palette = [bytes.fromhex(code) for code in _PALETTE.split()]
    if index < len(palette):
        red, green, blue = palette[index]
        return red, green, blue
    # The golden ratio spreads hues evenly however many there are.
    rgb = colorsys.hls_to_rgb(index * 0.618034 % 1, 0.5 + 0.08 * (index % 3 - 1), 0.75)
    return round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def ink_color(color: Color) -> Color:
    """The colour darkened until it reads as text on white (contrast of at least 4.5)."""
    while _luminance(color) > 0.18:
        color = (color[0] * 95 // 100, color[1] * 95 // 100, color[2] * 95 // 100)
    return color


def printable(text: str) -> str:
    """The text with a space for each character that cannot be shown (controls, lone surrogates); line breaks stay."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)


def caption_parts(caption: str, segments: Sequence[Segment]) -> list[tuple[str, list[int]]]:
    """Cut a caption into `(text, indices of the segments whose span this is)`; a span that overlaps an earlier one is
    left to the legend."""
    at_span: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(segments):
        if segment.span is not None:
            at_span.setdefault(segment.span, []).append(index)
    parts: list[tuple[str, list[int]]] = []
    cursor = 0
    for (start, end), indices in sorted(at_span.items()):
        if start >= cursor:
            parts += [(caption[cursor:start], []), (caption[start:end], indices)]
            cursor = end
    parts.append((caption[cursor:], []))
    return [(printable(text), indices) for text, indices in parts if text]


def render_plot(image: Image.Image, caption: str, segments: Sequence[Segment]) -> Image.Image:
    """Draw `segments` over `image` (both H x W) beside a legend, with the caption below.

    Returns:
        `PIL.Image.Image`: RGB; the picture in it has a long side of 960 pixels.
    """
    picture = _overlay(image, segments)
    columns = -(-len(segments) * _ROW // max(picture.height, 8 * _ROW))
    rows = -(-len(segments) // columns) if columns else 0
    # A panorama or a tall strip still leaves room for the caption.
    width = max(picture.width + columns * (_LEGEND + _MARGIN), 640) + 2 * _MARGIN
    words = _layout_caption(caption, segments, width - 2 * _MARGIN)
    caption_height = (words[-1][1] + _LINE) if words else 0
    body = max(picture.height, rows * _ROW)
    page = Image.new("RGB", (width, 2 * _MARGIN + body + (_MARGIN + caption_height if words else 0)), _PAPER)
    page.paste(picture, (_MARGIN, _MARGIN))
    draw = ImageDraw.Draw(page)
    for index, segment in enumerate(segments):
        column, row = divmod(index, rows)
        x = 2 * _MARGIN + picture.width + column * (_LEGEND + _MARGIN)
        _draw_legend_row(page, x, _MARGIN + row * _ROW, index, segment)
    _draw_caption(draw, words, _MARGIN, 2 * _MARGIN + body)
    return page


def display_size(image: Image.Image, long_side: int) -> tuple[int, int]:
    """(width, height) of the image scaled to a long side, at least one pixel each."""
    scale = long_side / max(image.size)
    return max(1, round(image.width * scale)), max(1, round(image.height * scale))


def _overlay(image: Image.Image, segments: Sequence[Segment]) -> Image.Image:
    """The picture with filled and outlined masks and numbered badges. Small masks lie on top of big ones."""
    size = display_size(image, _PICTURE)
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    order = sorted((i for i, segment in enumerate(segments) if segment.area), key=lambda i: -segments[i].area)
    fill, cover = Image.new("RGB", size), Image.new("L", size)
    soft = {}
    for index in order:
        mask = Image.fromarray(segments[index].mask).convert("L").resize(size, Image.Resampling.BICUBIC)
        # Blurred masks make smooth outlines: 128 is the border of the mask, about two pixels further 23 and 232.
        soft[index] = mask.filter(ImageFilter.GaussianBlur(1.5))
        inside = soft[index].point(_ramp(96, 160))
        fill.paste(segment_color(index), mask=inside)
        cover = ImageChops.lighter(cover, inside)
    picture.paste(fill, mask=cover.point([round(0.4 * value) for value in range(256)]))
    for position, index in enumerate(order):
        # The outline of an object runs outside its own pixels, where the outlines of its parts leave it visible.
        is_whole = any(covers(segments[index], segments[part]) for part in order[position + 1 :])
        outer, inner = (_ramp(4, 17), _ramp(135, 167)) if is_whole else (_ramp(100, 132), _ramp(225, 243))
        edge = soft[index].point([begin - end for begin, end in zip(outer, inner, strict=True)])
        picture.paste(segment_color(index), mask=edge)
    for index, center in _badge_centers(segments, order, size).items():
        _paste_badge(picture, center, index)
    return picture


def _ramp(start: int, stop: int) -> list[int]:
    """Table for `Image.point`: 0 up to `start`, 255 from `stop` on."""
    return [min(255, max(0, 255 * (value - start) // (stop - start))) for value in range(256)]


def covers(whole: Segment, part: Segment) -> bool:
    """Whether nearly all pixels of the part belong to the whole."""
    x1, y1, x2, y2 = part.box
    return int(np.count_nonzero(whole.mask[y1:y2, x1:x2] & part.mask[y1:y2, x1:x2])) >= 0.9 * part.area


def _badge_centers(segments: Sequence[Segment], order: list[int], size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """A point (x, y) well inside the visible part of each mask, apart from the other points where possible."""
    width, height = size
    # A grid of coarse cells is exact enough and makes the erosion below cheap.
    grid = (max(1, width // 8), max(1, height // 8))
    owner = np.full(grid[::-1], -1)
    cells = {}
    for index in order:
        cover = np.asarray(Image.fromarray(segments[index].mask).convert("L").resize(grid, Image.Resampling.BOX))
        cells[index] = cover >= min(128, cover.max())  # at least one cell, however small the mask
        owner[cells[index]] = index
    centers: dict[int, tuple[int, int]] = {}
    for index in reversed(order):  # small ones have the fewest places to choose from
        depth = _depth(owner == index)
        if depth.max() > 1:
            badness = -depth.astype(float)
        else:  # little of it shows between its parts: sit on the top of its outline
            depth = _depth(cells[index]) == 1
            badness = np.broadcast_to(np.arange(grid[1])[:, None], depth.shape).astype(float)
        ys, xs = np.nonzero(depth)
        points = np.stack([(xs + 0.5) * width / grid[0], (ys + 0.5) * height / grid[1]], axis=1)
        badness = badness[ys, xs]
        badness += 1e-3 * np.linalg.norm(points - points.mean(axis=0), axis=1)  # of equal ones the most central
        for taken in centers.values():
            badness[np.linalg.norm(points - taken, axis=1) < 2.3 * _BADGE] += 1e6
        x, y = points[badness.argmin()]
        centers[index] = (
            int(min(max(x, _BADGE), max(width - _BADGE, 0))),
            int(min(max(y, _BADGE), max(height - _BADGE, 0))),
        )
    return centers


def _depth(mask: np.ndarray) -> np.ndarray:
    """How often a cell (of a bool array) survives erosion; the outside counts as background."""
    depth = np.zeros(mask.shape, dtype=np.int32)
    mask = np.pad(mask, 1)
    while mask.any():
        depth += mask[1:-1, 1:-1]
        inner = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
        mask = np.pad(inner, 1)
    return depth


def _paste_badge(page: Image.Image, center: tuple[int, int], index: int) -> None:
    """A numbered disc, drawn four times as large and reduced: Pillow's circles have stairs."""
    color = segment_color(index)
    badge = Image.new("RGBA", (8 * _BADGE, 8 * _BADGE), (255, 255, 255, 0))
    draw = ImageDraw.Draw(badge)
    middle = (4 * _BADGE, 4 * _BADGE)
    draw.circle(middle, 4 * _BADGE - 2, fill=_PAPER)
    draw.circle(middle, 4 * _BADGE - 8, fill=color)
    ink = _INK if _luminance(color) > 0.3 else _PAPER
    draw.text(middle, str(index + 1), font=_font(4 * (14 if index < 99 else 11), bold=True), fill=ink, anchor="mm")
    badge = badge.resize((2 * _BADGE, 2 * _BADGE), Image.Resampling.LANCZOS)
    page.paste(badge, (center[0] - _BADGE, center[1] - _BADGE), mask=badge)


def _draw_legend_row(page: Image.Image, x: int, y: int, index: int, segment: Segment) -> None:
    _paste_badge(page, (x + _BADGE, y + 21), index)
    draw = ImageDraw.Draw(page)
    left = x + 2 * _BADGE + 14
    font = _font(17, bold=True)
    phrase = printable(segment.phrase).replace("\n", " ")
    if font.getlength(phrase) > x + _LEGEND - left:
        while phrase and font.getlength(phrase + "…") > x + _LEGEND - left:
            phrase = phrase[:-1]
        phrase = phrase.rstrip() + "…"
    draw.text((left, y + 2), phrase, font=font, fill=ink_color(segment_color(index)))
    share = segment.area / segment.mask.size
    detail = (
        f"score {segment.score:.2f}   area {share:.1%}" if segment.area else f"score {segment.score:.2f}   empty mask"
    )
    draw.text((left, y + 25), detail, font=_font(13), fill=_GREY)


def _layout_caption(
    caption: str, segments: Sequence[Segment], width: int
) -> list[tuple[int, int, str, list[int], int]]:
    """Words of the caption as (x, y, word, segments, width); a word that follows without a space sticks to the last."""
    regular, bold = _font(20), _font(20, bold=True)
    space = round(regular.getlength(" "))
    words: list[tuple[int, int, str, list[int], int]] = []
    x = y = 0
    glue = True  # no space since the last word
    for text, indices in caption_parts(caption, segments):
        font = bold if indices else regular
        x += _PAD if indices else 0
        for line_number, line in enumerate(text.split("\n")):
            if line_number:
                x, y, glue = 0, y + _LINE, True
            for position, word in enumerate(line.split(" ")):
                glue = glue and position == 0
                for chunk in _chunks(word, font, width):
                    chunk_width = round(font.getlength(chunk))
                    x += 0 if glue else space
                    # Punctuation may hang over the margin rather than part from its word.
                    if x and x + chunk_width > width + (_MARGIN - _PAD if glue else 0):
                        x, y = 0, y + _LINE
                    words.append((x, y, chunk, indices, chunk_width))
                    x += chunk_width
                    glue = True
            glue = not line.endswith(" ")
        x += _PAD if indices else 0
    return words


def _chunks(word: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """The word, or its parts where it is wider than a line (scripts without spaces)."""
    if font.getlength(word) <= width:
        return [word] if word else []
    middle = len(word) // 2
    return _chunks(word[:middle], font, width) + _chunks(word[middle:], font, width) if middle else [word]


def _draw_caption(
    draw: ImageDraw.ImageDraw, words: list[tuple[int, int, str, list[int], int]], left: int, top: int
) -> None:
    for number, (x, y, _, indices, width) in enumerate(words):
        if indices:
            red, green, blue = segment_color(indices[0])
            tint = tuple(255 - (255 - channel) * 22 // 100 for channel in (red, green, blue))
            follows = number + 1 < len(words) and words[number + 1][3] == indices and words[number + 1][1] == y
            right = words[number + 1][0] if follows else x + width + _PAD
            begins = number == 0 or words[number - 1][3] != indices or words[number - 1][1] != y
            corners = (begins, not follows, not follows, begins)
            box = (left + x - (_PAD if begins else 0), top + y, left + right, top + y + 30)
            draw.rounded_rectangle(box, radius=6, fill=tint, corners=corners)
    for x, y, word, indices, _ in words:
        color = ink_color(segment_color(indices[0])) if indices else _INK
        draw.text((left + x, top + y + 15), word, font=_font(20, bold=bool(indices)), fill=color, anchor="lm")


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        from matplotlib import get_data_path
    except ImportError:
        return ImageFont.load_default(size)  # knows ASCII only
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)


def _luminance(color: Color) -> float:
    """Relative luminance of an sRGB colour as WCAG defines it, 0 to 1."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
