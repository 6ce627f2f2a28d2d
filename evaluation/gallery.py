"""A gallery of held-out answers, good and bad ones chosen by rule: a Markdown page and a picture for each answer."""

from __future__ import annotations

import hashlib
import html
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from tqdm import tqdm

from mglmm.evaluation.benchmarks import BENCHMARKS, ground_truth, plan
from mglmm.evaluation.gallery_picture import pairs_of, render_pairs
from mglmm.evaluation.held_out import DESCRIPTIONS, GROUPS, REFERRING, PhotosScorer
from mglmm.evaluation.predictions import Predictions, Question, load_picture
from mglmm.evaluation.report import to_markdown
from mglmm.evaluation.run import data_hash, score
from mglmm.processing import SegCap
from mglmm.processing.rle import decode_mask
from mglmm.processing.segcap_plot import caption_parts, printable

BENCHMARK = "photos"
TASKS = {"object": "objects", "part": "parts", "panoptic": "panoptic descriptions", "fine": "fine-grained descriptions"}
_MEASURE = dict.fromkeys(REFERRING, "gIoU") | dict.fromkeys(DESCRIPTIONS, "mIoU_gt")
_REFUSALS = ("rightly refused", "wrongly refused", "wrongly answered")
_FOLDER = "gallery"  # of the pictures, beside the page
_NAME = re.compile(r"[a-z0-9-]+-(?:best|median|worst|refused|answered)-[0-9]+\.png")
_TEXT = 600  # characters of a question or an answer that are shown

Pictures = Literal["masks", "photographs"]


@dataclass(frozen=True)
class Ranked:
    """An answer and the IoU by which the evaluation measures it; `None` where there is nothing to find."""

    question: Question
    value: float | None

    @property
    def photograph(self) -> tuple[str, str]:
        return self.question.source, self.question.image_id

    @property
    def hash(self) -> str:
        """SHA-256 of what is asked about which photograph: an order that nobody picked."""
        question = self.question
        facts = [question.source, question.image_id, question.task, question.turns[0][0], question.row]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def make_gallery(
    evaluation: str | Path,
    data: str | Path,
    output: str | Path,
    *,
    number: int = 2,
    pictures: Pictures = "masks",
) -> Path:
    """
    Write `gallery.md` and the folder `gallery` with its pictures.

    For each group of the evaluation (see `held_out.GROUPS`) and each task it shows the best, the median and the worst
    answers by IoU (see `choose`), besides them refusals, right and wrong ones. The answers are scored by the evaluation's own
    scorer, and its numbers must come out.

    Args:
        evaluation: Folder that `run.evaluate` wrote: `results.json` of the benchmark "photos" and `predictions.jsonl`.
        data: Folder or hub id of the prepared data that was measured.
        output: Folder to write into. Pictures that an earlier gallery left there are replaced.
        number: How many best ones, median ones and so on.
        pictures: "masks" draws on plain paper and reads no photograph, so that the gallery may be passed on where the
            photographs may not; "photographs" draws over them.

    Returns:
        The path of `gallery.md`.

    Raises:
        FileNotFoundError: there are no such results, predictions or data.
        ValueError: the results are of another benchmark or data, the predictions do not give the results' numbers, or a
            photograph cannot be read.
    """
    if number < 1:
        raise ValueError(f"number must be at least 1, got {number}")
    evaluation, output = Path(evaluation), Path(output)
    results = _read_results(evaluation)
    rows = datasets.load_dataset(str(data), BENCHMARKS[BENCHMARK].config, split=results["settings"]["split"])
    rows = rows.cast_column("image", datasets.Image(decode=False))
    if (found := data_hash(rows)) != results["settings"]["data_sha256"]:
        raise ValueError(
            f"{evaluation} measured other data than the {len(rows):,} rows of {data} (SHA-256 "
            f"{str(results['settings']['data_sha256'])[:12]}, not {found[:12]}): name the data of that evaluation, or evaluate anew"
        )
    predictions = Predictions(evaluation / "predictions.jsonl")
    questions = plan(BENCHMARKS[BENCHMARK], rows, mode="clean", limit=results["limit"], seed=results["seed"])
    facts = score(questions, rows, predictions, PhotosScorer())
    _check_numbers(facts.numbers.clean, results["groups"], evaluation)

    folder = output / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    writer = _Writer(rows, predictions, folder, pictures)
    lines = list(_page(facts.samples, results, writer, number))
    for path in folder.iterdir():  # of a larger gallery, or of one with photographs
        if _NAME.fullmatch(path.name) and path.name not in writer.names:
            path.unlink()
    page, partial = output / "gallery.md", output / "gallery.md.partial"
    partial.write_text("\n".join(lines), encoding="utf-8")
    partial.replace(page)
    return page


