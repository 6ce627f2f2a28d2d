"""PQ, mIoU and AP against values worked out by hand, and against a second way of counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.evaluation.metrics import PanopticSegmentationScore
from mglmm.processing.rle import encode_mask

PERSON, CAR, SKY, GRASS = 1, 3, 100, 200
CATEGORIES = [
    {"id": PERSON, "isthing": 1},
    {"id": CAR, "isthing": 1},
    {"id": SKY, "isthing": 0},
    {"id": GRASS, "isthing": 0},
]
SIZE = (10, 20)


def segment(category: int, start: int, end: int, **more) -> dict:
    """The columns `start` to `end` (exclusive) of a picture of 10 rows and 20 columns."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, start:end] = True
    return {"category_id": category, "segmentation": mask, **more}


def scored(*images) -> dict:
    score = PanopticSegmentationScore(CATEGORIES)
    for predictions, references in images:
        score.update(predictions, references)
    return score.compute()


TRUTH = [segment(PERSON, 0, 4), segment(PERSON, 4, 8), segment(SKY, 8, 18)]  # the last two columns are void
PERFECT = [segment(PERSON, 0, 4), segment(PERSON, 4, 8), segment(SKY, 8, 18)]


@pytest.mark.parametrize(
    ("predictions", "clean", "parity"),
    [
        # (PQ, SQ, RQ, mIoU) each. All right; in parity both persons are one segment, and the void column is person, too
        (PERFECT, (1, 1, 1, 1), (1, 1, 1, 1)),
        # void does not count against what reaches into it
        ([*PERFECT[:2], segment(SKY, 8, 20)], (1, 1, 1, 1), (1, 1, 1, 1)),
        # a prediction on void alone is no false alarm
        ([*PERFECT, segment(CAR, 18, 20)], (1, 1, 1, 1), (1, 1, 1, 1)),
        # nothing predicted: missed; the original leaves the image out
        ([], (0, 0, 0, 0), None),
        # the sky alone: what is not predicted is void here (PQ of person 0) and person in parity
        ([PERFECT[2]], (1 / 2, 1 / 2, 1 / 2, 1 / 2), (1, 1, 1, 1)),
        # both persons as one: no match (4 of 8 is not more than a half), 1 FP and 2 FN; parity does not see it
        ([segment(PERSON, 0, 8), PERFECT[2]], (1 / 2, 1 / 2, 1 / 2, 1), (1, 1, 1, 1)),
        # one person missed: PQ of person 1 / (1 + 1/2)
        ([PERFECT[0], PERFECT[2]], (5 / 6, 1, 5 / 6, 3 / 4), (1, 1, 1, 1)),
        # sky 6 of 10: IoU 0.6, the rest person: clean matches by void rule
        (
            [*PERFECT[:2], segment(SKY, 8, 14)],
            ((1 + 0.6) / 2, (1 + 0.6) / 2, 1, (1 + 0.6) / 2),
            # person: 8 of its own and 4 of the sky's columns: 8 / 12
            ((8 / 12 + 0.6) / 2, (8 / 12 + 0.6) / 2, 1, (8 / 12 + 0.6) / 2),
        ),
        # a wrong name: car for the second person; parity divides by three categories as well
        (
            [PERFECT[0], segment(CAR, 4, 8), PERFECT[2]],
            ((1 / 1.5 + 0 + 1) / 3, (1 + 0 + 1) / 3, (1 / 1.5 + 0 + 1) / 3, (0.5 + 1) / 2),
            # person 4 of 8 is no match: 1 FP, 1 FN; mIoU (1/2 + 1 of persons and sky) / (and car)
            (1 / 3, 1 / 3, 1 / 3, 1.5 / 3),
        ),
        # stuff in two pieces is one segment
        ([*PERFECT[:2], segment(SKY, 8, 12), segment(SKY, 12, 18)], (1, 1, 1, 1), (1, 1, 1, 1)),
    ],
)
def test_one_image_by_hand(predictions, clean, parity) -> None:
    result = scored((predictions, TRUTH))
    names = ("PQ", "SQ", "RQ", "mIoU")
    assert [result["clean"][name] for name in names] == pytest.approx(clean, abs=1e-12)
    if parity is None:
        assert result["parity"] == {} and "parity" in result["skipped"]
    else:
        assert [result["parity"][name] for name in names] == pytest.approx(parity, abs=1e-12)
    assert result["clean"]["missing"] == (not predictions)


def test_things_and_stuff_apart() -> None:
    result = scored(([PERFECT[0], segment(SKY, 8, 14)], TRUTH))["clean"]
    assert (result["PQ_things"], result["PQ_stuff"]) == pytest.approx((1 / 1.5, 0.6))
    assert (result["SQ_things"], result["RQ_stuff"]) == pytest.approx((1, 1))
    assert result["PQ"] == pytest.approx((1 / 1.5 + 0.6) / 2)


