"""cIoU, gIoU and precision against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mglmm.evaluation.metrics import ReferringSegmentationScore

MASKS = hnp.arrays(np.bool_, (3, 4))


def mask(text: str) -> np.ndarray:
    """ "x" is foreground, rows are separated by spaces."""
    return np.array([[char == "x" for char in row] for row in text.split()])


def scored(*pairs: tuple[str, str]) -> dict[str, float]:
    score = ReferringSegmentationScore()
    for pred, gt in pairs:
        score.update(mask(pred), mask(gt))
    return score.compute()


@pytest.mark.parametrize(
    ("pairs", "giou", "ciou"),
    [
        ([("xx. ...", "x.. x..")], 1 / 3, 1 / 3),  # 1 of 3 pixels
        ([("xxx xxx", "xxx xxx")], 1.0, 1.0),  # everything right
        ([("... ...", "... ...")], 1.0, 1.0),  # nothing there, nothing predicted
        ([("x.. ...", "... ...")], 0.0, 0.0),  # nothing there, something predicted
        ([("... ...", "xx. ...")], 0.0, 0.0),  # a present target refused
        ([("xxx xxx", "xxx xxx"), ("... ...", "xx. ...")], 0.5, 6 / 8),  # the refused one stays in both denominators
        (
            [("x.. ...", "xx. ..."), ("xxx xxx", "xxx xx.")],
            (1 / 2 + 5 / 6) / 2,
            6 / 8,
        ),  # large masks weigh more in cIoU
        ([("... ...", "... ..."), ("x.. ...", "xx. ...")], 0.75, 0.5),  # empty/empty adds nothing to cIoU
    ],
)
def test_iou_by_hand(pairs, giou, ciou) -> None:
    result = scored(*pairs)
    assert (result["gIoU"], result["cIoU"]) == pytest.approx((giou, ciou), abs=1e-12)
    assert result["questions"] == len(pairs)


def test_precision_counts_an_iou_on_the_threshold() -> None:
    result = scored(("x. ..", "xx .."), ("xx xx", "xx xx"), ("xx xx", "xx x."), (".. ..", "xx xx"))  # 1/2, 1, 3/4, 0
    assert [result[f"P@{threshold}"] for threshold in (0.5, 0.6, 0.7, 0.8, 0.9)] == [0.75, 0.5, 0.5, 0.25, 0.25]


@given(st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=6), st.randoms())
def test_neither_order_nor_a_swap_of_prediction_and_truth_changes_anything(pairs, random) -> None:
    scores = [ReferringSegmentationScore(), ReferringSegmentationScore()]
    for pred, gt in pairs:
        scores[0].update(pred, gt)
    random.shuffle(pairs)
    for pred, gt in pairs:
        scores[1].update(gt, pred)
    first, second = (score.compute() for score in scores)
    assert first == pytest.approx(second, abs=1e-12)
    assert all(0 <= value <= 1 for name, value in first.items() if name != "questions")


def test_counts_do_not_overflow() -> None:
    score = ReferringSegmentationScore()
    for _ in range(3):
        score.update_counts(2**61, 2**62)  # their sum is beyond 64 bits, as int32 sums would be on real data
    assert score.compute()["cIoU"] == 0.5


@pytest.mark.parametrize(
    ("pred", "gt"),
    [
        (np.zeros((2, 3), bool), np.zeros((3, 2), bool)),  # another size
        (np.zeros((2, 3)), np.zeros((2, 3), bool)),  # logits
    ],
)
def test_masks_that_do_not_fit_are_refused(pred, gt) -> None:
    with pytest.raises(ValueError, match="two bool masks of one shape"):
        ReferringSegmentationScore().update(pred, gt)


def test_impossible_counts_and_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="4 pixels cannot belong to a union of 3"):
        ReferringSegmentationScore().update_counts(4, 3)
    with pytest.raises(ValueError, match="no question"):
        ReferringSegmentationScore().compute()
