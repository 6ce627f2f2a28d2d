"""The results of a benchmark for people: a Markdown table, and a page with samples beside their ground truth."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from mglmm.evaluation import held_out
from mglmm.evaluation.benchmarks import BENCHMARKS, ground_truth
from mglmm.evaluation.predictions import Predictions, Question, load_picture
from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_html import HTML_HEAD, resize_mask
from mglmm.processing.segcap_plot import display_size, ink_color, printable, segment_color

SHOWN = 4  # samples of each kind
LONG_SIDE = 448  # of their pictures, in pixels
MOST_PHRASES = 40  # of the table
BINS = 10
_TEXT = 600  # characters of an answer that are shown

_PAGE = (
    HTML_HEAD
    + """
:root {{ color-scheme: light dark; --ink: #1c1f26; --grey: #6b7280; --paper: #fff; --line: #e5e7eb; --bar: #2e8bff; }}
body {{ margin: 0 auto; max-width: 68rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0; }}
h2 {{ font-size: 1.15rem; margin: 2.25rem 0 .75rem; }}
p {{ margin: .4rem 0; overflow-wrap: anywhere; }}
.grey, figcaption, small {{ color: var(--grey); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .25rem .8rem; border-bottom: 1px solid var(--line); }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0; min-width: 11rem; overflow-wrap: anywhere; }}
th {{ font-weight: 600; }}
.bars {{ display: grid; grid-template-columns: repeat({bins}, 1fr); gap: .3rem; align-items: end; height: 10rem;
  max-width: 38rem; border-bottom: 1px solid var(--line); }}
.bars div {{ background: var(--bar); border-radius: 3px 3px 0 0; min-height: 1px; }}
.bars.scale {{ height: auto; border: 0; font-size: .75rem; color: var(--grey); text-align: center; }}
.bars.scale div {{ background: none; }}
article {{ border-top: 1px solid var(--line); padding: 1rem 0; }}
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin-top: .6rem; }}
figure {{ margin: 0; }}
img {{ width: 100%; max-height: 24rem; object-fit: contain; object-position: left; border-radius: 6px; }}
.chip {{ font-weight: 600; margin-right: .8rem; color: var(--i); overflow-wrap: anywhere; }}
.chip::before {{ content: ""; display: inline-block; width: .7em; height: .7em; border-radius: 50%; background: var(--c);
  margin-right: .35em; }}
