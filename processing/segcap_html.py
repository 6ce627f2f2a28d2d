"""A self-contained page of an answer: pointing at a phrase lights its mask, pointing at a mask lights its phrase."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from .segcap_plot import caption_parts, covers, display_size, ink_color, printable, segment_color
from .segment import Segment

_PICTURE = 1600  # pictures with a longer side are reduced to this, together with their masks

# Of every page this package writes; its policy lets nothing be loaded and no script run. `{title}` is to be escaped.
HTML_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>"""
# The styles alone do the lighting, through :has(), so the page needs no script and its policy can forbid all of them.
_PAGE = (
    HTML_HEAD
    + """
:root {{ color-scheme: light dark; --ink: #1c1f26; --grey: #6b7280; --paper: #fff; --line: #e5e7eb; }}
body {{ margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
main {{ display: grid; grid-template-columns: minmax(0, max(20rem, {width_rem})) 17rem; gap: 1.25rem 1.5rem; justify-content: center;
  max-width: 76rem; margin: 0 auto; padding: 1.5rem; box-sizing: border-box; }}
svg {{ display: block; width: {width_rem}; max-width: 100%; height: auto; border-radius: 10px; background: #000; }}
image {{ transition: opacity .15s; }}
path {{ fill: var(--c); stroke: var(--c); fill-rule: evenodd; stroke-width: 2px; vector-effect: non-scaling-stroke;
  stroke-linejoin: round; fill-opacity: .34; transition: fill-opacity .15s, stroke-opacity .15s; cursor: pointer; }}
/* An object shows as a rim around its parts, so that their colours do not mix. */
.whole {{ fill-opacity: .06; stroke-width: 6px; }}
.caption {{ grid-column: 1 / -1; margin: 0; font-size: 1.2rem; line-height: 1.9; white-space: pre-line;
  overflow-wrap: anywhere; }}
mark {{ color: var(--i); background: color-mix(in srgb, var(--c) 20%, transparent); font-weight: 600; cursor: pointer;
  padding: .12em .35em; border-radius: .4em; box-decoration-break: clone; -webkit-box-decoration-break: clone;
  transition: background .15s, color .15s; }}
ol {{ list-style: none; margin: 0; padding: 0; display: flex; flex-direction: column; gap: .15rem; }}
li {{ display: grid; grid-template-columns: 1.7rem minmax(0, 1fr); column-gap: .6rem; align-items: center;
  padding: .35rem .5rem; border-radius: .5rem; cursor: pointer; transition: background .15s; }}
li b {{ grid-row: span 2; width: 1.7rem; height: 1.7rem; border-radius: 50%; background: var(--c); color: #fff;
  font-size: .8rem; display: grid; place-items: center; text-shadow: 0 0 2px #0009; }}
li span {{ font-weight: 600; color: var(--i); line-height: 1.25; overflow-wrap: anywhere; }}
li small {{ color: var(--grey); font-variant-numeric: tabular-nums; }}
[data-s]:focus {{ outline: none; }}
[data-s]:focus-visible {{ outline: 2px solid var(--c); outline-offset: 1px; }}
main:has([data-s]:is(:hover, :focus-visible)) image {{ opacity: .55; }}
main:has([data-s]:is(:hover, :focus-visible)) path {{ fill-opacity: .04; stroke-opacity: .12; }}
{lit_path} {{ fill-opacity: .55 !important; stroke-opacity: 1 !important; stroke-width: 3px; }}
{lit_mark} {{ background: var(--c); color: #fff; text-shadow: 0 0 3px #000a; }}
{lit_row} {{ background: color-mix(in srgb, var(--c) 20%, transparent); }}
@media (max-width: 52rem) {{ main {{ grid-template-columns: minmax(0, 1fr); }} .caption {{ grid-row: 2; }} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaed; --grey: #9aa0aa; --paper: #16181d; --line: #2c3038; }}
  mark, li span {{ color: color-mix(in srgb, var(--c) 70%, #fff); }}
}}
</style>
</head>
<body>
<main>
<svg viewBox="0 0 {width2} {height2}" role="img" aria-label="{label}">
<image href="data:image/jpeg;base64,{jpeg}" width="{width2}" height="{height2}" preserveAspectRatio="none"/>
{paths}
</svg>
<ol>
{rows}
</ol>
<p class="caption">{caption}</p>
</main>
</body>
</html>
"""
)


