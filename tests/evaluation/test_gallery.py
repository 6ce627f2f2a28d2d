"""The gallery: what the rule chooses, what the pictures show and do not show, and that wrong input is refused."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mglmm.cli import main
from mglmm.datasets_scripts.features import FEATURES
from mglmm.evaluation.gallery import Ranked, choose, first_by_hash, make_gallery
from mglmm.evaluation.gallery_picture import Pair, pairs_of, render_pairs
from mglmm.evaluation.held_out import PhotosScorer
from mglmm.evaluation.predictions import Question
from mglmm.evaluation.run import evaluate
from mglmm.processing import SegCap, Segment
from mglmm.processing.rle import encode_mask
from tests.evaluation.conftest import CARD, FASHION, columns

SIZE = (40, 60)  # height, width
UNIQUE = (13, 201, 88)  # the colour of every photograph
EVIL = "<script>x</script> ![a](b) **c** | \ud800"


def ranked(*answers: tuple[str, float]) -> list[Ranked]:
    """Answers about a photograph each, with an IoU; their rows count from 0."""
    return [
        Ranked(Question(row, photograph, "s", "object", (("Segment it.", ""),), (row,)), value)
        for row, (photograph, value) in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "number", "best", "median", "worst"),
    [
        ("a0.1 b0.9 c0.5", 1, [1], [2], [0]),  # the plain case
        ("a0.1 b0.9 c0.5 d0.6", 1, [1], [3], [0]),  # of an even number the better one in the middle
        ("a0.1 b0.2 c0.3 d0.4 e0.5 f0.6 g0.7 h0.8 i0.9", 2, [8, 7], [5, 4], [1, 0]),  # each kind from best to worst
        ("a0.1 b0.2 c0.3 d0.4 e0.5 f0.6", 2, [5, 4], [3, 2], [1, 0]),  # just enough
        ("a0.1 b0.2 c0.3 d0.4", 2, [3, 2], [1], [0]),  # fewer than asked: turns go around
        ("a0.1 b0.2", 3, [1], [], [0]),  # nothing is left for the middle
        ("a0.1", 2, [0], [], []),
        ("", 2, [], [], []),
        ("a0.1 a0.9 b0.8 b0.2 c0.5", 2, [1], [4], [3]),  # a photograph once: 2 and 0 are of photographs that are there
    ],
)
def test_the_choice(answers: str, number: int, best: list[int], median: list[int], worst: list[int]) -> None:
    chosen = choose(ranked(*((text[0], float(text[1:])) for text in answers.split())), number)
    rows = {kind: [answer.question.row for answer in shown] for kind, shown in chosen.items()}
    assert rows == {"best": best, "median": median, "worst": worst}


def test_equal_ones_are_in_the_order_of_their_hashes() -> None:
    answers = ranked(*((name, 0.5) for name in "abcdef"))
    assert [answer.hash[:4] for answer in answers] == ["9637", "07a7", "7283", "6952", "1689", "ceb6"]
    shown = [answer.question.row for kind in choose(answers, 2).values() for answer in kind]
    assert shown == [1, 4, 3, 2, 0, 5]
    assert [answer.question.row for answer in first_by_hash(answers[::-1], 3)] == [1, 4, 3]


def test_first_by_hash_shows_a_photograph_once() -> None:
    answers = ranked(*(("a", 0.0), ("a", 0.0), ("b", 0.0)))
    shown = first_by_hash(answers, 5)
    assert sorted(answer.photograph[1] for answer in shown) == ["a", "b"]


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 1)), max_size=20), st.integers(1, 4))
def test_as_many_as_there_are_photographs_and_none_twice(answers: list[tuple[str, float]], number: int) -> None:
    shown = [answer.photograph for kind in choose(ranked(*answers), number).values() for answer in kind]
    assert len(shown) == len(set(shown)) == min(3 * number, len({photograph for photograph, _ in answers}))


# ------------------------------------------------------------------ pictures


def row(image_id: str, task: str, question: str, answer: str, *spans: tuple[int, int]) -> dict:
    return {
        "image": Image.new("RGB", SIZE[::-1], UNIQUE),
        "image_id": image_id,
        "source": FASHION,
        "task": task,
        "messages": [{"role": "user", "content": f"<image>\n{question}"}, {"role": "assistant", "content": answer}],
        "masks": [encode_mask(columns(SIZE, *span)) for span in spans],
        "regions": [],
        "ignore_mask": None,
    }


def answer_of(*segments: tuple[str, float, int, int]) -> SegCap:
    """Segments (phrase, score, first column, last column)."""
    text = " ".join(phrase for phrase, *_ in segments)
    parsed = [
        Segment(phrase, (text.index(phrase), text.index(phrase) + len(phrase)), columns(SIZE, start, stop), score)
        for phrase, score, start, stop in segments
    ]
    return SegCap(text, text, parsed, SIZE)


def test_the_pairs_of_a_description_are_those_of_the_evaluation() -> None:
    described = row(
        "1", "fine", "?", "<p> a hat </p> [SEG] <p> a bag </p> [SEG] <p> a shoe </p> [SEG]", (0, 10), (10, 30), (50, 60)
    )
    answer = answer_of(("a tie", 0.9, 34, 36), ("a cap", 0.8, 0, 5), ("a sack", 0.7, 10, 20))
    pairs = pairs_of(described, answer, None)
    # What has a partner, what was made up, what was missed.
    expected = [("a cap", "a hat", 0.5), ("a sack", "a bag", 0.5), ("a tie", None, None), (None, "a shoe", 0.0)]
    assert [(pair.answer, pair.truth, pair.iou) for pair in pairs] == expected
    question = Question(0, "1", FASHION, "fine", (("?", ""),), (0,))
    record = {"row": 0, "well_formed": True, "truncated": False, **answer.to_dict()}
    sample = PhotosScorer().update(question, [described], record)
    assert sample is not None and sample.value == pytest.approx((0.5 + 0.5 + 0) / 3)


def test_all_masks_of_an_answer_are_measured_together_against_an_object() -> None:
    asked = row("1", "object", "?", "Sure, <p> the hat </p> [SEG].", (0, 10))
    (pair,) = pairs_of(asked, answer_of(("a hat", 0.9, 0, 4), ("a cap", 0.8, 4, 8)), 0.8)
    assert (pair.answer, pair.truth, pair.iou) == ("a hat; a cap", "the hat", 0.8)
    assert pair.answer_mask is not None and np.array_equal(pair.answer_mask, columns(SIZE, 0, 8))
    (refused,) = pairs_of(asked, answer_of(), 0.0)
    assert (refused.answer, refused.answer_mask, refused.truth) == (None, None, "the hat")
    absent = row("1", "absent", "?", "I cannot see it.")
    assert pairs_of(absent, answer_of(), None) == []
    assert [pair.truth for pair in pairs_of(absent, answer_of(("a hat", 0.9, 0, 4)), None)] == [None]


def test_answers_are_filled_and_truths_outlined() -> None:
    pair = Pair("a hat", "the hat", columns(SIZE, 0, 30), columns(SIZE, 15, 45), 1 / 3)
    picture = render_pairs([pair], [("a coat", columns(SIZE, 50, 60))], SIZE).convert("RGB")
    # The frame is 400 pixels wide: a column of the mask is 6.7 of them, from pixel 12 on.
    at = {column: picture.getpixel((12 + round(column * 400 / 60), 150)) for column in (7, 15, 22, 37, 45, 55)}
    fill = at[7]
    assert fill == at[22] and fill[0] > 240 and fill[1] < 200  # filled, also where both are
    assert at[15] == at[45] and at[15][0] > at[15][1] + 80 and max(at[15]) < 230  # the outline, a darker red
    assert at[37] == (255, 255, 255)  # the truth is not filled
    assert max(at[55]) - min(at[55]) < 8 and at[55][0] < 245  # grey


@pytest.mark.parametrize("phrase", ["", "x" * 500, "a " * 300, EVIL, "赤い帽子"])
def test_every_phrase_has_its_legend(phrase: str) -> None:
    empty = columns(SIZE, 0, 0)  # an answer may have an empty mask
    pairs = [Pair(phrase, phrase, columns(SIZE, 0, 1), empty, 0.0), Pair(phrase, None, empty), Pair(None, phrase)]
    picture = render_pairs(pairs, [(phrase, columns(SIZE, 0, 9))] * 3, SIZE)
    assert picture.size == (858, 291)


def test_masks_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sizes \[\(4, 4\)\] where \(40, 60\) is expected"):
        render_pairs([Pair("a", None, np.ones((4, 4), bool))], [], SIZE)


# ------------------------------------------------------------------ the page


QUALITY = {"1": 10, "2": 5, "3": 1, "4": 9, "5": 0}  # columns found of ten, by photograph; 0 is a refusal


def write_rows(folder: Path, question: str = "Segment the hat.") -> Path:
    """Two questions about each photograph, as `prepare` writes them."""
    rows = [row(i, "object", question, "Sure, <p> the hat </p> [SEG].", (0, 10)) for i in QUALITY]
    rows += [row(i, "absent", "Segment the car.", "I cannot see the car.") for i in QUALITY]
    (folder / "benchmark").mkdir(parents=True)
    dataset = datasets.Dataset.from_list(rows, features=FEATURES)
    dataset.to_parquet(folder / "benchmark" / "photos-validation-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD)
    return folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `data` and its `evaluation`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = write_rows(tmp_path / "data")
    (tmp_path / "evaluation").mkdir()
    lines = []
    for number, (image_id, found) in enumerate(QUALITY.items()):
        for task, shown in (("object", found), ("absent", found == 1)):
            answer = answer_of(("a hat", 0.9, 0, shown)) if shown else SegCap(EVIL, EVIL, [], SIZE)
            facts = {"row": number + 5 * (task == "absent"), "image_id": image_id, "source": FASHION, "task": task}
            lines.append(json.dumps(facts | {"well_formed": True, "truncated": False} | answer.to_dict()))
    (tmp_path / "evaluation" / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    evaluate(None, data, tmp_path / "evaluation", predictions=tmp_path / "evaluation" / "predictions.jsonl")
    return tmp_path


def run_gallery(home: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    command = ["mglmm", "gallery", str(home / "evaluation"), "--data", str(home / "data")]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(home / "docs"), *options])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code
    return (home / "docs" / "gallery.md").read_text(encoding="utf-8")


def pixels_like_the_photograph(path: Path, tolerance: int) -> int:
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(pixels - UNIQUE).max(axis=-1) <= tolerance).sum())


def test_one_command_from_an_evaluation_to_a_page(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = run_gallery(home, monkeypatch, "--number", "1")
    shown = re.findall(r"!\[[^]]*\]\(gallery/([^)]*)\)", page)
    kinds = ["best", "median", "worst"]
    assert shown == [
        *(f"fashion-cars-object-{kind}-1.png" for kind in kinds),
        *(f"{kind}-1.png" for kind in ("rightly-refused", "wrongly-refused", "wrongly-answered")),
    ]
    assert sorted(shown) == sorted(path.name for path in (home / "docs" / "gallery").iterdir())
    assert re.findall(r"\*\*IoU ([\d.]+)\*\*", page) == ["1.000", "0.500", "0.000", "0.000"]
    assert "5 questions; the evaluation's gIoU of them is 0.500." in page
    for counts in ("4 of 5 answers about absent", "1 of 5 answers about objects", "1 of 5 answers about absent"):
        assert counts in page
    assert "mglmm gallery EVALUATION --data DATA --output FOLDER --number 1\n" in page
    assert "to 10 questions" in page and "| object gIoU | 0.500 |" in page
    assert "> A: <b>a hat</b>\n" in page
    assert "<script>" not in page and "![a]" not in page and str(home) not in page
    assert r"&lt;script&gt;x&lt;/script&gt; \!\[a\](b) \*\*c\*\* \| " in page


def test_no_pixel_of_a_photograph_is_in_the_default_pictures(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_gallery(home, monkeypatch, "--pictures", "photographs", "--number", "3")
    pictures = list((home / "docs" / "gallery").iterdir())
    assert len(pictures) == 5 + 3 + 1 + 1 and all(pixels_like_the_photograph(path, 0) for path in pictures)
    (home / "docs" / "gallery" / "mine.png").write_bytes(b"")
    run_gallery(home, monkeypatch, "--number", "1")  # pictures of the larger gallery are gone
    assert len(list((home / "docs" / "gallery").iterdir())) == 6 + 1
    (home / "docs" / "gallery" / "mine.png").unlink()
    assert sum(pixels_like_the_photograph(path, 24) for path in (home / "docs" / "gallery").iterdir()) == 0


def test_wrong_input_is_refused(home: Path) -> None:
    def refused(kind: type[Exception], message: str, evaluation: str = "evaluation", data: str = "data") -> None:
        with pytest.raises(kind, match=message):
            make_gallery(home / evaluation, home / data, home / "docs")
        assert not (home / "docs").exists()

    refused(FileNotFoundError, r"there is no results.json in .*: name a folder that `mglmm evaluate` wrote", "data")
    write_rows(home / "reworded", "Outline the hat.")
    refused(ValueError, r"measured other data than the 10 rows of .*reworded \(SHA-256", data="reworded")
    predictions, results = (home / "evaluation" / name for name in ("predictions.jsonl", "results.json"))
    lines = predictions.read_text().splitlines(keepends=True)
    predictions.write_text("".join(lines[:-1]))
    refused(ValueError, "1 of 10 rows have no prediction")
    better = json.loads(lines[4]) | {"segments": json.loads(lines[0])["segments"]}  # photograph 3, found whole
    better |= {"text": "a hat", "clean_text": "a hat"}
    predictions.write_text("".join([*lines[:4], f"{json.dumps(better)}\n", *lines[5:]]))
    refused(ValueError, r"give a gIoU of 0.6800 for fashion\+cars, object, but its results.json says 0.5000")
    predictions.unlink()
    refused(FileNotFoundError, "there is no predictions.jsonl in")
    predictions.write_text("".join(lines))
    results.write_text("[]")
    refused(ValueError, "is not what `mglmm evaluate` writes")


def test_another_benchmark_has_no_gallery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "predictions.jsonl").write_text("")
    (tmp_path / "results.json").write_text(json.dumps({"settings": {"benchmark": "refcoco"}}))
    with pytest.raises(ValueError, match="measured the benchmark 'refcoco': the gallery is of 'photos'"):
        make_gallery(tmp_path, tmp_path, tmp_path / "docs")
    with pytest.raises(ValueError, match="number must be at least 1, got 0"):
        make_gallery(tmp_path, tmp_path, tmp_path / "docs", number=0)