pre {{ font-size: .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }}
@media (max-width: 40rem) {{ .pair {{ grid-template-columns: 1fr; }} }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e8eaed; --grey: #9aa0aa; --paper: #16181d; --line: #2c3038; }}
  .chip {{ color: color-mix(in srgb, var(--c) 70%, #fff); }}
}}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="grey">{notes}</p>
<div class="wide">{table}</div>
{warnings}
{histogram}
{samples}
{phrases}
<h2>How it was made</h2>
<pre>{details}</pre>
</body>
</html>
"""
)


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results of `run.evaluate` as a Markdown table, with how they were made below."""
    header, *rows = _table(results)
    lines = [[_plain(cell) for cell in header], ["---", *["---:"] * (len(header) - 1)]]
    lines += [[_plain(cell) for cell in row] for row in rows]
    warnings = [f"- {_plain(line)}" for line in _warnings(results)]
    parts = [*(f"| {' | '.join(cells)} |" for cells in lines), "", *warnings, *([""] if warnings else [])]
    return "\n".join([*parts, _plain(_notes(results)), ""])


def render_report(
    path: Path,
    results: Mapping[str, Any],
    samples: Sequence[tuple[Question, float | None]],
    phrases: Mapping[str, Sequence[int]],
    data: datasets.Dataset,
    predictions: Predictions,
) -> None:
    """
    Write the page: one file that loads nothing and runs no script.

    Args:
        results: Of `run.evaluate`.
        samples: Questions and their values, see `Sample`.
        phrases: Of the ground truth: how often found, how often there.
        data: The prepared rows, with their pictures.
        predictions: The answers.
    """
    ranked = sorted(((value, q.row, q) for q, value in samples if value is not None), key=lambda item: item[:2])
    header, *rows = _table(results)
    captions = BENCHMARKS[results["settings"]["benchmark"]].family in ("captions", "regions")
    page = _PAGE.format(
        title=_escape(f"{BENCHMARKS[results['settings']['benchmark']].title}, {results['settings']['split']}"),
        notes=_escape(_notes(results)),
        bins=BINS,
        table=_html_table(header, rows),
        warnings="".join(f"<p>{_escape(line)}</p>" for line in _warnings(results)),
        histogram="" if captions else _histogram([value for value, _, _ in ranked]),
        samples="\n".join(_sections(ranked, "CIDEr" if captions else "IoU", data, predictions)),
        phrases=_phrase_table(phrases),
        details=_escape(json.dumps(results, indent=1)),
    )
    partial = path.with_suffix(".partial")
    # A model may write half of a surrogate pair.
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(path)


# ------------------------------------------------------------------ numbers


def _table(results: Mapping[str, Any]) -> list[list[str]]:
    """A header and a row for each metric; where there are groups (photographs) those of `held_out.table`."""
    if "groups" in results:
        return held_out.table(results["groups"])
    columns: dict[str, Mapping[str, Any]] = {}
    for mode, values in results["numbers"].items():
        flat = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
        columns |= {mode: flat} if flat else {}
        columns |= {f"{mode} {name}": value for name, value in values.items() if isinstance(value, Mapping)}
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    return [["", *columns], *([name, *(_number(column.get(name)) for column in columns.values())] for name in names)]


def _number(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:,d}" if isinstance(value, int) else f"{value:.4f}"


def _warnings(results: Mapping[str, Any]) -> list[str]:
    lines = [f"skipped: {name}: {why}" for name, why in results["skipped"].items()]
    lines += [f"note: {name}: {how}" for name, how in results["marked"].items()]
    lines += [f"failed: {count:,} x {why}" for why, count in results["failures"].items()]
    return lines


def _notes(results: Mapping[str, Any]) -> str:
    settings, versions, counts = results["settings"], results["versions"], results["counts"]
    lengths = ", ".join(f"{task} {length}" for task, length in settings["max_new_tokens"].items())
    subset = "" if results["limit"] is None else f" (a subset, seed {results['seed']})"
    checkpoint = (
        f"checkpoint {settings['checkpoint_sha256'][:12]}" if settings["checkpoint_sha256"] else "no checkpoint"
    )
    answered = "scored from a file of predictions"
    if results["device"] is not None:
        answered = f"{results['rows_answered']:,} answered in {results['seconds']:,.0f} s on {results['device']}"
    return (
        f"{results['rows']:,} rows{subset} of the split {settings['split']}, mode {results['mode']}, {checkpoint}, "
        f"{settings['dtype'] or 'unknown dtype'}, greedy generation of at most {lengths} tokens; "
        f"{answered}, "
        f"{counts.get('failed', 0):,} failed; torch {versions['torch']}, transformers {versions['transformers']}."
    )


# ------------------------------------------------------------------ the page


def _html_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
    body = "".join(f"<tr>{''.join(f'<td>{_escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _histogram(values: Sequence[float]) -> str:
    if not values:
        return ""
    bins = [min(int(value * BINS + 1e-9), BINS - 1) for value in values]
    counts = np.bincount(bins, minlength=BINS).tolist()
    bars = "".join(
        f'<div style="height:{100 * count / max(counts):.1f}%" title="{count:,} of {len(values):,}"></div>'
        for count in counts
    )
    scale = "".join(
        f"<div>{number / BINS:.1f}–{(number + 1) / BINS:.1f}<br>{n:,}</div>" for number, n in enumerate(counts)
    )
    mean = sum(values) / len(values)
    return (
        f'<h2>IoU of {len(values):,} answers</h2><div class="bars">{bars}</div><div class="bars scale">{scale}</div>'
        f'<p class="grey">mean {mean:.3f}, median {float(np.median(values)):.3f}; questions without a target are left out</p>'
    )


def _phrase_table(phrases: Mapping[str, Sequence[int]]) -> str:
    if not phrases:
        return ""
    often = sorted(phrases.items(), key=lambda item: (-item[1][1], item[0]))[:MOST_PHRASES]
    rows = [[phrase, f"{found:,}", f"{total:,}", f"{found / total:.0%}"] for phrase, (found, total) in often]
    left = len(phrases) - len(often)
    more = f'<p class="grey">and {left:,} rarer ones</p>' if left else ""
    return f"<h2>Recall by phrase</h2>{_html_table(['phrase', 'found', 'of', 'recall'], rows)}{more}"


def _sections(
    ranked: Sequence[tuple[float, int, Question]], unit: str, data: datasets.Dataset, predictions: Predictions
) -> Iterator[str]:
    """Best, median and worst samples; where there are few, none of them twice."""
    count = len(ranked)
    shown = min(SHOWN, -(-count // 3))
    orders = {
        "Best": range(count - 1, -1, -1),
        "Median": sorted(range(count), key=lambda index: abs(2 * index + 1 - count)),
        "Worst": range(count),
    }
    seen: set[int] = set()
    for title, order in orders.items():
        near = [index for index in order if index not in seen][: max(shown, min(3 * shown, count // 6))]
        # Of about equal ones rather those of different pictures.
        first = {(ranked[index][2].source, ranked[index][2].image_id): index for index in reversed(near)}
        chosen = [index for index in near if index in first.values()][:shown]
        chosen += [index for index in near if index not in chosen][: shown - len(chosen)]
        seen.update(chosen)
        if chosen:
            articles = [_article(ranked[index][2], ranked[index][0], unit, data, predictions) for index in chosen]
            yield f"<h2>{title}</h2>{''.join(articles)}"


def _article(question: Question, value: float, unit: str, data: datasets.Dataset, predictions: Predictions) -> str:
    record = predictions[question.key]
    texts = data.remove_columns("image")
    rows = [texts[row] for row in question.rows]
    truths: list[tuple[str, Mapping[str, Any]]] = []
    references: list[str] = []
    for row in rows:
        phrases, captions = ground_truth(row)
        truths += zip(phrases, row["masks"], strict=False)
        references += captions
    answers = [(segment["phrase"], segment["mask"]) for segment in record["segments"]]
    heading = (
        f"<p><b>{unit} {value:.3f}</b> <span class=grey>row {question.row}, image {_escape(question.image_id)} of "
        f"{_escape(question.source)}</span></p><p>{_escape(question.turns[0][0])}</p>"
    )
    try:
        image = load_picture(data[question.row]["image"])
        boxes = [question.crop] if question.crop is not None else list(question.regions)
        figures = (
            _figure(image, answers, [], record.get("error") or record["clean_text"], "answer"),
            _figure(image, truths, boxes, "; ".join(references[:10]), "ground truth"),
        )
    except ValueError as error:
        return f"<article>{heading}<p>cannot be shown: {_escape(str(error))}</p></article>"
    return f'<article>{heading}<div class="pair">{"".join(figures)}</div></article>'


def _figure(
    image: Image.Image,
    segments: Sequence[tuple[str, Mapping[str, Any]]],
    boxes: Sequence[Sequence[float]],
    text: str,
    kind: str,
) -> str:
    size = display_size(image, min(LONG_SIDE, max(image.size)))
    picture = image.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    for index, (_, rle) in enumerate(segments):
        mask = decode_mask(rle)
        if mask.shape != (image.height, image.width):
            raise ValueError(f"a mask of {mask.shape} in a picture of {(image.height, image.width)}")
        picture = _tinted(picture, resize_mask(mask, size), segment_color(index))
    scale = size[0] / image.width
    for box in boxes:
        ImageDraw.Draw(picture).rectangle([side * scale for side in box], outline=segment_color(0), width=3)
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG", quality=85)
    chips = "".join(
        f'<span class="chip" style="--c:#{bytes(segment_color(i)).hex()};--i:#{bytes(ink_color(segment_color(i))).hex()}">'
        f"{_escape(phrase) or '(no phrase)'}</span>"
        for i, (phrase, _) in enumerate(segments)
    )
    shown = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    return (
        f'<figure><img alt="{kind}" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'
        f"<figcaption>{kind}: {_escape(shown) or '(nothing)'}</figcaption>{chips}</figure>"
    )


def _tinted(picture: Image.Image, mask: np.ndarray, color: tuple[int, int, int]) -> Image.Image:
    """The picture with a mask `(H, W)` filled half and outlined."""
    inner = mask.copy()
    inner[1:-1, 1:-1] = mask[1:-1, 1:-1] & mask[:-2, 1:-1] & mask[2:, 1:-1] & mask[1:-1, :-2] & mask[1:-1, 2:]
    pixels = np.asarray(picture).astype(np.float32)
    pixels[mask] = 0.55 * pixels[mask] + 0.45 * np.array(color)
    pixels[mask & ~inner] = color
    return Image.fromarray(pixels.astype(np.uint8))


def _plain(text: str) -> str:
    """Names and texts come from the data: no Markdown or HTML in them."""
    return html.escape(" ".join(printable(text).split()), quote=False).replace("|", "\\|")


def _escape(text: str) -> str:
    return html.escape(printable(text))
