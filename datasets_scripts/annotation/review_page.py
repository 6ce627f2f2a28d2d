"""
A page to judge a run by: its statistics, and sampled images with their masks, trees and descriptions.

One file that loads nothing and runs no script, as the page of `explorer`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from mglmm.processing.images import load_image
from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_html import HTML_HEAD, color_style, lit_selector, resize_mask
from mglmm.processing.segcap_plot import display_size
from mglmm.processing.segment import Segment

from ..explorer import MAX_PAGE_BYTES, embed, escape
from ..sources import inside
from .records import ROOT, Context, ImageInfo, Tree, TreeNode
from .results import Result, read_result, read_settings
from .statistics import HARD_RULES, SOFT_RULES, Statistics, collect
from .store import finished_images, write_atomically

LONG_SIDE = 640  # of the pictures, in pixels
MAX_FAILED = 20  # images that are listed with why they failed
_TAGGED = re.compile(r"<(obj_\d+)>([^<>]*)</\1>")

_PAGE = (
    HTML_HEAD
    + """{style}
{lit_node} {{ background: color-mix(in srgb, var(--c) 24%, transparent); }}
:root {{ --good: #15803d; --fair: #b45309; --poor: #b91c1c; --soft: #f3f4f6; }}
header, article {{ max-width: 76rem; margin: 0 auto; padding: 1.5rem; box-sizing: border-box; }}
h1 {{ font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }}
header > p {{ margin: .25rem 0 1rem; color: var(--grey); }}
dl {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 0 0 1.25rem; }}
dl div {{ background: var(--soft); border-radius: .6rem; padding: .6rem .9rem; display: flex; flex-direction: column-reverse;
  justify-content: flex-end; }}
dt {{ color: var(--grey); font-size: .8rem; line-height: 1.3; }}
dd {{ margin: 0; font-size: 1.45rem; font-weight: 650; font-variant-numeric: tabular-nums; line-height: 1.3; }}
.tables {{ columns: 20rem 3; column-gap: 2.5rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; break-inside: avoid;
  margin-bottom: 1.25rem; }}
caption {{ text-align: left; font-weight: 650; padding-bottom: .35rem; }}
th, td {{ text-align: left; font-weight: 400; padding: .16rem .6rem .16rem 0; vertical-align: baseline; overflow-wrap: anywhere; }}
thead th {{ color: var(--grey); font-size: .75rem; white-space: nowrap; }}
th b {{ display: inline-block; min-width: 1.9rem; }}
td.n {{ text-align: right; padding-right: 0; width: 3.2rem; white-space: nowrap; }}
td.bar {{ width: 34%; padding: 0 .4rem 0 .6rem; vertical-align: middle; }}
td.bar i, td.rate i {{ display: block; height: .5rem; border-radius: .25rem; width: max(2px, var(--v)); background: #60a5fa; }}
td.rate {{ width: 4.6rem; padding-right: 0; padding-left: .6rem; white-space: nowrap; }}
td.rate span {{ display: grid; grid-template-columns: 1fr 2.5rem; align-items: center; gap: .2rem; text-align: right; }}
thead th + th {{ padding-left: .6rem; }}
td.rate em {{ display: block; font-style: normal; background: var(--soft); border-radius: .25rem; }}
.good i {{ background: var(--good) !important; }} .fair i {{ background: var(--fair) !important; }}
.poor i {{ background: var(--poor) !important; }}
.note {{ color: var(--poor); font-weight: 600; margin: 0 0 .5rem; overflow-wrap: anywhere; }}
article {{ border-top: 1px solid var(--line); }}
article h2 {{ font-size: .85rem; font-weight: 500; color: var(--grey); margin: 0 0 .75rem; overflow-wrap: anywhere; }}
article h2 b {{ color: var(--ink); font-size: 1rem; margin-right: .6rem; }}
article main {{ grid-template-columns: auto minmax(0, 1fr); grid-template-rows: auto 1fr; max-width: none; margin: 0;
  padding: 0; align-items: start; }}
article svg {{ grid-row: 1 / 3; width: min(36rem, 31rem * var(--ratio), 100vw - 3rem); position: sticky; top: 1rem; }}
article .caption {{ grid-column: 2; grid-row: 1; font-size: 1rem; line-height: 1.8; display: flex; flex-direction: column;
  gap: .75rem; }}
.caption > span {{ white-space: normal; }}
.caption > span > b {{ display: block; font-size: .75rem; line-height: 1.4; color: var(--grey); font-weight: 600;
  letter-spacing: .02em; }}
.tree {{ grid-column: 2; grid-row: 2; columns: 14rem; column-gap: 1.25rem; }}
.tree, .tree ul {{ list-style: none; margin: 0; padding: 0; }}
.tree ul {{ margin-left: .85rem; padding-left: .35rem; border-left: 2px solid var(--line); }}
.tree li {{ display: block; padding: 0; cursor: auto; }}
.tree > li {{ break-inside: avoid; }}
.node {{ display: grid; grid-template-columns: auto minmax(0, 1fr) auto; gap: .5rem; align-items: center; cursor: pointer;
  padding: .12rem .4rem; border-radius: .4rem; font-size: .9rem; }}
.node b {{ width: 1.35rem; height: 1.35rem; font-size: .68rem; grid-row: auto; }}
.node i {{ font-style: normal; font-weight: 400; color: var(--grey); }}
.weak span {{ text-decoration: underline dotted; text-underline-offset: .2em; }}
@media (max-width: 56rem) {{ article main {{ grid-template-columns: minmax(0, 1fr); grid-template-rows: none; }}
  article svg, article .caption, .tree {{ grid-column: 1; grid-row: auto; position: static; }} }}
@media (prefers-color-scheme: dark) {{ :root {{ --soft: #20242b; --good: #4ade80; --fair: #fbbf24; --poor: #f87171; }} }}
</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p>{subtitle}</p>
{warnings}
<dl>{facts}</dl>
<div class="tables">{tables}</div>
</header>
{articles}
</body>
</html>
"""
)


def write_review(run: Path, path: Path, *, samples: int = 12) -> None:
    """
    Write the page of a run, at most about `explorer.MAX_PAGE_BYTES` long: images that do not fit any more are left out.

    Args:
        samples: Number of images that are done, the same ones for the same run.

    Raises:
        ValueError: the folder is of no run.
    """
    settings, statistics = read_settings(run), collect(run)
    finished = list(finished_images(run))
    done = [number for number, (_, status) in enumerate(finished) if status["state"] == "done"]
    chosen = sorted(random.Random(0).sample(done, min(samples, len(done))))
    style, most = embed(Image.new("RGB", (1, 1)), "", []).style, 0
    articles: list[str] = []
    size = 0
    for number in chosen:
        article, of_image, masks = _article(read_result(*finished[number]), settings.image_root)
        if size + len(article) > MAX_PAGE_BYTES:
            continue
        if masks > most:
            style, most = of_image, masks
        size += len(article)
        articles.append(article)
    left_out = len(chosen) - len(articles)
    failed = [(status["image_id"], status.get("reason", "")) for _, status in finished if status["state"] == "failed"]
    page = _PAGE.format(
        title=escape(f"Annotation run {run.resolve().name}"),
        subtitle=escape(
            f"Model {settings.model}. {len(articles)} of {len(done):,} images that are done"
            + (f"; {left_out} more were too large for this page" if left_out else "")
            + ". Point at a phrase, a mask or an object of a tree."
        ),
        style=style,
        lit_node=lit_selector(".node", most),
        warnings=_notes(statistics.warnings),
        facts="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in _facts(statistics)
        ),
        tables="".join(_tables(statistics, failed)),
        articles="\n".join(articles),
    )
    write_atomically(path, page)


# ------------------------------------------------------------------ statistics


def _facts(statistics: Statistics) -> list[tuple[str, str]]:
    coverage = "-" if statistics.coverage is None else f"{statistics.coverage:.0%}"
    return [
        ("images done", f"{statistics.done:,}"),
        ("images failed", f"{statistics.failed:,}"),
        ("descriptions", f"{statistics.described:,}"),
        ("masks a description", f"{statistics.masks_per_item:.1f}"),
        ("words a description", f"{statistics.words_per_item:.0f}"),
        ("described objects an image", f"{statistics.subtrees_per_image:.1f}"),
        ("of an image covered", coverage),
        ("requests", f"{statistics.requests:,}"),
        ("of them to answer again", f"{statistics.retries:,}"),
        ("tokens in prompts", f"{statistics.prompt_tokens:,}"),
        ("tokens in answers", f"{statistics.completion_tokens:,}"),
    ]


def _tables(statistics: Statistics, failed: Sequence[tuple[str, str]]) -> Iterable[str]:
    if statistics.rules:
        rows = "".join(
            f"<tr><th><b>{escape(code)}</b> {escape(HARD_RULES.get(code, ''))}</th>"
            f"{_rate(rule.passed_first)}{_rate(rule.passed)}</tr>"
            for code, rule in statistics.rules.items()
        )
        head = "<thead><tr><th></th><th>first answer</th><th>last answer</th></tr></thead>"
        yield f"<table><caption>Answers that keep a rule</caption>{head}<tbody>{rows}</tbody></table>"
    notes = [(f"{code} {SOFT_RULES.get(code, '')}", count) for code, count in sorted(statistics.flags.items())]
    yield _bars("Labels", statistics.top_labels)
    yield _bars("Labelled masks", statistics.objects.most_common())
    yield _bars("Dropped masks", statistics.dropped.most_common())
    yield _bars("Descriptions", statistics.items.most_common())
    yield _bars("Noted", notes)
    yield _bars("Why images failed", statistics.reasons.most_common())
    if failed:
        rows = "".join(
            f"<tr><th>{escape(name)}</th><td>{escape(reason)}</td></tr>" for name, reason in failed[:MAX_FAILED]
        )
        more = f"<tr><th>and {len(failed) - MAX_FAILED:,} more</th></tr>" if len(failed) > MAX_FAILED else ""
        yield f"<table><caption>Failed images</caption><tbody>{rows}{more}</tbody></table>"


def _notes(notes: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(note)}</p>' for note in notes)


def _rate(share: float) -> str:
    kind = "good" if share >= 0.95 else "fair" if share >= 0.8 else "poor"
    return f'<td class="rate {kind}"><span><em><i style="--v:{share:.1%}"></i></em>{share:.0%}</span></td>'


def _bars(caption: str, counts: Sequence[tuple[str, int]]) -> str:
    if not counts:
        return ""
    most = max(count for _, count in counts)
    rows = "".join(
        f'<tr><th>{escape(name)}</th><td class="bar"><i style="--v:{count / most:.1%}"></i></td><td class="n">{count:,}</td></tr>'
        for name, count in counts
    )
    return f"<table><caption>{escape(caption)}</caption><tbody>{rows}</tbody></table>"


# ------------------------------------------------------------------ one image


def _article(result: Result, root: Path) -> tuple[str, str, int]:
    """HTML of an image, the styles it needs, and how many masks they are for."""
    name = escape(result.status["image_id"])
    if result.problem or not (result.geometry and result.tree and result.contexts):
        return f'<article><h2><b>{name}</b></h2><p class="note">{escape(str(result.problem))}</p></article>', "", 0
    image, nodes = result.geometry["image"], result.tree["nodes"]
    notes = [note for item in result.contexts["items"] if (note := _failure(item, result.tree))]
    try:
        picture = _picture(image, root)
    except ValueError as error:
        notes.append(f"the picture cannot be shown: {error}")
        picture = Image.new("RGB", (image["width"], image["height"]), "#888")
    size = display_size(picture, min(LONG_SIDE, max(picture.size)))
    caption, openings, spans = _descriptions(result.contexts["items"], result.tree)
    segments = [
        Segment(node["label"], spans.get(node["id"]), resize_mask(decode_mask(node["segmentation"]), size), 1.0)
        for node in nodes
    ]
    shown = embed(picture.resize(size, Image.Resampling.LANCZOS), caption, segments, openings)
    drawing, _, rest = shown.body.partition("<ol>")
    body = drawing + _tree(result.tree, image) + rest.partition("</ol>")[2]
    facts = f"{image['file_name']} · {image['width']} x {image['height']} · {len(nodes)} objects"
    return (
        f'<article style="--ratio:{shown.ratio:.3f}"><h2><b>{name}</b>{escape(facts)}</h2>'
        f"{_notes(notes)}{body}</article>",
        shown.style,
        shown.masks,
    )


def _picture(image: ImageInfo, root: Path) -> Image.Image:
    picture = load_image(inside(root, image["file_name"]))
    if picture.size != (image["width"], image["height"]):
        raise ValueError("it has another size than its masks")
    return picture


def _about(item: Context, tree: Tree) -> str:
    """ "the whole image", or label and number of an object."""
    for node in tree["nodes"]:
        if node["id"] == item["about"]:
            return f"{node['label']} ({_number(node)})"
    return "the whole image" if item["about"] == ROOT else item["about"]


def _failure(item: Context, tree: Tree) -> str | None:
    if item["status"] != "failed":
        return None
    attempts = item["exchange"]["attempts"] if "exchange" in item else []
    broken = ", then ".join(" ".join(dict.fromkeys(codes)) or "none" for codes in attempts)
    return f"No description of {_about(item, tree)}: {len(attempts)} answers broke the rules {broken}"


def _descriptions(items: Sequence[Context], tree: Tree) -> tuple[str, list[str], dict[str, tuple[int, int]]]:
    """All texts as lines without tags, how the HTML of each begins, and where each object stands in them."""
    lines: list[str] = []
    openings: list[str] = []
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for item in items:
        if item["status"] == "failed":
            continue
        line = ""
        tagged = " ".join(item["tagged"].split())
        position = 0
        for tag in _TAGGED.finditer(tagged):
            line += tagged[position : tag.start()]
            spans.setdefault(tag[1], (start + len(line), start + len(line) + len(tag[2])))
            line += tag[2]
            position = tag.end()
        line += tagged[position:]
        status = "" if item["status"] == "ok" else f" · {item['status']}"
        openings.append(f"<span><b>{escape(_about(item, tree) + status)}</b>")
        lines.append(line)
        start += len(line) + 1
    return "\n".join(lines), openings, spans


def _tree(tree: Tree, image: ImageInfo) -> str:
    """The objects as nested lists; each has its caption as a title."""
    order = {node["id"]: index for index, node in enumerate(tree["nodes"])}
    children: dict[str, list[TreeNode]] = {}
    for node in tree["nodes"]:
        children.setdefault(node["parent"], []).append(node)

    def listed(parent: str) -> str:
        items = "".join(
            f"<li>{_node(node, order, image)}{listed(node['id'])}</li>" for node in children.get(parent, ())
        )

        return f"<ul>{items}</ul>" if items else ""

    return listed(ROOT).replace("<ul>", '<ul class="tree">', 1)


def _node(node: TreeNode, order: Mapping[str, int], image: ImageInfo) -> str:
    index = order[node["id"]]
    count = f" <i>× {node['count']}</i>" if node["count"] > 1 else ""
    share = node["area"] / (image["width"] * image["height"])
    return (
        f'<div class="node{" weak" if node["weak"] else ""}" data-s="{index}" tabindex="0" style="{color_style(index)}" '
        f'title="{escape(node["caption"])}"><b>{index + 1}</b><span>{escape(node["label"])}{count}</span>'
        f"<small>{share:.1%}</small></div>"
    )


def _number(node: TreeNode) -> str:
    return node["id"].removeprefix("obj_")