def _read_results(evaluation: Path) -> dict[str, Any]:
    for name in ("results.json", "predictions.jsonl"):
        if not (evaluation / name).is_file():
            raise FileNotFoundError(f"there is no {name} in {evaluation}: name a folder that `mglmm evaluate` wrote")
    try:
        results: dict[str, Any] = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))
        benchmark = results["settings"]["benchmark"]
        complete = benchmark != BENCHMARK or {"split", "data_sha256"} <= results["settings"].keys()
        complete = complete and (benchmark != BENCHMARK or {"limit", "seed", "groups"} <= results.keys())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{evaluation / 'results.json'} is not what `mglmm evaluate` writes ({error!r})") from error
    if benchmark != BENCHMARK or not complete:
        raise ValueError(
            f"{evaluation} measured the benchmark {benchmark!r}"
            + (f": the gallery is of {BENCHMARK!r}" if complete else " with an older version: evaluate again")
        )
    return results


def _check_numbers(ours: Mapping[str, Any], theirs: Mapping[str, Any], evaluation: Path) -> None:
    """Raises where the predictions do not give the numbers of `results.json`."""
    for group, numbers in ours.items():
        for task, measure in _MEASURE.items():
            if task not in numbers:
                continue
            value, known = numbers[task][measure], theirs.get(group, {}).get(task, {}).get(measure, math.nan)
            if not math.isclose(value, known, abs_tol=1e-6):
                raise ValueError(
                    f"the predictions in {evaluation} give a {measure} of {value:.4f} for {group}, {task}, but its results.json "
                    f"says {known:.4f}: run `mglmm evaluate` on that folder again, which scores them anew"
                )


# ------------------------------------------------------------------ the choice


