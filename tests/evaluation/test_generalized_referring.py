"""gIoU, cIoU, N-acc and T-acc of questions with several targets or none, against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mglmm.evaluation.metrics import GeneralizedReferringSegmentationScore

SIZE = (10, 20)
WIDTHS = st.integers(0, 20)


def span(start: int, end: int) -> np.ndarray:
    """The columns `start` to `end` (exclusive) of a picture of 10 rows: each is 10 pixels."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, start:end] = True
    return mask


def scored(*questions) -> dict:
    """Questions as (predicted spans, true spans)."""
    score = GeneralizedReferringSegmentationScore()
    for predictions, targets in questions:
        score.update([span(*each) for each in predictions], [span(*each) for each in targets])
    return score.compute()


@pytest.mark.parametrize(
    ("question", "clean", "few", "parity"),
    [
        # two targets, each found by a mask of its own: union against union
        (([(0, 5), (10, 15)], [(0, 5), (10, 20)]), (2 / 3, 2 / 3), (2 / 3, 2 / 3), (2 / 3, 2 / 3)),
        # nothing there, refused (cIoU has nothing to divide; the original prints 0)
        (([], []), (1.0, 1.0), (1.0, 1.0), (1.0, 0.0)),
        # nothing there: an empty mask is no refusal by the count of masks, but it is one by the pixels
        (([(0, 0)], [(3, 3)]), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)),
        # nothing there: 40 pixels are few, 50 are not
        (([(0, 4)], []), (0.0, 0.0), (1.0, 1.0), (0.0, 0.0)),
        (([(0, 5)], []), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
        # a target of 80 pixels, half of it found: by the rule of 50 pixels it is refused
        (([(0, 4)], [(0, 8)]), (0.5, 0.5), (0.0, 0.0), (0.5, 0.5)),
        (([], [(0, 8)]), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)),
    ],
)
def test_one_question_by_hand(question, clean, few, parity) -> None:
    result = scored(question)
    values = result["clean"]
    assert (values["gIoU"], values["cIoU"]) == pytest.approx(clean, abs=1e-12)
    assert (values["gIoU@50px"], values["cIoU@50px"]) == pytest.approx(few, abs=1e-12)
    assert (result["parity"]["gIoU"], result["parity"]["cIoU"]) == pytest.approx(parity, abs=2e-5)


def test_all_questions_by_hand() -> None:
    result = scored(
        ([], []),  # right
        ([(0, 2)], []),  # 20 pixels where nothing is
        ([], []),  # right
        ([(0, 10)], [(0, 8)]),  # 80 of 100
        ([(0, 1)], [(0, 2)]),  # 10 of 20
        ([], [(0, 10)]),  # refused
    )
    clean = result["clean"]
    assert clean["gIoU"] == pytest.approx((1 + 0 + 1 + 0.8 + 0.5 + 0) / 6)
    assert clean["cIoU"] == pytest.approx((80 + 10) / (20 + 100 + 20 + 100))
    assert (clean["N-acc"], clean["T-acc"]) == pytest.approx((2 / 3, 2 / 3))
    assert [clean[f"P@{t}"] for t in (0.5, 0.6, 0.7, 0.8, 0.9)] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3, 0])
    assert clean["gIoU@50px"] == pytest.approx((1 + 1 + 1 + 0.8 + 0 + 0) / 6)
    assert clean["cIoU@50px"] == pytest.approx(80 / (100 + 20 + 100))
    assert (clean["N-acc@50px"], clean["T-acc@50px"]) == pytest.approx((1, 1 / 3))
    assert (clean["questions"], clean["no_target"]) == (6, 3)
    assert result["skipped"] == {}
    assert set(result["parity"]) == {"gIoU", "cIoU"}


def test_what_no_question_tells_is_named() -> None:
    result = scored(([], []))
    assert result["clean"]["N-acc"] == 1.0
    assert "T-acc" not in result["clean"] and set(result["skipped"]) >= {"T-acc", "P@0.5"}
    result = scored(([(0, 1)], [(0, 1)]))
    assert "N-acc" not in result["clean"] and set(result["skipped"]) == {"N-acc"}
    with pytest.raises(ValueError, match="no question"):
        scored()


def test_ignored_pixels_do_not_count() -> None:
    target = np.where(span(5, 20), 255, span(0, 5)).astype(np.uint8)
    score = GeneralizedReferringSegmentationScore()
    score.update([span(0, 20)], [target])
    assert score.compute()["clean"]["gIoU"] == 1.0


QUESTIONS = st.lists(
    st.tuples(st.lists(hnp.arrays(np.bool_, (8, 9)), max_size=3), hnp.arrays(np.bool_, (8, 9))), min_size=1, max_size=5
)


@settings(max_examples=30)
@given(QUESTIONS, st.randoms())
def test_neither_the_order_of_questions_nor_that_of_masks_changes_anything(questions, random) -> None:
    first, second = GeneralizedReferringSegmentationScore(), GeneralizedReferringSegmentationScore()
    for predictions, target in questions:
        first.update(predictions, [target])
    random.shuffle(questions)
    for predictions, target in questions:
        second.update(random.sample(predictions, len(predictions)), [target & span(0, 9)[:8, :9], target])
    assert first.compute()["clean"] == second.compute()["clean"]


@settings(max_examples=30)
@given(QUESTIONS)
def test_refusing_everything(questions) -> None:
    score = GeneralizedReferringSegmentationScore()
    for _, target in questions:
        score.update([], [target])
    clean, absent = score.compute()["clean"], sum(not target.any() for _, target in questions)
    assert clean["gIoU"] == pytest.approx(absent / len(questions))  # all that is absent is right, all else wrong
    assert clean.get("N-acc", 1.0) == 1.0 and clean.get("T-acc", 0.0) == 0.0


def test_what_does_not_fit_is_refused_and_nothing_is_added() -> None:
    score = GeneralizedReferringSegmentationScore()
    with pytest.raises(ValueError, match="2 sizes"):
        score.update([span(0, 1)], [np.zeros((3, 3), bool)], "q")
    with pytest.raises(ValueError, match="bool mask"):
        score.update([np.full(SIZE, np.nan)], [span(0, 1)], "q")
    score.update([span(0, 1)], [], "q")
    with pytest.raises(ValueError, match="'q' comes a second time"):
        score.update([], [], "q")
    assert score.compute()["clean"]["questions"] == 1
