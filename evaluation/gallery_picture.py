"""A picture of an answer beside the truth: predicted masks filled, true masks outlined, a legend at the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from pycocotools import mask as mask_utils
from scipy.ndimage import distance_transform_edt, maximum_filter, minimum_filter

from mglmm.evaluation.benchmarks import ground_truth, phrase_of
from mglmm.evaluation.held_out import DESCRIPTIONS
from mglmm.evaluation.mask_pairs import greedy_pairs
from mglmm.evaluation.metrics.referring_segmentation import union
from mglmm.processing import SegCap
from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_plot import Color, ink_color, printable, segment_color

_SIDE = 400  # long side of the photograph's frame; all lengths in pixels
_FINE = 2  # it is drawn so much larger and then reduced, which smooths the edges
_MARGIN, _GAP = 12, 22
_NUMBER, _PHRASE, _VALUE = 30, 170, 42  # widths of the legend's columns
_LINE, _BETWEEN = 18, 8  # heights
_RADIUS = 10  # of a numbered disc
_INK, _GREY, _PAPER = (28, 31, 38), (110, 116, 128), (255, 255, 255)
_OTHER, _OTHER_EDGE = (238, 239, 242), (203, 206, 213)
_COLORS = 128  # of a picture without a photograph


@dataclass(frozen=True, eq=False)
class Pair:
    """
    What the answer marks and what it should have marked.

    Attributes:
        answer, truth: Phrases; `None` where nothing was marked, or nothing should have been.
        answer_mask, truth_mask: bool `(H, W)` of the photograph; `None` where the phrase is.
        iou: Of the two masks, 0 to 1; `None` without a true mask.
    """

    answer: str | None = None
    truth: str | None = None
    answer_mask: np.ndarray | None = None
    truth_mask: np.ndarray | None = None
    iou: float | None = None


def render_pairs(
    pairs: Sequence[Pair],
    others: Sequence[tuple[str, np.ndarray]],
    size: tuple[int, int],
    photograph: Image.Image | None = None,
) -> Image.Image:
    """
    Draw the masks on plain paper, or over a photograph.

    Args:
        pairs: A row of the legend each. The two masks of a pair have one colour, an outline without an answer is black.
        others: Phrases and masks, bool `(H, W)`, of what else is known to be there; pale grey, and left out over a
            photograph.
        size: Height and width of the photograph.
        photograph: Drawn over where given.

    Returns:
        A palette picture of 128 colours; over a photograph RGB.

    Raises:
        ValueError: a mask or the photograph has another size than `size`.
    """
    masks = [mask for pair in pairs for mask in (pair.answer_mask, pair.truth_mask) if mask is not None]
    others = [] if photograph is not None else others
    shapes = {mask.shape for mask in (*masks, *(mask for _, mask in others))}
    shapes |= {photograph.size[::-1]} if photograph is not None else set()
    if shapes - {size}:
        raise ValueError(
            f"masks or a photograph of the sizes {sorted(shapes)} where {size} is expected (height, width)"
        )
    frame = _frame(pairs, [mask for _, mask in others], size, photograph)
    legend = _legend(pairs, [phrase for phrase, _ in others])
    page = Image.new(
        "RGB",
        (2 * _MARGIN + frame.width + _GAP + legend.width, 2 * _MARGIN + max(frame.height, legend.height)),
        _PAPER,
    )
    page.paste(frame, (_MARGIN, _MARGIN))
    page.paste(legend, (_MARGIN + frame.width + _GAP, _MARGIN))
    return page if photograph is not None else page.quantize(_COLORS, dither=Image.Dither.NONE)


def pairs_of(row: Mapping[str, Any], answer: SegCap, value: float | None) -> list[Pair]:
    """
    What the evaluation measures against what: in descriptions mask against mask, else all masks against the target.

    Args:
        row: The USCDF row of the question.
        answer: To it.
        value: IoU that the evaluation gave the answer; `None` where there is no target.

    Returns:
        In the order of the answer's masks those with a partner, then those without; then the true masks that were missed.
    """
    shape, segments = answer.image_size, answer.segments
    truths = [decode_mask(mask) for mask in row["masks"]]
    if row["task"] not in DESCRIPTIONS:
        if not segments and not truths:
            return []
        said = "; ".join(dict.fromkeys(segment.phrase for segment in segments)) if segments else None
        masks = (union([segment.mask for segment in segments], shape) if segments else None,)
        return [Pair(said, phrase_of(row) if truths else None, *masks, union(truths, shape) if truths else None, value)]
    labels, _ = ground_truth(row)
    # Equal IoUs are decided as `SegCapScore` decides them.
    order = sorted(range(len(segments)), key=lambda i: (-segments[i].score, _counts(segments[i].mask)))
    truth_order = sorted(range(len(truths)), key=lambda i: row["masks"][i]["counts"])
    ious = np.zeros((len(order), len(truth_order)))
    if ious.size:
        encoded = [_encoded(segments[i].mask) for i in order], [_encoded(truths[i]) for i in truth_order]
        ious = mask_utils.iou(*encoded, [0] * len(truths))
    partner = {order[a]: (truth_order[b], float(ious[a, b])) for a, b in greedy_pairs(ious)}
    pairs = []
    for index, segment in enumerate(segments):
        if index in partner:
            truth, iou = partner[index]
            pairs.append(Pair(segment.phrase, labels[truth], segment.mask, truths[truth], iou))
        else:
            pairs.append(Pair(segment.phrase, None, segment.mask))
    found = {truth for truth, _ in partner.values()}
    missed = [index for index in range(len(truths)) if index not in found]
    pairs.sort(key=lambda pair: pair.truth is None)
    return pairs + [Pair(None, labels[i], None, truths[i], 0.0) for i in missed]


def _encoded(mask: np.ndarray) -> dict[str, Any]:
    encoded: dict[str, Any] = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
    return encoded


def _counts(mask: np.ndarray) -> str:
    return str(_encoded(mask)["counts"], "ascii")


# ------------------------------------------------------------------ the masks


def _frame(
    pairs: Sequence[Pair], others: Sequence[np.ndarray], size: tuple[int, int], photograph: Image.Image | None
) -> Image.Image:
    scale = _SIDE / max(size)
    width, height = (max(1, round(side * scale)) for side in size[::-1])
    large = (width * _FINE, height * _FINE)
    picture = Image.new("RGB", large, _PAPER)
    if photograph is not None:
        picture = photograph.convert("RGB").resize(large, Image.Resampling.LANCZOS)
    for mask in sorted(others, key=lambda mask: -int(mask.sum())):  # small ones lie on top
        cover = _resized(mask, large)
        picture.paste(_OTHER, mask=cover)
        picture.paste(_OTHER_EDGE, mask=_edge(cover, 3))
    covers = [None if pair.answer_mask is None else _resized(pair.answer_mask, large) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda index: -_area(pairs[index].answer_mask))
    for index in order:
        if (answer := covers[index]) is not None:
            picture.paste(segment_color(index), mask=answer.point([value * 45 // 100 for value in range(256)]))
    for index in sorted(range(len(pairs)), key=lambda index: -_area(pairs[index].truth_mask)):
        if (truth := pairs[index].truth_mask) is not None:
            outline = _resized(truth, large)
            picture.paste(_PAPER, mask=_edge(outline, 9))  # a rim, so that it is seen on any ground
            picture.paste(_line_color(pairs[index], index), mask=_edge(outline, 5))
    picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    if len(pairs) > 1:
        for index, center in _centers(pairs, (width, height)).items():
            _paste_disc(picture, center, index, pairs[index])
    ImageDraw.Draw(picture).rectangle([0, 0, width - 1, height - 1], outline=_OTHER_EDGE)
    return picture


def _area(mask: np.ndarray | None) -> int:
    return 0 if mask is None else int(mask.sum())


def _line_color(pair: Pair, index: int) -> Color:
    return _INK if pair.answer is None else ink_color(segment_color(index))


def _resized(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The mask at (width, height), 0 or 255, with smooth borders."""
    soft = Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BICUBIC)
    soft = soft.filter(ImageFilter.GaussianBlur(1.5))
    limit = min(128, max(1, int(np.asarray(soft).max())))  # the smallest mask keeps a pixel
    return soft.point([255 * (value >= limit) for value in range(256)])