def test_an_overlap_goes_to_the_higher_score_and_at_equal_scores_to_the_earlier() -> None:
    truth = [segment(PERSON, 0, 10), segment(CAR, 10, 20)]
    wide = segment(PERSON, 0, 14)

    def iou_of_car(*predictions) -> float:
        return scored((predictions, truth))["clean"]["PQ"]

    car_wins, person_wins = 1.0, (10 / 14 + 6 / 10) / 2
    assert iou_of_car(wide | {"score": 0.5}, segment(CAR, 10, 20, score=0.6)) == pytest.approx(car_wins)
    assert iou_of_car(segment(CAR, 10, 20, score=0.4), wide | {"score": 0.5}) == pytest.approx(person_wins)
    assert iou_of_car(segment(CAR, 10, 20), wide) == pytest.approx(car_wins)
    assert iou_of_car(wide, segment(CAR, 10, 20)) == pytest.approx(person_wins)
    # in parity the later one overwrites, whatever the scores
    parity = scored(([wide | {"score": 0.9}, segment(CAR, 10, 20, score=0.1)], truth))["parity"]
    assert parity["PQ"] == pytest.approx(car_wins)


def test_a_crowd_is_neither_missed_nor_a_false_alarm() -> None:
    truth = [segment(PERSON, 0, 5), segment(PERSON, 5, 15, iscrowd=1), segment(SKY, 15, 20)]
    sky = segment(SKY, 15, 20)
    alone = scored(([segment(PERSON, 0, 5), sky], truth))["clean"]
    assert (alone["PQ"], alone["mIoU"]) == pytest.approx((1.0, (5 / 15 + 1) / 2))  # mIoU knows no crowds
    within = scored(([segment(PERSON, 0, 5), segment(PERSON, 6, 9), sky], truth))["clean"]
    assert within["PQ"] == 1.0
    assert within["AP"] == pytest.approx(1.0)
    other = scored(([segment(PERSON, 0, 5), segment(CAR, 6, 9), sky], truth))["clean"]  # of another category
    assert other["PQ"] == pytest.approx(2 / 3)


def test_parity_counts_a_crowd_as_an_ordinary_part_of_its_category() -> None:
    truth = [segment(SKY, 0, 10), segment(CAR, 10, 20, iscrowd=1)]
    result = scored(([segment(SKY, 0, 10), segment(CAR, 10, 18)], truth))
    # what is left over is person: 2 columns of car, not more than a half void: a false alarm
    assert result["parity"]["PQ"] == pytest.approx((1 + 0.8 + 0) / 3)
    assert result["parity"]["mIoU"] == pytest.approx((1 + 0.8) / 3)
    assert result["clean"]["PQ"] == 1.0


def test_an_image_without_predictions_counts_in_clean_and_leaves_parity() -> None:
    result = scored((PERFECT, TRUTH), ([], TRUTH))
    assert result["parity"]["PQ"] == 1.0
    # persons: 2 / (2 + 2/2), sky: 1 / (1 + 1/2)
    assert result["clean"]["PQ"] == pytest.approx(2 / 3)
    assert result["clean"]["mIoU"] == pytest.approx(1 / 2)
    assert (result["clean"]["images"], result["clean"]["missing"]) == (2, 1)


def test_ap_is_of_things_by_score() -> None:
    person, wrong = segment(PERSON, 0, 4, score=0.4), segment(PERSON, 12, 16, score=0.9)
    truth = [segment(PERSON, 0, 4), segment(SKY, 4, 20)]
    assert scored(([person, segment(SKY, 4, 20, score=1.0)], truth))["clean"]["AP"] == pytest.approx(1.0)
    assert scored(([person, wrong], truth))["clean"]["AP"] == pytest.approx(0.5)  # the false one ranks first
    # IoU 3/4 passes at the thresholds 0.50, 0.55, ..., 0.75: 6 of 10
    assert scored(([segment(PERSON, 0, 3)], truth))["clean"]["AP"] == pytest.approx(0.6)
    assert scored(([segment(SKY, 4, 20)], truth))["clean"]["AP"] == 0.0
    only_stuff = scored(([segment(PERSON, 0, 4)], [segment(SKY, 0, 20)]))
    assert "AP" not in only_stuff["clean"] and "no thing" in only_stuff["skipped"]["AP"]
    assert only_stuff["clean"]["PQ_things"] == 0.0  # the category occurs in the prediction


def test_an_unknown_category_is_left_out_and_parity_says_that_it_stops() -> None:
    result = scored(([*PERFECT, segment(255, 0, 20)], TRUTH), (PERFECT, TRUTH))
    assert (result["clean"]["PQ"], result["clean"]["unknown_categories"]) == (1.0, 1)
    assert result["parity"] == {} and "not in the list (image 0)" in result["skipped"]["parity"]


