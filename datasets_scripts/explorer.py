"""
A page to look at sampled rows: pictures, conversations, and masks that light with their phrases.

One file that loads nothing and runs no script. What shows a sample is the page of `SegCap.to_html`: of each sample its
`<main>`, and once the styles, those of the sample with most masks.
"""

from __future__ import annotations

import html
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from mglmm.processing.images import load_image
from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_html import HTML_HEAD, render_html, resize_mask
from mglmm.processing.segcap_plot import display_size, printable
from mglmm.processing.segment import Segment
from mglmm.processing.uscdf import (
    CONTROL_TOKENS,
    IMAGE_TOKEN,
    REGION_TOKEN,
    count_seg,
    escape_control_tokens,
    parse,
    render_phrase,
)

LONG_SIDE = 512  # of the pictures, in pixels
MAX_PAGE_BYTES = 12 * 2**20
NO_PHRASE = "mask without phrase"

_PAGE = (
    HTML_HEAD
    + """{style}
header, article {{ max-width: 72rem; margin: 0 auto; padding: 1.25rem 1.5rem; box-sizing: border-box; }}
header h1 {{ font-size: 1.4rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }}
header p {{ margin: .25rem 0; }}
details {{ margin: .5rem 0; }}
pre {{ font-size: .8rem; color: var(--grey); white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0; }}
nav {{ display: flex; flex-wrap: wrap; gap: .4rem; margin-top: .75rem; }}
nav input {{ position: absolute; opacity: 0; }}
nav label {{ border: 1px solid var(--line); border-radius: 2rem; padding: .15rem .8rem; cursor: pointer; font-size: .9rem; }}
nav label:has(:checked) {{ background: var(--ink); color: var(--paper); }}
nav label:has(:focus-visible) {{ outline: 2px solid #2e8bff; }}
article {{ border-top: 1px solid var(--line); }}
article h2 {{ font-size: .85rem; font-weight: 500; color: var(--grey); margin: 0 0 .75rem; overflow-wrap: anywhere; }}
article h2 b {{ color: var(--ink); margin-right: .75rem; }}
.note {{ color: #c2410c; font-weight: 600; margin: 0 0 .75rem; overflow-wrap: anywhere; }}
article main {{ grid-template-columns: auto minmax(0, 1fr); grid-template-rows: auto 1fr; max-width: none; margin: 0;
  padding: 0; }}
article svg {{ grid-row: 1 / 3; width: min(30rem, 26rem * var(--ratio), 100vw - 3rem); }}
article ol {{ grid-column: 2; grid-row: 2; display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr));
  align-content: start; }}
article .caption {{ grid-column: 2; grid-row: 1; font-size: 1rem; line-height: 1.75; display: flex; flex-direction: column;
  gap: .4rem; }}
.caption span {{ white-space: normal; }}
.user {{ align-self: flex-end; max-width: 88%; border: 1px solid var(--line); border-radius: .9rem .9rem .2rem .9rem;
  padding: .15rem .8rem; color: var(--grey); }}
{filters}
@media (max-width: 52rem) {{ article main {{ grid-template-columns: minmax(0, 1fr); grid-template-rows: none; }}
  article svg {{ grid-row: 1; }} article .caption {{ grid-column: 1; grid-row: 2; }}
  article ol {{ grid-column: 1; grid-row: 3; }} }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{count}</p>
<details><summary>{verdict}</summary><pre>{summary}</pre></details>
<nav>{tabs}</nav>
</header>
{articles}
</body>
</html>
"""
)