def choose(answers: Sequence[Ranked], number: int) -> dict[str, list[Ranked]]:
    """
    The best, median and worst of the answers, each best first.

    They are ordered by IoU, equal ones by hash. The best are taken from the top, then the worst from the bottom, then those
    nearest to the middle (of two the better one). No photograph is shown twice: the next in the order stands in. Where there
    are fewer than three times `number` photographs, the three kinds share them, the best first.
    """
    ranked = sorted(answers, key=lambda answer: (-(answer.value or 0), answer.hash))
    count = len(ranked)
    orders = {
        "best": range(count),
        "worst": range(count - 1, -1, -1),
        "median": sorted(range(count), key=lambda index: abs(2 * index + 1 - count)),
    }
    room = min(len({answer.photograph for answer in ranked}), 3 * number)
    seen: set[tuple[str, str]] = set()
    taken: dict[str, list[int]] = {}
    for turn, (kind, order) in enumerate(orders.items()):
        first: dict[tuple[str, str], int] = {}
        for index in order:
            if ranked[index].photograph not in seen:
                first.setdefault(ranked[index].photograph, index)
        taken[kind] = list(first.values())[: (room + 2 - turn) // 3]
        seen |= {ranked[index].photograph for index in taken[kind]}
    return {kind: [ranked[index] for index in sorted(taken[kind])] for kind in ("best", "median", "worst")}


def first_by_hash(answers: Sequence[Ranked], number: int) -> list[Ranked]:
    """The first `number` in the order of their hashes, none of them about the same photograph as another."""
    first: dict[tuple[str, str], Ranked] = {}
    for answer in sorted(answers, key=lambda answer: answer.hash):
        first.setdefault(answer.photograph, answer)
    return list(first.values())[:number]


def _group(source: str) -> str:
    """The group of the evaluation in which a source is counted, besides "all"; its own where there is no other."""
    return next((name for name, sources in GROUPS.items() if source in sources), source)


# ------------------------------------------------------------------ the page


def _page(
    samples: Sequence[tuple[Question, float | None]], results: Mapping[str, Any], writer: _Writer, number: int
) -> Iterator[str]:
    """Lines of the Markdown. The pictures are written on the way."""
    asked = [Ranked(question, value) for question, value in samples if "error" not in writer.predictions[question.key]]
    sections: dict[tuple[str, str], list[Ranked]] = defaultdict(list)
    for answer in asked:
        if answer.question.task in TASKS:
            sections[_group(answer.question.source), answer.question.task].append(answer)
    tasks = list(TASKS)
    order = sorted(sections, key=lambda key: (key[0] not in GROUPS, key[0], tasks.index(key[1])))
    large = [key for key in order if len({answer.photograph for answer in sections[key]}) >= 3]
    refusals = _refusals(asked, writer.predictions)

    yield from _head(results, len(samples), len(samples) - len(asked), writer.pictures, number)
    small = [
        f"{_title(*key)} (questions: {len(sections[key]):,}, photographs: {len({a.photograph for a in sections[key]}):,})"
        for key in order
        if key not in large
    ]
    if small:
        yield f"Not shown, because there are fewer than three photographs to choose from: {'; '.join(small)}.\n"
    with tqdm(total=len(large) + len(refusals), desc="drawing", unit="section") as bar:
        for group, task in large:
            answers = sections[group, task]
            value = results["groups"][group][task][_MEASURE[task]]
            measure = "gIoU" if task in REFERRING else "mIoU over ground truth"
            yield f"## {_title(group, task)}\n"
            yield f"{len(answers):,} questions; the evaluation's {measure} of them is {value:.3f}.\n"
            for kind, shown in choose(answers, number).items():
                yield f"### {kind.capitalize()}\n" if shown else ""
                for place, answer in enumerate(shown, 1):
                    yield writer.entry(answer, f"{_slug(group)}-{task}-{kind}-{place}")
            bar.update()
        yield "## Refusals\n"
        for kind, answers in refusals.items():
            yield f"### {kind.capitalize()}\n"
            about = REFERRING if kind == "wrongly refused" else ("absent",)
            possible = sum(answer.question.task in about for answer in asked)
            things = "absent things" if about == ("absent",) else "objects and parts that are there"
            yield f"{len(answers):,} of {possible:,} answers about {things}.\n"
            for place, answer in enumerate(first_by_hash(answers, number), 1):
                yield writer.entry(answer, f"{_slug(kind)}-{place}")
            bar.update()
    yield "## All numbers of this evaluation\n"
    yield to_markdown(results)


def _refusals(asked: Sequence[Ranked], predictions: Predictions) -> dict[str, list[Ranked]]:
    """The answers about absent things, and those without a mask about present ones, by kind."""
    kinds: dict[str, list[Ranked]] = {kind: [] for kind in _REFUSALS}
    for answer in asked:
        refused = not predictions[answer.question.key]["segments"]
        if answer.question.task == "absent":
            kinds["rightly refused" if refused else "wrongly answered"].append(answer)
        elif answer.question.task in REFERRING and refused:
            kinds["wrongly refused"].append(answer)
    return kinds


def _head(results: Mapping[str, Any], count: int, failed: int, pictures: Pictures, number: int) -> Iterator[str]:
    settings = results["settings"]
    model = "" if settings.get("model") is None else f" of `{Path(str(settings['model'])).name}`"
    checkpoint = str(settings.get("checkpoint_sha256") or "unknown")[:12]
    limit = "" if results["limit"] is None else f" --limit {results['limit']}"
    split = "" if settings["split"] == BENCHMARKS[BENCHMARK].split else f" --split {settings['split']}"
    options = ("" if number == 2 else f" --number {number}") + (
        "" if pictures == "masks" else f" --pictures {pictures}"
    )
    yield "# Gallery: answers about held-out photographs, good and bad\n"
    yield (
        f"Answers{model} (checkpoint {checkpoint}) to {count:,} questions about photographs of the split "
        f"{_text(settings['split'])} (data {settings['data_sha256'][:12]}). Nobody picked them: a rule did, and this page and its "
        "pictures are what two commands wrote:\n"
    )
    yield "```bash"
    yield f"mglmm evaluate MODEL --data DATA --output EVALUATION{split}{limit}"
    yield f"mglmm gallery EVALUATION --data DATA --output FOLDER{options}"
    yield "```\n"
    yield (
        "**The rule.** In each section the answers are ordered by IoU, equal ones by the SHA-256 of their question. The "
        f"{number} best, the {number} in the middle and the {number} worst are shown. No photograph appears twice in a "
        "section: the next in the order stands in. The IoU is the one that the evaluation computed: for an object or a part "
        "that of all masks of the answer together with the true mask, 0 for a refusal; for a description the mean over its "
        "true masks of the IoU with the mask of the answer that the evaluation pairs with each, whatever its phrase, 0 for "
        "one without such a mask (`mIoU over ground truth`). Answers "
        "without a mask are refusals; of the right and the wrong ones the first by that SHA-256 are shown.\n"
    )
    if failed:
        yield f"{failed:,} questions could not be asked: they count as refused in the numbers and are not shown.\n"
    ground = (
        "The photographs may not be passed on, so the masks are drawn on plain paper; pale grey is what else the ground truth "
        "of that photograph marks, named below the legend."
        if pictures == "masks"
        else "This page holds the photographs: see their terms before you pass it on."
    )
    yield (
        "**The pictures.** What the answer marks is filled, the truth is an outline. A mask and the true mask that it is "
        f"measured against have one colour and number; a black outline was missed. {ground}\n"
    )


class _Writer:
    """Turns answers into entries of the page, and writes their pictures."""

    def __init__(self, data: datasets.Dataset, predictions: Predictions, folder: Path, pictures: Pictures) -> None:
        self.predictions, self.pictures, self.names = predictions, pictures, set[str]()
        self._data, self._texts, self._folder = data, data.remove_columns("image"), folder
        self._rows: dict[tuple[str, str], list[int]] = defaultdict(list)
        for row, photograph in enumerate(zip(data["source"], data["image_id"], strict=True)):
            self._rows[photograph].append(row)

    def entry(self, answer: Ranked, name: str) -> str:
        """The Markdown of an answer, whose picture is written as `name`.png. Raises `ValueError`: no such photograph."""
        question, row = answer.question, self._texts[answer.question.row]
        given = SegCap.from_dict(self.predictions[question.key])
        pairs = pairs_of(row, given, answer.value)
        photograph = load_picture(self._data[question.row]["image"]) if self.pictures == "photographs" else None
        try:
            picture = render_pairs(pairs, self._others(row, given.image_size), given.image_size, photograph)
        except ValueError as error:
            raise ValueError(f"row {question.row} cannot be drawn: {error}") from error
        path = self._folder / f"{name}.png"
        partial = path.with_suffix(".partial")
        picture.save(partial, "PNG", optimize=True)
        partial.replace(path)
        self.names.add(path.name)
        value = "" if answer.value is None else f"**IoU {answer.value:.3f}** · "
        said = "".join(
            f"<b>{_text(text)}</b>" if indices else _text(text)
            for text, indices in caption_parts(given.clean_text[:_TEXT], given.segments)
        )
        cut = " …" if len(given.clean_text) > _TEXT else ""
        return (
            f"{value}{_text(question.source)} {_text(question.image_id)}, row {question.row}\n\n"
            f"> Q: {_text(question.turns[0][0][:_TEXT])}<br>\n> A: {said or '(nothing)'}{cut}\n\n"
            f"![The answer's masks filled, the true ones outlined]({_FOLDER}/{path.name})\n"
        )

    def _others(self, row: Mapping[str, Any], size: tuple[int, int]) -> list[tuple[str, np.ndarray]]:
        """The shortest phrases and the true masks, bool `(H, W)`, of the photograph's other questions, big ones first."""
        own = {mask["counts"] for mask in row["masks"]}
        phrases: dict[str, list[str]] = defaultdict(list)
        for number in self._rows[row["source"], row["image_id"]]:
            other = self._texts[number]
            for phrase, mask in zip(ground_truth(other)[0], other["masks"], strict=True):
                if mask["counts"] not in own and tuple(mask["size"]) == size:
                    phrases[mask["counts"]].append(phrase)
        found = [
            (min(names, key=lambda name: (len(name), name)), decode_mask({"size": list(size), "counts": counts}))
            for counts, names in phrases.items()
        ]
        return sorted(found, key=lambda other: -int(other[1].sum()))


# ------------------------------------------------------------------ texts


def _title(group: str, task: str) -> str:
    return f"{_text(group)}: {TASKS[task]}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _text(text: str) -> str:
    """Names and texts of data and models, with no Markdown or HTML in them; spaces at the ends stay."""
    plain = re.sub(r"\s+", " ", printable(text))
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", html.escape(plain, quote=False))