def test_a_ground_truth_that_is_all_void_tells_nothing() -> None:
    result = scored((PERFECT, []))
    assert {"PQ", "mIoU", "AP", "parity"} <= set(result["skipped"])
    assert result["clean"] == {"images": 1, "missing": 0, "unknown_categories": 0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([segment(PERSON, 0, 4, score=float("nan"))], TRUTH, "scores must be finite"),
        ([{"category_id": PERSON, "segmentation": np.zeros((3, 3), bool)}], TRUTH, "2 sizes"),
        ([{"category_id": PERSON, "segmentation": np.zeros(SIZE)}], TRUTH, "bool mask"),
        ([], [segment(7, 0, 4)], r"image 'a' has segments of the categories \[7\]"),
        ([], [segment(PERSON, 0, 4), segment(SKY, 3, 9)], "overlap"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_added(predictions, references, message) -> None:
    score = PanopticSegmentationScore(CATEGORIES)
    with pytest.raises(ValueError, match=message):
        score.update(predictions, references, "a")
    score.update(PERFECT, TRUTH, "a")
    with pytest.raises(ValueError, match="'a' comes a second time"):
        score.update(PERFECT, TRUTH, "a")
    assert score.compute()["clean"]["images"] == 1
    with pytest.raises(ValueError, match="no image"):
        PanopticSegmentationScore(CATEGORIES).compute()


LABELS = st.sampled_from([PERSON, CAR, SKY, GRASS])


@st.composite
def images(draw):
    """Disjoint true segments (some of them crowds) with gaps, and predictions with scores that are all different."""
    result = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = sorted(draw(st.sets(st.integers(0, 20), min_size=3, max_size=7)))
        references, stuff = [], set()
        for start, end in zip(cuts, cuts[1:], strict=False):
            label = draw(LABELS)
            if label not in stuff and draw(st.integers(0, 4)):
                references.append(segment(label, start, end, iscrowd=int(label == CAR and draw(st.booleans()))))
                stuff |= {label} & {SKY, GRASS}
        spans = st.tuples(st.integers(0, 19), st.integers(1, 20)).map(sorted)
        predictions = [
            segment(draw(LABELS), *draw(spans), score=(1 + len(result) + 5 * index) / 100)
            for index in range(draw(st.integers(0, 5)))
        ]
        result.append((predictions, references))
    return result


@settings(max_examples=30)
@given(images(), st.randoms())
def test_neither_the_order_of_images_nor_that_of_segments_changes_anything(data, random) -> None:
    first = scored(*data)
    shuffled = [(random.sample(p, len(p)), random.sample(r, len(r))) for p, r in random.sample(data, len(data))]
    assert scored(*shuffled)["clean"] == pytest.approx(first["clean"], abs=1e-12)


@settings(max_examples=15)
@given(images())
def test_the_truth_as_prediction_is_perfect(data) -> None:
    result = scored(
        *(([{**s, "score": 1.0} for s in references if not s["iscrowd"]], references) for _, references in data)
    )
    for name in ("PQ", "SQ", "RQ", "AP"):
        assert result["clean"].get(name, 1.0) == pytest.approx(1.0, abs=1e-12)


@settings(max_examples=60)
@given(images())
def test_pq_by_pixel_sets(data) -> None:
    """The definition once more, over sets of pixels, one painted label map for each image."""
    sums = {label: [0.0, 0, 0, 0] for label in (PERSON, CAR, SKY, GRASS)}
    for predictions, references in data:
        taken, found = set(), []
        for each in sorted(predictions, key=lambda s: -s["score"]):
            pixels = set(zip(*np.nonzero(each["segmentation"]), strict=True)) - taken
            taken |= pixels
            same = [s for s in found if s[0] == each["category_id"] and s[0] in (SKY, GRASS)]
            if same:
                same[0][1].update(pixels)
            else:
                found.append((each["category_id"], pixels))
        true = [
            (s["category_id"], set(zip(*np.nonzero(s["segmentation"]), strict=True)), s["iscrowd"]) for s in references
        ]
        labelled = set().union(*(pixels for _, pixels, _ in true))
        for label, pixels in found:
            matches = [
                len(pixels & other) / len((pixels & labelled) | other)
                for other_label, other, crowd in true
                if other_label == label and not crowd and len(pixels & other) > len((pixels & labelled) | other) / 2
            ]
            crowds = set().union(*(other for other_label, other, crowd in true if crowd and other_label == label))
            if matches:
                sums[label][0] += matches[0]
                sums[label][1] += 1
            elif pixels and len((pixels - labelled) | (pixels & crowds)) <= len(pixels) / 2:
                sums[label][2] += 1
        for label in sums:
            sums[label][3] += sum(other_label == label and not crowd for other_label, _, crowd in true)
    # the misses are what is not matched: TP + FP / 2 + FN / 2 = (TP + FP + all true) / 2
    values = [iou / ((tp + fp + true) / 2) for iou, tp, fp, true in sums.values() if tp + fp + true]
    result = scored(*data)["clean"]
    assert result.get("PQ") == (pytest.approx(np.mean(values), abs=1e-12) if values else None)


def test_rle_and_arrays_are_the_same() -> None:
    def as_rle(segments):
        return [{**each, "segmentation": encode_mask(each["segmentation"])} for each in segments]

    assert scored((as_rle(PERFECT[:2]), as_rle(TRUTH))) == scored((PERFECT[:2], TRUTH))
