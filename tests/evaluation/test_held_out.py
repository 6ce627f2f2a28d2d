"""The benchmark of held-out photographs: scores worked out by hand."""

import numpy as np
import pytest

from mglmm.evaluation.benchmarks import BENCHMARKS, plan
from mglmm.evaluation.held_out import PhotosScorer, table
from mglmm.processing import SegCap, Segment
from tests.evaluation.conftest import CARS, FASHION, SCENES, SIZES, columns


def score(rows, predictions: dict[int, dict], numbers) -> dict[str, dict]:
    scorer, texts = PhotosScorer(), rows.remove_columns("image")
    questions = plan(BENCHMARKS["photos"], rows)
    for number in numbers:
        scorer.update(questions[number], [texts[number]], predictions[number])
    return scorer.compute().clean


def prediction(rows, index: int, *segments: tuple[str, float, int, int], well_formed: bool = True) -> dict:
    """A record for row `index` with segments (phrase, score, first column, last column); "" is a mask without phrase (the query stands in)."""
    question = rows[index]
    size = SIZES[question["image_id"]]
    text = " ".join(phrase for phrase, *_ in segments)
    parsed, end = [], 0
    for phrase, value, start, stop in segments:
        begin = text.index(phrase, end) if phrase else 0
        end = begin + len(phrase)
        span = (begin, end) if phrase else None
        parsed.append(Segment(phrase or "hat", span, columns(size, start, stop), value))
    return {
        **{name: question[name] for name in ("image_id", "source", "task")},
        "row": index,
        "well_formed": well_formed,
        "truncated": False,
        **SegCap(text, text, parsed, size).to_dict(),
    }


@pytest.fixture
def predictions(rows) -> dict[int, dict]:
    """One answer of each kind; the expected scores below follow from them."""
    records = [
        prediction(rows, 0, ("person", 0.9, 0, 6), ("person", 0.8, 4, 10)),  # object: the union is right, IoU 1
        prediction(rows, 1),  # part: a present target refused, IoU 0 of 4 x 40 pixels
        prediction(rows, 2),  # absent: refused
        prediction(rows, 3, ("", 0.7, 0, 4)),  # fine: the right mask without a phrase
        prediction(rows, 4, ("car", 0.9, 0, 15)),  # object: half of the car
        prediction(rows, 5, ("wheels", 0.9, 0, 10)),  # part: twice the wheels
        prediction(rows, 6, ("dog", 0.2, 3, 3)),  # absent: a mask, though an empty one, is no refusal
        prediction(rows, 7, well_formed=False),  # absent: refused, malformed
        prediction(rows, 8),  # object: refused
        prediction(rows, 9, ("sky", 0.9, 0, 16), ("a cat", 0.8, 16, 32)),  # panoptic: one wrong name
    ]
    return {record["row"]: record for record in records}


def test_scores_by_hand(rows, predictions) -> None:
    groups = score(rows, predictions, range(10))
    assert list(groups) == ["fashion+cars", "all", SCENES, CARS, FASHION]
    both = groups["fashion+cars"]
    assert (both["rows"], both["malformed"], both["truncated"], both["well_formed"]) == (8, 1, 0, 7 / 8)
    assert both["object"]["gIoU"] == pytest.approx((1 + 0.5) / 2)
    assert both["object"]["cIoU"] == pytest.approx((40 * 10 + 50 * 15) / (40 * 10 + 50 * 30))
    assert both["part"]["gIoU"] == pytest.approx((0 + 0.5) / 2)
    assert both["part"]["cIoU"] == pytest.approx(50 * 5 / (40 * 4 + 50 * 10))
    assert both["part"]["questions"] == 2
    assert (both["absent"], both["refused"]) == (3, pytest.approx(2 / 3))
    assert both["false_refusals"] == pytest.approx(1 / 4)
    values = [both["fine"][name] for name in ("mask_recall", "mIoU_gt", "AP50")]
    assert values == pytest.approx([0.0, 1.0, 1.0])  # a mask without a phrase counts, but is not recalled
    assert "panoptic" not in both

    scenes = groups[SCENES]
    assert (scenes["panoptic"]["mask_recall"], scenes["panoptic"]["mIoU_gt"]) == (0.5, 1.0)
    assert scenes["false_refusals"] == 1.0
    assert {"part", "absent", "refused", "fine"}.isdisjoint(scenes)
    assert groups["all"]["rows"] == 10
    assert groups["all"]["false_refusals"] == pytest.approx(2 / 5)


def test_the_order_of_rows_changes_nothing(rows, predictions) -> None:
    assert score(rows, predictions, range(10)) == score(rows, predictions, list(range(10))[::-1])


def test_a_wrong_extra_mask_never_helps(rows, predictions) -> None:
    before = score(rows, predictions, range(10))["all"]
    for index in range(10):
        segments = [
            (s["phrase"] if s["span"] else "", s["score"], *s["box"][::2]) for s in predictions[index]["segments"]
        ]
        predictions[index] = prediction(rows, index, *segments, ("zebra", 0.01, 20, 21))
    after = score(rows, predictions, range(10))["all"]
    assert after["object"]["gIoU"] < before["object"]["gIoU"]
    assert after["refused"] == 0.0
    assert after["panoptic"]["mask_recall"] == before["panoptic"]["mask_recall"]
    assert after["panoptic"]["AP50"] == before["panoptic"]["AP50"]  # a false positive below all true ones


def test_masks_of_another_picture_are_refused(rows, predictions) -> None:
    small = SegCap("", "", [Segment("x", None, np.ones((4, 4), bool), 0.5)], (4, 4)).to_dict()
    with pytest.raises(ValueError, match=r"masks of the sizes \[\(4, 4\), \(40, 60\)\] in a picture of \(4, 4\)"):
        score(rows, predictions | {0: predictions[0] | small}, range(10))


def test_a_question_that_failed_is_a_present_target_refused(rows, predictions) -> None:
    nothing = SegCap("", "", [], (1, 1)).to_dict()
    failed = predictions[0] | nothing | {"error": "unreadable", "well_formed": False}
    groups = score(rows, predictions | {0: failed}, range(10))
    assert groups["fashion+cars"]["object"]["gIoU"] == pytest.approx(0.25)
    assert groups["fashion+cars"]["false_refusals"] == pytest.approx(1 / 2)


def test_samples_for_the_report(rows, predictions) -> None:
    scorer, texts = PhotosScorer(), rows.remove_columns("image")
    questions = plan(BENCHMARKS["photos"], rows)
    samples = [scorer.update(questions[row], [texts[row]], predictions[row]) for row in range(10)]
    assert [sample.value for sample in samples] == [1.0, 0.0, None, 1.0, 0.5, 0.5, None, None, 0.0, 1.0]
    assert samples[9].phrases == (("the sky", True), ("two dogs", False))
    assert (samples[4].phrases, samples[1].phrases) == ((("the car", True),), (("hat", False),))


def test_the_table_holds_every_group(rows, predictions) -> None:
    lines = [" | ".join(cells) for cells in table(score(rows, predictions, range(10)))]
    assert lines[0] == f" | fashion+cars | all | {SCENES} | {CARS} | {FASHION}"
    assert "object gIoU | 0.750 | 0.500 | 0.000 | 0.500 | 1.000" in lines
    assert "part gIoU | 0.250 | 0.250 | – | 0.500 | 0.000" in lines
    assert "absent targets refused | 66.7% | 66.7% | – | 50.0% | 100.0%" in lines
    assert "panoptic mask recall (exact noun) | – | 0.500 | 0.500 | – | –" in lines
