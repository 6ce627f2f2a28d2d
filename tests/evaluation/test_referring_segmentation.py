"""cIoU, gIoU and precision against values worked out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mglmm.evaluation.metrics import ReferringSegmentationScore
from mglmm.processing.rle import encode_mask

MASKS = hnp.arrays(np.bool_, (3, 4))
PAIRS = st.lists(st.tuples(MASKS, MASKS), min_size=1, max_size=6)


def mask(text: str) -> np.ndarray:
    """ "x" is foreground, rows are separated by spaces."""
    return np.array([[char == "x" for char in row] for row in text.split()])


def labels(text: str) -> np.ndarray:
    """Digits as they are, "?" is 255 (ignored)."""
    return np.array([[255 if char == "?" else int(char) for char in row] for row in text.split()], dtype=np.uint8)


def scored(*pairs: tuple[str, str]) -> dict[str, float]:
    score = ReferringSegmentationScore()
    for pred, gt in pairs:
        score.update([mask(pred)], [mask(gt)])
    return score.compute()["clean"]


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


@pytest.mark.parametrize(
    ("predictions", "targets", "clean", "parity"),
    [
        # 255 counts nowhere: 1 of the 2 remaining predicted pixels is right
        (["xxx x.."], ["100 ??1"], (1 / 4, 1 / 4), (1 / 4, 1 / 4)),
        # two polygons overlap: the originals lose the pixel of value 2, which makes a predicted one false
        (["xxx ..."], ["121 000"], (1.0, 1.0), (2 / 3, 2 / 3)),
        (["x.x ..."], ["121 000"], (2 / 3, 2 / 3), (1.0, 1.0)),
        # the second question has no answer: in parity it counts for gIoU alone
        (["xxx ..."], ["111 000", "000 111"], (0.5, 0.5), (0.5, 1.0)),
        # a refusal of the first of two
        ([None, "xxx ..."], ["000 111", "111 000"], (0.5, 0.5), (0.5, 1.0)),
        # no answer at all, where the originals stop
        ([], ["111 000"], (0.0, 0.0), (0.0, 0.0)),
        # a mask that no question asked for counts nowhere
        (["xxx ...", "xxx xxx"], ["111 000"], (1.0, 1.0), (1.0, 1.0)),
        # nothing there, nothing predicted: cIoU of the originals is 0 / 1e-10
        (["... ..."], ["000 000"], (1.0, 1.0), (1.0, 0.0)),
    ],
)
def test_the_two_modes(predictions, targets, clean, parity) -> None:
    score = ReferringSegmentationScore()
    score.update([None if each is None else mask(each) for each in predictions], [labels(each) for each in targets])
    result = score.compute()
    assert (result["clean"]["gIoU"], result["clean"]["cIoU"]) == pytest.approx(clean, abs=1e-12)
    assert (result["parity"]["gIoU"], result["parity"]["cIoU"]) == pytest.approx(parity, abs=2e-5)
    assert set(result["parity"]) == {"gIoU", "cIoU"}  # what the originals print
    given_masks = [each for each in predictions if each is not None]
    assert result["clean"]["missing"] == len(targets) - min(len(given_masks), len(targets))
    assert result["clean"]["surplus"] == max(0, len(predictions) - len(targets))


@pytest.mark.parametrize(
    ("predictions", "targets", "ignored", "clean", "parity"),
    [
        (["xx. ...", "..x ..."], ["110 000", "001 100"], None, 3 / 4, 3 / 4),  # unions
        ([], [], None, 1.0, 1.0),  # rightly refused
        (["... ..."], [], None, 1.0, 1.0),
        (["x.. ..."], [], None, 0.0, 0.0),
        ([], ["110 000"], None, 0.0, 0.0),
        (["xxx ..."], ["11? 000"], None, 1.0, 2 / 3),  # ignored pixels are background in MGLMM's merge mode
        (["xxx ..."], ["110 000"], "..x ...", 1.0, 2 / 3),
        (["x.. ..."], [], "x.. ...", 1.0, 0.0),
    ],
)
def test_merge(predictions, targets, ignored, clean, parity) -> None:
    score = ReferringSegmentationScore(merge=True)
    score.update(
        [mask(each) for each in predictions],
        [labels(each) for each in targets],
        None if ignored is None else mask(ignored),
    )
    result = score.compute()
    assert result["clean"]["gIoU"] == pytest.approx(clean, abs=1e-12)
    assert result["parity"]["gIoU"] == pytest.approx(parity, abs=2e-5)
    assert result["clean"]["questions"] == 1


def test_rle_and_arrays_are_the_same() -> None:
    pred, gt, ignored = mask("xx. x.."), mask("xxx ..."), mask("... x..")
    scores = [ReferringSegmentationScore(), ReferringSegmentationScore(), ReferringSegmentationScore()]
    scores[0].update([pred], [gt], ignored)
    scores[1].update([encode_mask(pred)], [encode_mask(gt)], encode_mask(ignored))
    scores[2].update([pred], [np.where(ignored, 255, gt).astype(np.uint8)])
    first, *others = (score.compute() for score in scores)
    assert first["clean"]["gIoU"] == 2 / 3
    assert others == [first, first]


@settings(max_examples=40)
@given(PAIRS, st.randoms())
def test_neither_order_nor_a_swap_of_prediction_and_truth_changes_anything(pairs, random) -> None:
    scores = [ReferringSegmentationScore() for _ in range(3)]
    for pred, gt in pairs:
        scores[0].update([pred], [gt])
    random.shuffle(pairs)
    for pred, gt in pairs:
        scores[1].update([gt], [pred])
    scores[2].update(*zip(*pairs, strict=True))  # all questions are about one image
    first, *others = (score.compute()["clean"] for score in scores)
    assert others == [first, first]
    assert all(0 <= value <= 1 for name, value in first.items() if name not in ("questions", "missing", "surplus"))


@settings(max_examples=40)
@given(PAIRS, hnp.arrays(np.bool_, (3, 4)))
def test_more_of_the_target_never_lowers_anything(pairs, more) -> None:
    before, after = ReferringSegmentationScore(), ReferringSegmentationScore()
    for pred, gt in pairs:
        before.update([pred], [gt])
        after.update([pred | (gt & more)], [gt])
    for mode, values in before.compute().items():
        assert all(after.compute()[mode][name] >= value - 1e-6 for name, value in values.items())


@settings(max_examples=40)
@given(PAIRS, MASKS)
def test_what_is_predicted_on_ignored_pixels_does_not_matter(pairs, ignored) -> None:
    scores = [ReferringSegmentationScore() for _ in range(3)]
    for pred, gt in pairs:
        for score, answer in zip(scores, (pred, pred | ignored, pred & ~ignored), strict=True):
            score.update([answer], [gt], ignored)
    first, *others = (score.compute() for score in scores)
    assert others == [first, first]


@pytest.mark.parametrize(
    ("pred", "gt", "message"),
    [
        ([np.zeros((2, 3), bool)], [np.zeros((3, 2), bool)], r"2 sizes: \[\(2, 3\), \(3, 2\)\]"),
        ([np.zeros((2, 3))], [np.zeros((2, 3), bool)], "bool mask .* got float64 .*threshold"),  # logits, NaN or not
        ([np.zeros((1, 2, 3), bool)], [np.zeros((2, 3), bool)], r"got bool \(1, 2, 3\)"),
        ([], [], "has no question"),
        ([{"size": [2, 3], "counts": "1"}], [np.zeros((2, 3), bool)], "cover 1 pixels"),
    ],
)
def test_masks_that_do_not_fit_are_refused_and_nothing_is_added(pred, gt, message) -> None:
    score = ReferringSegmentationScore()
    with pytest.raises(ValueError, match=message):
        score.update(pred, gt, image_id="a")
    with pytest.raises(ValueError, match="no question"):
        score.compute()
    score.update([np.ones((2, 3), bool)], [np.ones((2, 3), bool)], image_id="a")
    with pytest.raises(ValueError, match="'a' comes a second time"):
        score.update([np.ones((2, 3), bool)], [np.ones((2, 3), bool)], image_id="a")
    assert score.compute()["clean"]["questions"] == 1


def test_settings_that_no_original_has_are_refused() -> None:
    with pytest.raises(ValueError, match="only mglmm merges"):
        ReferringSegmentationScore("lisa", merge=True)
    with pytest.raises(ValueError, match="'gsva'"):
        ReferringSegmentationScore("gsva")
