"""Mask recall, AP50 and mIoU of descriptions against values worked out by hand and against pycocotools."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.evaluation.metrics import SegCapScore
from mglmm.evaluation.metrics.segcap import same_noun

SIZE = (4, 10)


def span(start: int, end: int) -> np.ndarray:
    """The columns `start` to `end` (exclusive) of a 4 x 10 picture."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, start:end] = True
    return mask


def scored(*images) -> dict:
    """Images as (predictions, references), predictions as (phrase, score, start, end), references as (phrase, start, end)."""
    score = SegCapScore()
    for predictions, references in images:
        score.update(
            [span(start, end) for _, _, start, end in predictions],
            [phrase for phrase, *_ in predictions],
            [value for _, value, _, _ in predictions],
            [span(start, end) for _, start, end in references],
            [phrase for phrase, *_ in references],
        )
    return score.compute()


REFERENCES = [("a dog", 0, 4), ("the sky", 4, 10)]


@pytest.mark.parametrize(
    ("predictions", "recall", "miou", "ap50"),
    [
        # both right
        ([("the dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10)], 1.0, 1.0, 1.0),
        # nothing predicted
        ([], 0.0, 0.0, 0.0),
        # one of two: precision 1 up to recall 1/2, that is at 51 of the 101 recall points
        ([("the dog", 0.9, 0, 4)], 0.5, 0.5, 51 / 101),
        # wrong phrases: the masks count, the recall does not
        ([("a cat", 0.9, 0, 4), ("sea", 0.8, 4, 10)], 0.0, 1.0, 1.0),
        # a mask without a phrase matches nothing
        ([("", 0.9, 0, 4), ("the sky", 0.8, 4, 10)], 0.5, 1.0, 1.0),
        # half of the dog: IoU 1/2 still counts; 1/4 does not
        ([("the dog", 0.9, 0, 2), ("the sky", 0.8, 4, 10)], 1.0, 0.75, 1.0),
        ([("the dog", 0.9, 0, 1), ("the sky", 0.8, 4, 10)], 0.5, 0.625, 51 / 101 * 0.5),
        # the same mask twice is one match and one false positive, which comes first here
        ([("the dog", 0.9, 0, 4), ("the dog", 0.8, 0, 4), ("the sky", 0.7, 4, 10)], 1.0, 1.0, (51 + 50 * 2 / 3) / 101),
        # the better mask has the wrong phrase, a worse one the right phrase: a wrong name does not end the search
        ([("a cat", 0.9, 0, 4), ("the dog", 0.8, 0, 3), ("the sky", 0.7, 4, 10)], 1.0, 1.0, (51 + 50 * 2 / 3) / 101),
        # empty masks are false positives below all others
        ([("the dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10), ("the sky", 0.0, 5, 5)], 1.0, 1.0, 1.0),
        # phrases crossed over
        ([("the sky", 0.9, 0, 4), ("the dog", 0.8, 4, 10)], 0.0, 1.0, 1.0),
    ],
)
def test_one_image_by_hand(predictions, recall, miou, ap50) -> None:
    result = scored((predictions, REFERENCES))
    values = result["mask_recall"], result["mIoU_gt"], result["AP50"]
    assert values == pytest.approx((recall, miou, ap50), abs=1e-9)


def test_an_image_without_predictions_stays_in_every_denominator() -> None:
    perfect = [("a dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10)]
    result = scored((perfect, REFERENCES), ([], [("a car", 0, 5), ("a bus", 5, 10)]))
    assert (result["mask_recall"], result["mIoU_gt"]) == (0.5, 0.5)
    assert result["AP50"] == pytest.approx(51 / 101)
    assert (result["images"], result["masks"], result["predicted_masks"]) == (2, 4, 2)
    assert result["text_match"] == "exact-noun"


def test_a_mask_matches_only_references_of_its_own_image() -> None:
    result = scored(([("a dog", 0.9, 0, 4)], [("a car", 4, 10)]), ([("a car", 0.9, 4, 10)], [("a dog", 0, 4)]))
    assert (result["mask_recall"], result["mIoU_gt"], result["AP50"]) == (0.0, 0.0, 0.0)


def test_ap50_ranks_all_masks_by_score_across_images() -> None:
    right, wrong = ("a dog", 0, 5), ("a dog", 5, 10)
    good, bad = ([("a dog", 0.9, 0, 5)], [right]), ([("a dog", 0.3, 0, 5)], [wrong])
    assert scored(good, bad)["AP50"] == pytest.approx(51 / 101)  # the false positive ranks last
    good, bad = ([("a dog", 0.3, 0, 5)], [right]), ([("a dog", 0.9, 0, 5)], [wrong])
    assert scored(good, bad)["AP50"] == pytest.approx(51 / 101 / 2)  # it ranks first


NOUNS = ("dog", "cat", "sky")
INTERVALS = st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted).filter(lambda pair: pair[0] < pair[1])


@st.composite
def images(draw):
    """Disjoint references, and predictions with scores that are all different."""
    result = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(0, 10), min_size=2, max_size=5)))
        references = [(draw(st.sampled_from(NOUNS)), a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        predictions = [
            (draw(st.sampled_from(NOUNS)), (1 + len(result) + 10 * index) / 100, *draw(INTERVALS))
            for index in range(draw(st.integers(0, 4)))
        ]
        result.append((predictions, references))
    return result


@settings(max_examples=60, deadline=None)
@given(images())
def test_one_more_mask_with_a_wrong_phrase_never_changes_recall(data) -> None:
    before = scored(*data)
    worse = [([*predictions, ("zebra", 0.001, 0, 1)], references) for predictions, references in data]
    after = scored(*worse)
    assert after["mask_recall"] == before["mask_recall"]
    assert after["mIoU_gt"] >= before["mIoU_gt"]  # it only fills a reference that had no pair


@settings(max_examples=60, deadline=None)
@given(images(), st.randoms())
def test_the_order_of_images_changes_nothing(data, random) -> None:
    before = scored(*data)
    random.shuffle(data)
    assert scored(*data) == pytest.approx(before)


@settings(max_examples=60, deadline=None)
@given(images())
def test_the_references_as_predictions_are_perfect(data) -> None:
    perfect = [
        ([(noun, 0.5 + index / 100, a, b) for index, (noun, a, b) in enumerate(references)], references)
        for _, references in data
    ]
    result = scored(*perfect)
    assert (result["mask_recall"], result["mIoU_gt"]) == (1.0, 1.0)
    assert result["AP50"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a dog", "The dog", True),  # article and case
        ("two cars", "a car", True),  # quantity and number
        ("people", "a person", True),  # irregular plural
        ("the shelves", "shelf", True),
        ("a dress", "dresses", True),  # no blind cutting of "s"
        ("the red hats,", "a red  hat", True),  # spacing and punctuation
        ("all the cups", "cup", True),  # several determiners
        ("a hat", "a coat", False),
        ("a red hat", "a hat", False),  # exact: an adjective more is another noun
        ("the hood of the car", "the hood", False),
        ("a", "A", True),  # a determiner alone is a word
        ("", "", False),  # no phrase matches nothing, not even no phrase
        ("the sky", "", False),
    ],
)
def test_same_noun(first, second, same) -> None:
    assert same_noun(first, second) is same
    assert same_noun(second, first) is same


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([span(0, 1)], [], [0.5], [], []), "1 predicted masks with 0 phrases and 1 scores"),
        (([], [], [], [span(0, 1)], []), "1 ground-truth masks with 0 phrases"),
        (([span(0, 1)], ["dog"], [0.5], [np.ones((2, 2), bool)], ["dog"]), "2 shapes"),
        (([span(0, 1)], ["dog"], [float("nan")], [], []), "finite"),
        (([span(0, 1).astype(float)], ["dog"], [0.5], [], []), "bool masks"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        SegCapScore().update(*arguments)


def test_no_reference_at_all_is_refused() -> None:
    score = SegCapScore()
    score.update([span(0, 1)], ["dog"], [0.5], [], [])
    with pytest.raises(ValueError, match="no ground-truth mask in 1 images"):
        score.compute()