def render_html(image: Image.Image, caption: str, segments: Sequence[Segment]) -> str:
    """The page as a string; `image` and the masks have the same size, every text is escaped."""
    size = display_size(image, min(_PICTURE, max(image.size)))
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=90)

    # Small masks come last: they lie on top and catch the pointer.
    order = sorted(range(len(segments)), key=lambda index: -segments[index].area)
    paths = [
        f'<path data-s="{index}"{_whole(index, segments, order)} style="{color_style(index)}" '
        f'd="{mask_outline(resize_mask(segments[index].mask, size))}">'
        f"<title>{_escape(segments[index].phrase)} ({segments[index].score:.2f})</title></path>"
        for index in order
    ]
    rows = [
        f'<li data-s="{index}" tabindex="0" style="{color_style(index)}"><b>{index + 1}</b><span>{_escape(segment.phrase)}</span>'
        f"<small>score {segment.score:.2f} · area {segment.area / segment.mask.size:.1%}</small></li>"
        for index, segment in enumerate(segments)
    ]
    parts = [
        f'<mark data-s="{" ".join(map(str, indices))}" tabindex="0" style="{color_style(indices[0])}">{_escape(text)}</mark>'
        if indices
        else _escape(text)
        for text, indices in caption_parts(caption, segments)
    ]
    title = caption if len(caption) <= 80 else caption[:79] + "…"
    return _PAGE.format(
        title=_escape(title) or "Segmentation caption",
        label=_escape(caption),
        # A small picture is shown larger, a tall one no taller than it can be seen at once.
        width_rem=f"min(48rem, {44 * size[0] / size[1]:.2f}rem)",
        width2=2 * size[0],
        height2=2 * size[1],
        jpeg=base64.b64encode(jpeg.getvalue()).decode("ascii"),
        paths="\n".join(paths),
        rows="\n".join(rows),
        caption="".join(parts),
        lit_path=lit_selector("path", len(segments)),
        lit_mark=lit_selector("mark", len(segments)),
        lit_row=lit_selector("li", len(segments)),
    )


def mask_outline(mask: np.ndarray) -> str:
    """The outline of a bool mask (H, W) as an SVG path in half pixels, for `fill-rule: evenodd`.

    The corners of the pixels are cut at the middles of their sides, which turns the stairs of a slope into a line. An
    empty mask gives an empty path.
    """
    padded = np.pad(mask, 1)
    up_left, up_right, down_left, down_right = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    single = up_left ^ up_right ^ down_left ^ down_right
    touching = (up_left == down_right) & (up_right == down_left) & (up_left != up_right)  # two corners in one point
    ys, xs = np.nonzero(single | touching)
    if ys.size == 0:
        return ""
    copies = np.where(touching[ys, xs], 2, 1)
    ys, xs = np.repeat(ys, copies), np.repeat(xs, copies)
    # Along a row, and along a column, sides run from every odd corner to the next one. The copies of a double corner stay
    # in order: its first one ends the side from the left or above, its second one begins the side to the right or below.
    neighbours = []
    for order in (np.lexsort((np.arange(xs.size), xs, ys)), np.lexsort((np.arange(xs.size), ys, xs))):
        partner = np.empty(xs.size, dtype=np.int64)
        partner[order[::2]], partner[order[1::2]] = order[1::2], order[::2]
        neighbours.append(partner.tolist())
    along_row, along_column = neighbours

    path = []
    seen = [False] * xs.size
    for first in range(xs.size):
        if seen[first]:
            continue
        loop = []
        corner = first
        while not seen[corner]:
            loop += [corner, along_row[corner]]
            seen[corner] = seen[along_row[corner]] = True
            corner = along_column[along_row[corner]]
        path.append(_loop_path(2 * np.stack([xs[loop], ys[loop]], axis=1)))
    return "".join(path)


def _loop_path(corners: np.ndarray) -> str:
    """A closed loop of corners (N, 2) in half pixels, cut and as relative moves."""
    step = np.sign(np.roll(corners, -1, axis=0) - corners)
    points = np.stack([corners + step, np.roll(corners, -1, axis=0) - step], axis=1).reshape(-1, 2)
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]  # the two ends of a side of one pixel
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    points = points[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    moves = " ".join(f"{x},{y}" for x, y in np.diff(points, axis=0).tolist())
    return f"M{points[0, 0]},{points[0, 1]}l{moves}z"


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The mask at (width, height), with at least one pixel where it had one."""
    if mask.shape == size[::-1]:
        return mask
    cover = np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BOX))
    return (cover >= min(128, cover.max())) & (cover > 0)


def _whole(index: int, segments: Sequence[Segment], order: list[int]) -> str:
    """The class of a mask with parts of its own in front of it."""
    front = (segments[part] for part in order[order.index(index) + 1 :])
    return ' class="whole"' if any(part.area and covers(segments[index], part) for part in front) else ""


def color_style(index: int) -> str:
    """The colours of a segment as CSS variables: --c of its mask, --i of text about it."""
    color = segment_color(index)
    return f"--c:#{bytes(color).hex()};--i:#{bytes(ink_color(color)).hex()}"


def lit_selector(element: str, n: int) -> str:
    """CSS selector of the elements of each of `n` segments (those with its number in `data-s`) while anything of that segment is pointed at or has the focus."""
    rules = (
        f'main:has([data-s~="{index}"]:is(:hover, :focus-visible)) {element}[data-s~="{index}"]' for index in range(n)
    )
    return ",\n".join(rules) or ":not(*)"


def _escape(text: str) -> str:
    return html.escape(printable(text))