@dataclass(frozen=True)
class Sample:
    """A row with its undecoded image, its "config/split/index", and what is wrong with it."""

    row_id: str
    row: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class Sampler:
    """
    A random sample of a stream that gives every group its share.

    Args:
        size: Number of samples. Of one group at most a quarter of them are kept, so that memory is bounded.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._capacity = -(-size // 4)
        self._random = random.Random(seed)
        self._seen: dict[Hashable, int] = {}
        self._kept: dict[Hashable, list[Sample]] = {}

    def offer(self, group: Hashable, sample: Sample) -> None:
        seen = self._seen[group] = self._seen.get(group, 0) + 1
        kept = self._kept.setdefault(group, [])
        if len(kept) < self._capacity:
            kept.append(sample)
        elif (place := self._random.randrange(seen)) < self._capacity:
            kept[place] = sample

    def samples(self) -> list[Sample]:
        """One of each group in turn."""
        chosen = []
        for turn in range(self._capacity):
            chosen += [kept[turn] for kept in self._kept.values() if turn < len(kept)]
        return chosen[: self._size]


def render_explorer(samples: Iterable[Sample], title: str, summary: str = "") -> str:
    """
    The page as a string, at most about `MAX_PAGE_BYTES` long: samples that do not fit any more are left out.

    Args:
        summary: Preformatted text; its last line is always shown.
    """
    articles: list[str] = []
    tasks: list[str] = []
    size = total = 0
    style, most = embed(Image.new("RGB", (1, 1)), "", []).style, 0
    for sample in samples:
        total += 1
        task = str(sample.row["task"])
        article, of_sample, masks = _article(sample, tasks.index(task) if task in tasks else len(tasks))
        if size + len(article) > MAX_PAGE_BYTES:
            continue
        if masks > most:
            style, most = of_sample, masks
        size += len(article)
        articles.append(article)
        if task not in tasks:
            tasks.append(task)
    tabs = ["all", *tasks]
    return _PAGE.format(
        title=escape(title),
        style=style,
        count=escape(
            f"{len(articles)} sampled rows"
            + (f", {total - len(articles)} more were too large for this page" if total > len(articles) else "")
            + ". Point at a phrase or at a mask."
        ),
        verdict=escape((summary.splitlines() or [""])[-1]),
        summary=escape(summary),
        filters="\n".join(
            f'body:has(#task{number}:checked) article:not([data-task="{number}"]) {{ display: none; }}'
            for number in range(len(tasks))
        ),
        tabs="".join(
            f'<label><input type="radio" name="task" id="task{number - 1 if number else "s"}"'
            f"{'' if number else ' checked'}>{escape(name)}</label>"
            for number, name in enumerate(tabs)
        ),
        articles="\n".join(articles),
    )


class Embedded(NamedTuple):
    """
    What a page of several answers needs of one.

    Args:
        body: HTML of its `<main>`.
        style: Styles that serve every body with as many masks or fewer.
        masks: Number of its masks.
        ratio: Width of the picture over its height.
    """

    body: str
    style: str
    masks: int
    ratio: float


def embed(image: Image.Image, caption: str, segments: Sequence[Segment], openings: Sequence[str] = ()) -> Embedded:
    """
    An answer as in `SegCap.to_html`, for masks that have no scores.

    Args:
        image: RGB, of the size of the masks.
        openings: HTML that each line of the caption begins with, an open `<span>` in it.
    """
    page = render_html(image, caption, segments)
    body = _cut(page, "main").replace("<small>score 1.00 · ", "<small>").replace(" (1.00)</title>", "</title>")
    body = f"<main>{_with_openings(body, openings)}</main>"
    return Embedded(body, _cut(page, "style"), len(segments), image.width / image.height)


def _article(sample: Sample, task: int) -> tuple[str, str, int]:
    """HTML of a sample, the styles it needs, and how many masks they are for."""
    row, notes = sample.row, list(sample.notes)
    shown = Embedded("", "", 0, 1.0)
    try:
        image, caption, segments = _shown(row)
        speakers = ["user" if message["role"] == "user" else "assistant" for message in _spoken(row)]
        shown = embed(image, caption, segments, [f'<span class="{speaker}">' for speaker in speakers])
    except (ValueError, TypeError, AttributeError) as error:  # whatever the linter found
        notes.append(f"cannot be shown: {error}")
        shown = shown._replace(body=f"<pre>{escape(str(row['messages']))[:4000]}</pre>")
    warnings = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    names = f"image {row['image_id']} of {row['source']}"
    return (
        f'<article data-task="{task}" style="--ratio:{shown.ratio:.3f}"><h2><b>{escape(str(row["task"]))}</b>'
        f"{escape(sample.row_id)} · {escape(names)}</h2>{warnings}{shown.body}</article>",
        shown.style,
        shown.masks,
    )


def _shown(row: Mapping[str, Any]) -> tuple[Image.Image, str, list[Segment]]:
    """The reduced picture, the conversation as lines without tags, and its phrases with masks; regions are phrases too."""
    image = Image.new("RGB", (640, 120), "#888")
    if row["image"] is not None:
        image = load_image(row["image"]["bytes"] if row["image"]["bytes"] is not None else row["image"]["path"])
    asked = sum(message["content"].count(REGION_TOKEN) for message in _spoken(row) if message["role"] == "user")
    if (count_seg(_spoken(row)), asked) != (len(row["masks"]), len(row["regions"])):
        raise ValueError("tags and masks do not match")
    masks, regions = iter(row["masks"]), iter(enumerate(row["regions"], 1))
    lines, found = [], []
    for message in _spoken(row):
        text = " ".join(message["content"].split())
        if message["role"] == "user":
            text = escape_control_tokens(text.replace(IMAGE_TOKEN, ""), CONTROL_TOKENS)
            while REGION_TOKEN in text:
                number, region = next(regions)
                text = text.replace(REGION_TOKEN, render_phrase(f"region {number}"), 1)
                found.append(_box_mask(region, image))
        else:
            found += [decode_mask(next(masks)) for _ in parse(text).mentions]
        lines.append(text)
    answer = parse("\n".join(lines), query=NO_PHRASE)
    if any(mask.shape != (image.height, image.width) for mask in found):
        raise ValueError("masks and image differ in size")
    size = display_size(image, min(LONG_SIDE, max(image.size)))
    segments = [
        Segment(mention.phrase, mention.span, resize_mask(mask, size), 1.0)
        for mention, mask in zip(answer.mentions, found, strict=True)
    ]
    return image.resize(size, Image.Resampling.LANCZOS), answer.clean_text, segments


def _spoken(row: Mapping[str, Any]) -> list[Mapping[str, str]]:
    return [message for message in row["messages"] if message["role"] != "system"]


def _box_mask(region: Sequence[float], image: Image.Image) -> np.ndarray:
    mask = np.zeros((image.height, image.width), dtype=bool)
    left, top, right, bottom = (max(0, round(side)) for side in region)
    mask[top:bottom, left:right] = True
    return mask


def _with_openings(body: str, openings: Sequence[str]) -> str:
    start, tag, rest = body.partition('<p class="caption">')
    caption, closing, end = rest.partition("</p>")
    lines = caption.split("\n")
    if len(lines) == len(openings):
        lines = [f"{opening}{line}</span>" for opening, line in zip(openings, lines, strict=True)]
    return start + tag + "\n".join(lines) + closing + end


def _cut(page: str, element: str) -> str:
    """What a page of `render_html` holds in its only `element`; texts in it are escaped and hold no tags."""
    return page.partition(f"<{element}>")[2].partition(f"</{element}>")[0]


def escape(text: str) -> str:
    """Any text as HTML."""
    return html.escape(printable(text))
