"""J, F and their statistics against values worked out by hand and against dilation by a disk."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from skimage.morphology import dilation, disk

from mglmm.evaluation.metrics import VideoObjectSegmentationScore
from mglmm.evaluation.metrics.video_object_segmentation import boundary, boundary_accuracy
from mglmm.processing.rle import encode_mask

SIZE = (120, 200)  # diagonal 233.2: a tolerance of 2 pixels
MASKS = hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12))


def box(top: int, left: int, height: int = 40, width: int = 60) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


EMPTY, BOX = np.zeros(SIZE, dtype=bool), box(20, 30)


def scored(*objects, **options) -> dict:
    score = VideoObjectSegmentationScore(**options)
    for predictions, truths in objects:
        score.update(predictions, truths)
    return score.compute()["clean"]


def test_boundary_by_hand() -> None:
    mask = np.array([[int(char) for char in row] for row in ("0000", "0110", "0110", "0001")], dtype=bool)
    # differs from the right, the lower or the lower right neighbour; the last pixel has none of them
    expected = ["1110", "1010", "1111", "0010"]
    assert ["".join(str(int(value)) for value in row) for row in boundary(mask)] == expected
    assert not boundary(np.ones((3, 5), dtype=bool)).any()


@pytest.mark.parametrize(
    ("prediction", "target", "expected"),
    [
        (BOX, BOX, 1.0),
        (EMPTY, EMPTY, 1.0),
        (EMPTY, BOX, 0.0),
        (BOX, EMPTY, 0.0),
        (box(22, 30), BOX, 1.0),  # 2 pixels lower: within the tolerance
        (box(20, 28), BOX, 1.0),
        (box(60, 120), BOX, 0.0),  # elsewhere
        # 10 columns narrower. The target's boundary: 2 x 61 + 2 x 39 = 200 pixels; of these 41 lie on the right edge and 2 x 10
        # above and below, of which 2 x 2 are within 2 columns of the other's corner
        (box(20, 30, 40, 50), BOX, None),
    ],
)
def test_boundary_accuracy_by_hand(prediction, target, expected) -> None:
    if expected is None:
        # precision: the narrow box's right edge is off but for the corners' 2 x 3 pixels (rows within 2 of the other's sides)
        lost = 41 - 2 * 3
        precision = (180 - lost) / 180
        recall = (200 - 41 - 2 * (10 - 2 - 1)) / 200
        expected = 2 * precision * recall / (precision + recall)
    assert boundary_accuracy(prediction, target) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("shift", "inside"), [(1, True), (2, True), (3, False)])
def test_the_tolerance_is_a_fraction_of_the_diagonal_rounded_up(shift, inside) -> None:
    assert math.ceil(0.008 * math.hypot(*SIZE)) == 2
    assert (boundary_accuracy(box(20, 30 + shift), BOX) == 1.0) is inside
    assert boundary_accuracy(box(20, 33), BOX, tolerance=3) == 1.0  # from 1 on in pixels


@settings(max_examples=60)
@given(MASKS, st.data(), st.sampled_from([0.008, 0.1, 0.3, 2, 3]))
def test_boundary_accuracy_is_that_of_dilation_by_a_disk(target, data, tolerance) -> None:
    prediction = data.draw(hnp.arrays(np.bool_, target.shape))
    radius = tolerance if tolerance >= 1 else math.ceil(tolerance * math.hypot(*target.shape))
    ours, theirs = boundary(prediction), boundary(target)
    expected = float(ours.any() == theirs.any())
    if ours.any() and theirs.any():
        precision = (ours & dilation(theirs, disk(radius))).sum() / ours.sum()
        recall = (theirs & dilation(ours, disk(radius))).sum() / theirs.sum()
        expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert boundary_accuracy(prediction, target, tolerance) == pytest.approx(expected, abs=1e-12)
    assert boundary_accuracy(target, prediction, tolerance) == pytest.approx(expected, abs=1e-12)


def test_an_object_by_hand() -> None:
    half = box(20, 30, 20)  # of the 40 rows
    result = scored(([BOX, half, EMPTY, BOX], [BOX, BOX, BOX, EMPTY]))
    assert result["J"] == pytest.approx((1 + 0.5 + 0 + 0) / 4)
    assert result["J_recall"] == 1 / 4  # above a half: a half is not
    # quarters of 4 frames: bounds round(1, 1.75, 2.5, 3.25, 4) - 1 = 0, 1, 2, 2, 3 (2.5 is rounded up): mean(1, 1/2) - mean(0, 0)
    assert result["J_decay"] == pytest.approx(0.75)
    assert result["J&F"] == pytest.approx((result["J"] + result["F"]) / 2)
    assert (result["objects"], result["frames"], result["missing"]) == (1, 4, 0)


def test_first_and_last_frame_can_be_left_out() -> None:
    video = ([EMPTY, BOX, BOX, EMPTY], [BOX, BOX, BOX, BOX])
    assert scored(video)["J"] == 0.5
    assert (scored(video, skip_ends=True)["J"], scored(video, skip_ends=True)["frames"]) == (1.0, 2)
    with pytest.raises(ValueError, match="2 frames, first and last of which do not count: nothing is left"):
        scored(([BOX, BOX], [BOX, BOX]), skip_ends=True)


def test_the_mean_is_over_objects_and_not_over_frames() -> None:
    result = scored(([BOX], [BOX]), ([EMPTY] * 3, [BOX] * 3))
    assert (result["J"], result["F"], result["J&F"], result["frames"]) == (0.5, 0.5, 0.5, 4)


def test_what_is_missing_counts_as_empty() -> None:
    result = scored(([], [BOX, None]), ([None, BOX], [None, BOX]))
    assert result["J"] == result["F"] == (0.5 + 1) / 2  # out of sight and nothing predicted is right
    assert result["missing"] == 1


def test_void_pixels_do_not_count() -> None:
    target = np.where(box(0, 100, 120, 100), 255, BOX).astype(np.uint8)
    result = scored(([BOX | box(0, 100, 120, 50)], [target]))
    assert (result["J"], result["F"]) == (1.0, 1.0)


VIDEOS = st.lists(
    st.lists(st.tuples(*[hnp.arrays(np.bool_, (6, 7))] * 2), min_size=1, max_size=5), min_size=1, max_size=3
)


@settings(max_examples=30)
@given(VIDEOS, st.randoms())
def test_neither_the_order_of_objects_nor_a_swap_changes_j_and_f(videos, random) -> None:
    first = scored(*(zip(*frames, strict=True) for frames in videos))
    random.shuffle(videos)
    second = scored(*(list(zip(*frames, strict=True))[::-1] for frames in videos))
    for name in ("J", "F", "J&F", "J_recall"):
        assert first[name] == pytest.approx(second[name], abs=1e-12) and 0 <= first[name] <= 1


def test_rle_and_arrays_are_the_same() -> None:
    half = box(20, 30, 20)
    assert scored(([encode_mask(half)], [encode_mask(BOX)])) == scored(([half], [BOX]))


def test_what_does_not_fit_is_refused_and_nothing_is_added() -> None:
    score = VideoObjectSegmentationScore()
    for predictions, truths, message in (
        ([BOX], [BOX, BOX], "1 predicted frames for 2"),
        ([BOX[:-1]], [BOX], "2 sizes"),
        ([BOX.astype(float)], [BOX], "bool mask"),
        ([], [], "nothing is left"),
    ):
        with pytest.raises(ValueError, match=message):
            score.update(predictions, truths, "v/1")
    with pytest.raises(ValueError, match="no object"):
        score.compute()
    score.update([BOX], [BOX], "v/1")
    with pytest.raises(ValueError, match="'v/1' comes a second time"):
        score.update([BOX], [BOX], "v/1")
    with pytest.raises(ValueError, match="positive"):
        VideoObjectSegmentationScore(tolerance=0)
