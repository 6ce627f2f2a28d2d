"""What each benchmark asks of prepared data. How the answers are scored stands in `scoring.py`."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import datasets

from mglmm.datasets_scripts.templates import CAPTION_QUESTIONS
from mglmm.evaluation.predictions import GENERATE, Question
from mglmm.processing.uscdf import IMAGE_TOKEN, SEG_TOKEN, parse, render_list

Family = Literal["photos", "referring", "generalized", "segcap", "captions", "regions", "panoptic"]
Mode = Literal["clean", "parity", "both"]

EACH = "each"  # teacher forcing: every expression a conversation of its own, as in LISA
THREE = (
    "three"  # teacher forcing: up to three expressions of an image as turns of one conversation, as in GLaMM and MGLMM
)
LISTED = "listed"  # teacher forcing: all labels of an image in one answer, as in MGLMM's panoptic evaluation
PER_CONVERSATION = 3
PARITY_SEED = 42  # MGLMM's


@dataclass(frozen=True)
class Benchmark:
    """
    Attributes:
        title: For people.
        family: How its rows are asked and scored.
        max_new_tokens: By task of the rows that are asked.
        config: Configuration of the prepared data; `None` for the data's default one, whatever its name.
        split: The default one.
        forced: Protocols of teacher forcing, and whose parity they are.
        answers_parity: Whether parity also (or only) scores the generated answers by the originals' rules.
        splits: Name of the part of the results that a row counts in besides the whole, by its task.
        notes: What differs from the originals because of what prepared data holds.
    """

    title: str
    family: Family
    max_new_tokens: Mapping[str, int]
    config: str | None = "default"
    split: str = "validation"
    forced: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    answers_parity: bool = True
    splits: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


_WORDING = {
    "parity wording": "questions are those of the prepared rows, not the sentence that the originals ask always"
}
_EXPRESSIONS = Benchmark(
    "",
    "referring",
    {"referring": 48, "absent": 48},
    forced={EACH: ("lisa",), THREE: ("glamm", "mglmm")},
    answers_parity=False,
    notes={
        "parity wording": "questions and answers are those of the prepared rows, not drawn from the originals' templates",
        "parity draw": "seed 42 draws from the prepared rows; the originals draw in the order of their files, GLaMM unseeded",
        "parity targets": "polygons are united; the originals sum them and lose the pixels where polygons overlap",
    },
)
_SCENE = Benchmark("", "panoptic", {"panoptic": 512}, config="benchmark", answers_parity=False)
_SCENE_NOTES = {
    "PQ": "over labels, not instances: prepared rows hold one mask for all instances of a label",
    "targets": "labels of fewer than 60 pixels in an image are no rows and so no targets",
}

BENCHMARKS: dict[str, Benchmark] = {
    "photos": Benchmark(
        "held-out photographs",
        "photos",
        {"object": 48, "part": 48, "absent": 48, "panoptic": 256, "fine": 256},
        config="benchmark",
        answers_parity=False,
    ),
    "photos_paraphrased": Benchmark(
        "held-out photographs, asked in words that training never used",
        "photos",
        {"object": 48, "part": 48},
        config="paraphrases",
        answers_parity=False,
    ),
    "refcoco": replace(_EXPRESSIONS, title="RefCOCO"),
    "refcoco+": replace(_EXPRESSIONS, title="RefCOCO+"),
    "refcocog": replace(_EXPRESSIONS, title="RefCOCOg"),
    "grefcoco": Benchmark(
        "gRefCOCO",
        "generalized",
        {"referring": 256, "absent": 256},
        notes={
            "parity sentences": "all of them; MGLMM asks the first sentence of a reference, which prepared rows do not tell",
            "parity length": "answers of up to 256 tokens, MGLMM's of 32",
        },
    ),
    "reasonseg": Benchmark(
        "ReasonSeg",
        "referring",
        {"reasoning": 256},
        forced={EACH: ("lisa",)},
        notes={
            "parity length": "mglmm: answers of up to 256 tokens, MGLMM's of 32",
            "parity question": "the first of an image, as in LISA; MGLMM draws one",
        },
    ),
    "gcg": Benchmark("GranD-f GCG", "segcap", {"grounded_caption": 512}, notes=_WORDING),
    "mgsc": Benchmark(
        "MGSC",
        "segcap",
        {"panoptic": 512, "fine": 512},
        config=None,
        splits={"panoptic": "root", "fine": "subtree"},
        notes=_WORDING,
    ),
    "flickr30k": Benchmark("Flickr30k captions", "captions", {"caption": 128}, split="test", notes=_WORDING),
    "nocaps": Benchmark("NoCaps", "captions", {"caption": 128}, notes=_WORDING),
    "coco_panoptic": replace(_SCENE, title="COCO panoptic", forced={LISTED: ("mglmm",)}, notes=_SCENE_NOTES),
    "ade20k": replace(_SCENE, title="ADE20K", notes=_SCENE_NOTES),
    "refcocog_region": Benchmark("RefCOCOg region captions", "regions", {"region": 512}, notes=_WORDING),
    "vg_region": Benchmark("Visual Genome region captions", "regions", {"region": 512}, split="test", notes=_WORDING),
}


def plan(
    benchmark: Benchmark,
    data: datasets.Dataset,
    *,
    mode: Mode = "both",
    limit: int | None = None,
    seed: int = 0,
    sees_regions: bool = True,
) -> list[Question]:
    """
    Everything to ask, the generated answers first, in the order of the rows.

    Args:
        data: Prepared rows of one split.
        limit: Only so many (generated) questions, spread over sources and tasks; teacher forcing takes the same rows.
        seed: Of the choice; the questions of a smaller limit are among those of a larger one.
        sees_regions: Whether the model has a region encoder. To one that has none a region is shown as a picture of its
            own with the question for a caption, as in MGLMM.

    Raises:
        ValueError: no row has a task of the benchmark, a row is no single question and answer, or `limit` is not positive.
    """
    tasks = data["task"]
    rows = [row for row, task in enumerate(tasks) if task in benchmark.max_new_tokens]
    if not rows:
        found = ", ".join(sorted(set(tasks))) or "none"
        raise ValueError(
            f"none of the {len(data)} rows is of a task that {benchmark.title} asks for "
            f"({', '.join(benchmark.max_new_tokens)}); their tasks: {found}"
        )
    texts = data.select_columns(["image_id", "source", "task", "messages", "regions"])
    make: Callable[[], Iterable[Question]] = {
        "captions": lambda: _captions(benchmark, texts, rows),
        "regions": lambda: _regions(benchmark, texts, rows, sees_regions),
        "panoptic": lambda: _scenes(benchmark, texts, rows, tasks),
    }.get(benchmark.family, lambda: (_asked(benchmark, texts, row) for row in rows))
    questions = list(make())
    chosen = choose([(question.source, question.task) for question in questions], limit, seed)
    questions = [questions[index] for index in chosen]
    result = []
    if mode != "parity" or benchmark.answers_parity:
        result += questions
    if mode != "clean":
        for protocol in benchmark.forced:
            result += _forced(protocol, questions, texts)
    if not result:
        raise ValueError(f"{benchmark.title} has no parity: none of the originals evaluates these rows")
    return result


def choose(strata: Sequence[tuple[str, str]], limit: int | None = None, seed: int = 0) -> list[int]:
    """
    Indices of `limit` members, spread over the strata in proportion, at least one of each if `limit` allows it.

    Raises:
        ValueError: `limit` is not positive.
    """
    if limit is None:
        return list(range(len(strata)))
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, stratum in enumerate(strata):
        members[stratum].append(index)
    ranked = []
    for stratum, indices in sorted(members.items()):
        random.Random(f"{seed}/{stratum}").shuffle(indices)
        ranked += [(rank / len(indices), index) for rank, index in enumerate(indices)]
    return sorted(index for _, index in sorted(ranked, key=lambda item: item[0])[:limit])


def phrase_of(row: Mapping[str, Any]) -> str:
    """What the answer of a row calls its (first) target; "" if it has none."""
    mentions = parse(row["messages"][-1]["content"]).mentions
    return mentions[0].phrase if mentions else ""


def ground_truth(row: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """
    The phrases of the masks of a row, in their order, and its captions.

    GranD-f's ground truth has labels that its caption does not say, and more than one caption of some images. Both stand in
    later turns: an answer with masks names such labels, one without is another caption.
    """
    answers = [parse(message["content"]) for message in row["messages"] if message["role"] == "assistant"]
    phrases = [mention.phrase for answer in answers for mention in answer.mentions]
    return phrases, [answer.clean_text for turn, answer in enumerate(answers) if turn == 0 or not answer.mentions]


def _asked(benchmark: Benchmark, texts: datasets.Dataset, number: int) -> Question:
    """The (first) question of a row."""
    row = texts[number]
    roles = [message["role"] for message in row["messages"]]
    turns = max(len(roles) // 2, 1) if row["task"] == "grounded_caption" else 1  # see `ground_truth`
    if roles != ["user", "assistant"] * turns:
        raise ValueError(f"row {number} is not one question and one answer but {roles}")
    return Question(
        row=number,
        image_id=row["image_id"],
        source=row["source"],
        task=row["task"],
        turns=((row["messages"][0]["content"].replace(IMAGE_TOKEN, "", 1).strip(), ""),),
        rows=(number,),
        max_new_tokens=benchmark.max_new_tokens[row["task"]],
        regions=tuple(map(tuple, row["regions"])),
    )


def _captions(benchmark: Benchmark, texts: datasets.Dataset, rows: Sequence[int]) -> Iterator[Question]:
    """One question for each image; all its rows are references."""
    for numbers in _by_image(texts, rows).values():
        yield replace(_asked(benchmark, texts, numbers[0]), rows=tuple(numbers))


def _regions(
    benchmark: Benchmark, texts: datasets.Dataset, rows: Sequence[int], sees_regions: bool
) -> Iterator[Question]:
    for number in rows:
        question = _asked(benchmark, texts, number)
        if len(question.regions) != 1:
            continue  # Flickr30k Entities also ask for a sentence about several
        if not sees_regions:
            question = replace(question, turns=((CAPTION_QUESTIONS[0], ""),), crop=question.regions[0], regions=())
        yield question


def _scenes(
    benchmark: Benchmark, texts: datasets.Dataset, rows: Sequence[int], tasks: Sequence[str]
) -> Iterator[Question]:
    """One description for each image; its ground truth are the rows about each of its labels."""
    labels = _by_image(texts, [row for row, task in enumerate(tasks) if task == "object"])
    for image, (number, *more) in _by_image(texts, rows).items():
        if more:
            raise ValueError(f"image {image[1]!r} has {len(more) + 1} descriptions, in rows {[number, *more][:5]}")
        yield replace(_asked(benchmark, texts, number), rows=tuple(labels.get(image, ())))


def _by_image(texts: datasets.Dataset, rows: Iterable[int]) -> dict[tuple[str, str], list[int]]:
    sources, images = texts["source"][:], texts["image_id"][:]
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for row in rows:
        groups[sources[row], images[row]].append(row)
    return groups


def _forced(protocol: str, questions: Sequence[Question], texts: datasets.Dataset) -> Iterator[Question]:
    """The same questions with their answers. What has no `[SEG]` to force is left out, and so counted nowhere."""
    if protocol == LISTED:
        for question in questions:
            phrases = [phrase_of(texts[row]) for row in question.rows]
            if phrases:
                yield replace(question, protocol=LISTED, turns=((question.turns[0][0], render_list(phrases)),))
        return
    answered = []
    for question in questions:
        answer = texts[question.row]["messages"][-1]["content"]
        if answer.count(SEG_TOKEN) == 1:
            answered.append(replace(question, protocol=protocol, turns=((question.turns[0][0], answer),)))
    if protocol == EACH:
        yield from answered
        return
    images: dict[tuple[str, str], list[Question]] = defaultdict(list)
    for question in answered:
        images[question.source, question.image_id].append(question)
    rng = random.Random(PARITY_SEED)
    for group in images.values():
        drawn = rng.sample(group, min(PER_CONVERSATION, len(group)))
        turns, rows = tuple(q.turns[0] for q in drawn), tuple(q.row for q in drawn)
        yield replace(drawn[0], turns=turns, rows=rows, regions=())


__all__ = ["BENCHMARKS", "GENERATE", "Benchmark", "choose", "ground_truth", "phrase_of", "plan"]