def _edge(mask: Image.Image, width: int) -> Image.Image:
    """The border of a mask of 0 and 255, half inside and half outside of it; also along the photograph's edge."""
    pixels = np.asarray(mask)
    outer, inner = (function(pixels, width, mode="constant") for function in (maximum_filter, minimum_filter))
    return Image.fromarray(outer - inner)


def _centers(pairs: Sequence[Pair], size: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """A point (x, y) deep inside each mask (the true one where there is no answer), apart from the others if possible."""
    width, height = size
    ys, xs = np.mgrid[:height, :width]
    free = np.ones((height, width), dtype=bool)
    centers: dict[int, tuple[int, int]] = {}
    masks = [pair.truth_mask if pair.answer_mask is None else pair.answer_mask for pair in pairs]
    for index in sorted(range(len(pairs)), key=lambda index: _area(masks[index])):  # small ones have the least choice
        mask = masks[index]
        if mask is None or not mask.any():
            continue
        small = np.asarray(_resized(mask, size)) > 0
        room = small & free if (small & free).any() else small
        row, column = divmod(int(distance_transform_edt(np.pad(room, 1))[1:-1, 1:-1].argmax()), room.shape[1])
        x = min(max(column, _RADIUS), max(width - _RADIUS - 1, 0))
        y = min(max(row, _RADIUS), max(height - _RADIUS - 1, 0))
        centers[index] = (x, y)
        free &= (xs - x) ** 2 + (ys - y) ** 2 > (2 * _RADIUS + 2) ** 2
    return centers


def _paste_disc(picture: Image.Image, center: tuple[int, int], index: int, pair: Pair) -> None:
    """A disc with the number of a pair, drawn four times as large and reduced; an empty middle has no answer."""
    large, color = 4 * _RADIUS, _line_color(pair, index)
    disc = Image.new("RGBA", (2 * large, 2 * large), (*_PAPER, 0))
    draw = ImageDraw.Draw(disc)
    draw.circle((large, large), large - 1, fill=_PAPER)
    draw.circle((large, large), large - 5, fill=_PAPER if pair.answer is None else color, outline=color, width=5)
    ink = color if pair.answer is None else _PAPER
    draw.text(
        (large, large), str(index + 1), font=_font(4 * (12 if index < 9 else 10), bold=True), fill=ink, anchor="mm"
    )
    disc = disc.resize((2 * _RADIUS, 2 * _RADIUS), Image.Resampling.LANCZOS)
    picture.paste(disc, (center[0] - _RADIUS, center[1] - _RADIUS), mask=disc)


# ------------------------------------------------------------------ the legend


def _legend(pairs: Sequence[Pair], others: Sequence[str]) -> Image.Image:
    """A table: number, phrase of the answer, phrase of the truth, IoU; and below it what is grey."""
    columns = (_NUMBER, _NUMBER + _PHRASE, _NUMBER + 2 * _PHRASE)
    rows = [[["–"] if text is None else _wrapped(text) for text in (pair.answer, pair.truth)] for pair in pairs]
    heights = [_LINE * max(len(answer), len(truth)) + _BETWEEN for answer, truth in rows]
    note = f"pale grey, also there: {', '.join(dict.fromkeys(others))}" if others else ""
    notes = _wrapped(note, columns[2] + _VALUE, most=4, size=12, bold=False) if note else []
    height = _LINE + _BETWEEN + (sum(heights) or _LINE + _BETWEEN) + (_LINE * len(notes) + _BETWEEN if note else 0)
    page = Image.new("RGB", (columns[2] + _VALUE, height), _PAPER)
    draw = ImageDraw.Draw(page)
    heads = ("answer (filled)", "truth (outlined)", "IoU")
    for x, head in zip(columns, heads, strict=True):
        draw.text((x, 0), head, font=_font(12), fill=_GREY)
    y = _LINE + _BETWEEN
    draw.line([0, y - 4, page.width, y - 4], fill=_OTHER_EDGE)
    if not pairs:
        draw.text((columns[0], y), "nothing marked", font=_font(14), fill=_INK)
        draw.text((columns[1], y), "nothing to mark", font=_font(14), fill=_INK)
        y += _LINE + _BETWEEN
    for index, (pair, texts, row) in enumerate(zip(pairs, rows, heights, strict=True)):
        color = _line_color(pair, index)
        if len(pairs) > 1:
            _paste_disc(page, (_RADIUS, y + _RADIUS), index, pair)
        else:
            _draw_swatch(draw, (0, y + 1), index, pair)
        for x, lines in zip(columns, texts, strict=False):
            for number, line in enumerate(lines):
                ink = _GREY if line == "–" else color
                draw.text((x, y + 1 + number * _LINE), line, font=_font(14, bold=True), fill=ink)
        value = "–" if pair.iou is None else f"{pair.iou:.2f}"
        draw.text((columns[2], y + 1), value, font=_font(14), fill=_GREY if pair.iou is None else _INK)
        y += row
    for number, line in enumerate(notes):
        draw.text((0, y + 4 + number * _LINE), line, font=_font(12), fill=_GREY)
    return page


def _draw_swatch(draw: ImageDraw.ImageDraw, corner: tuple[int, int], index: int, pair: Pair) -> None:
    """Filled where there is an answer, outlined where there is a truth."""
    (x, y), side = corner, 16
    red, green, blue = segment_color(index)
    tint = (255 - (255 - red) * 45 // 100, 255 - (255 - green) * 45 // 100, 255 - (255 - blue) * 45 // 100)
    draw.rectangle(
        [x, y, x + side, y + side],
        fill=_PAPER if pair.answer is None else tint,
        outline=None if pair.truth is None else _line_color(pair, index),
        width=3,
    )


def _wrapped(text: str, width: int = _PHRASE - 10, most: int = 2, size: int = 14, bold: bool = True) -> list[str]:
    """The text in at most so many lines of a width; what has no room is cut off."""
    font, lines = _font(size, bold), [""]
    for word in printable(text).split() or ["(no phrase)"]:
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} …"]
    return [_cut(line, font, width) for line in lines]


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.rstrip(" …")
    while line and font.getlength(f"{line}…") > width:
        line = line[:-1]
    return f"{line.rstrip()}…"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / name, size)
