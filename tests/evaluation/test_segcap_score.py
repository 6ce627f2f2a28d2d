"""AP50, mIoU and mask recall of descriptions against values worked out by hand and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mglmm.evaluation.average_precision import COCO_STATS
from mglmm.evaluation.metrics.segcap import SegCapMetric, SegCapScore
from mglmm.evaluation.text_similarity import ExactSimilarity
from mglmm.processing.rle import encode_mask

SIZE = (4, 10)


def span(start: int, end: int) -> np.ndarray:
    """The columns `start` to `end` (exclusive) of a 4 x 10 picture."""
    mask = np.zeros(SIZE, dtype=bool)
    mask[:, start:end] = True
    return mask


def arguments(predictions, references) -> tuple:
    """Of `update` after the id; predictions are (phrase, score, start, end), references (phrase, start, end)."""
    return (
        [span(start, end) for _, _, start, end in predictions],
        [phrase for phrase, *_ in predictions],
        [value for _, value, _, _ in predictions],
        [span(start, end) for _, start, end in references],
        [phrase for phrase, *_ in references],
    )


def scored(*images, original: str = "mglmm") -> dict:
    """Images as (predictions, references)."""
    score = SegCapScore(ExactSimilarity(), original)
    for number, image in enumerate(images):
        score.update(f"{number}", *arguments(*image))
    return score.compute()


REFERENCES = [("a dog", 0, 4), ("the sky", 4, 10)]


@pytest.mark.parametrize(
    ("predictions", "recall", "miou", "miou_gt", "ap50"),
    [
        # both right
        ([("the dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10)], 1.0, 1.0, 1.0, 1.0),
        # nothing predicted
        ([], 0.0, 0.0, 0.0, 0.0),
        # one of two: precision 1 up to recall 1/2, that is at 51 of the 101 recall points; mIoU ignores what is missing
        ([("the dog", 0.9, 0, 4)], 0.5, 1.0, 0.5, 51 / 101),
        # wrong phrases: the masks count, the recall does not
        ([("a cat", 0.9, 0, 4), ("sea", 0.8, 4, 10)], 0.0, 1.0, 1.0, 1.0),
        # a mask without a phrase matches nothing
        ([("", 0.9, 0, 4), ("the sky", 0.8, 4, 10)], 0.5, 1.0, 1.0, 1.0),
        # half of the dog: IoU 1/2 still counts; 1/4 does not
        ([("the dog", 0.9, 0, 2), ("the sky", 0.8, 4, 10)], 1.0, 0.75, 0.75, 1.0),
        ([("the dog", 0.9, 0, 1), ("the sky", 0.8, 4, 10)], 0.5, 0.625, 0.625, 51 / 101 * 0.5),
        # the same mask twice is one match and one false positive, which comes first here; mIoU ignores it
        (
            [("the dog", 0.9, 0, 4), ("the dog", 0.8, 0, 4), ("the sky", 0.7, 4, 10)],
            1.0, 1.0, 1.0, (51 + 50 * 2 / 3) / 101,
        ),
        # the better mask has the wrong phrase, a worse one the right phrase: a wrong name does not end the search
        (
            [("a cat", 0.9, 0, 4), ("the dog", 0.8, 0, 3), ("the sky", 0.7, 4, 10)],
            1.0, 1.0, 1.0, (51 + 50 * 2 / 3) / 101,
        ),
        # empty masks are false positives below all others
        ([("the dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10), ("the sky", 0.0, 5, 5)], 1.0, 1.0, 1.0, 1.0),
        # phrases crossed over
        ([("the sky", 0.9, 0, 4), ("the dog", 0.8, 4, 10)], 0.0, 1.0, 1.0, 1.0),
    ],
)  # fmt: skip
def test_one_image_by_hand(predictions, recall, miou, miou_gt, ap50) -> None:
    clean = scored((predictions, REFERENCES))["clean"]
    values = clean["mask_recall"], clean["mIoU"], clean["mIoU_gt"], clean["AP50"]
    assert values == pytest.approx((recall, miou, miou_gt, ap50), abs=1e-9)


@pytest.mark.parametrize(
    ("predictions", "references", "parity", "clean"),
    [
        # the best pair is named wrongly: it ends the image, though the sky is right
        ([("cat", 1, 0, 4), ("sky", 1, 5, 10)], REFERENCES, 0, 1 / 2),
        # the right one is the better pair: it counts before the wrong one ends the image
        ([("dog", 1, 0, 4), ("sea", 1, 5, 10)], REFERENCES, 1 / 2, 1 / 2),
        # the best mask of the dog is named wrongly, the second best rightly
        ([("cat", 1, 0, 4), ("dog", 1, 0, 3)], REFERENCES, 0, 1 / 2),
        # the best pair (5/6) blocks the only partner of another ground truth: 4/7 and 3/5 together are two matches
        ([("dog", 1, 0, 6), ("dog", 1, 0, 3)], [("dog", 0, 5), ("dog", 2, 7)], 1 / 2, 1),
    ],
)
def test_where_the_originals_stop_and_clean_goes_on(predictions, references, parity, clean) -> None:
    result = scored((predictions, references))
    assert result["parity"]["mask_recall"] == pytest.approx(parity)
    assert result["clean"]["mask_recall"] == pytest.approx(clean)


PERFECT = ([("a dog", 0.9, 0, 4), ("the sky", 0.8, 4, 10)], REFERENCES)


def unequal(masks: int, phrases: int, labels: int = 2) -> tuple:
    """`update`'s arguments for the right masks and phrases, only so many of them."""
    all_masks, names = [span(0, 4), span(4, 10)], ["dog", "sky", "sea", "hill"]
    return all_masks[:masks], names[:phrases], None, all_masks, names[:labels]


@pytest.mark.parametrize(
    ("image", "glamm", "mglmm", "clean", "failures"),
    [
        # a mask too many for the phrases: the image's matches are lost; GLaMM keeps its two labels, MGLMM drops them
        (unequal(2, 1), 2 / 4, 2 / 2, 3 / 4, 1),
        (unequal(2, 0), 2 / 4, 2 / 2, 2 / 4, 1),
        # phrases beyond the masks are ignored
        (unequal(2, 4), 4 / 4, 4 / 4, 4 / 4, 0),
        (unequal(1, 2), 3 / 4, 3 / 4, 3 / 4, 0),
        # a label without a mask is missed; a mask without a label fails, and in clean it is a missed ground truth
        (unequal(2, 2, labels=3), 4 / 5, 4 / 5, 4 / 5, 0),
        (unequal(2, 2, labels=1), 2 / 3, 2 / 2, 3 / 4, 1),
        # the mask without phrase has an IoU below 1/2: the scripts do not look at its phrase
        (([span(0, 4), span(4, 6)], ["dog"], None, [span(0, 4), span(4, 10)], ["dog", "sky"]), 3 / 4, 3 / 4, 3 / 4, 0),
    ],
)
def test_unequal_numbers_of_masks_and_phrases(image, glamm, mglmm, clean, failures) -> None:
    for original, parity in (("glamm", glamm), ("mglmm", mglmm)):
        score = SegCapScore(ExactSimilarity(), original)
        score.update("perfect", *arguments(*PERFECT))
        score.update("unequal", *image)
        result = score.compute()
        assert (result["parity"]["mask_recall"], result["clean"]["mask_recall"]) == pytest.approx((parity, clean))
        assert result["original_failures"] == failures
        assert result["unequal"] == (len(image[0]) != len(image[1]))


def test_two_empty_masks_are_a_match_of_the_originals_and_nothing_in_clean() -> None:
    image = ([("dog", 0.9, 0, 4), ("sky", 0.8, 5, 5)], [("dog", 0, 4), ("sky", 5, 5)])
    result = scored(image)
    parity, clean = result["parity"], result["clean"]
    assert (parity["mIoU"], parity["mask_recall"]) == (0.0, 1.0)  # the NaN ends mIoU's loop and passes recall's
    assert (clean["mIoU"], clean["mIoU_gt"], clean["mask_recall"]) == (1.0, 0.5, 0.5)
    wrong_name = ([("dog", 0.9, 0, 4), ("hill", 0.8, 5, 5)], [("dog", 0, 4), ("sky", 5, 5)])
    assert scored(wrong_name)["parity"]["mask_recall"] == 0.0  # the NaN pair comes first and its phrase is wrong


def test_an_image_without_predictions_stays_in_every_denominator() -> None:
    result = scored(PERFECT, ([], [("a car", 0, 5), ("a bus", 5, 10)]))
    assert [result["clean"][name] for name in ("mask_recall", "mIoU", "mIoU_gt")] == [0.5, 0.5, 0.5]
    assert result["clean"]["AP50"] == result["parity"]["AP50"] == pytest.approx(51 / 101)
    assert (result["images"], result["masks"], result["predicted_masks"]) == (2, 4, 2)
    assert result["marked"] == {"text_similarity": "exact-noun"}
    assert set(result["skipped"]) == {"METEOR", "CIDEr"}


def test_no_prediction_at_all_scores_nothing() -> None:
    result = scored(([], REFERENCES), ([], REFERENCES))
    assert set(result["clean"].values()) == {0.0}
    assert [result["parity"][name] for name in ("AP", "AP50", "AR100", "mIoU", "mask_recall")] == [0.0] * 5
    assert "original scripts fail" in result["marked"]["parity"]


def test_every_ground_truth_can_be_found() -> None:
    """A ground truth with the id 0, COCOeval's "unmatched", would be lost."""
    parity = scored(PERFECT, PERFECT)["parity"]
    assert (parity["AP"], parity["AP50"], parity["AR100"]) == pytest.approx((1.0, 1.0, 1.0))


def test_a_mask_matches_only_references_of_its_own_image() -> None:
    result = scored(([("a dog", 0.9, 0, 4)], [("a car", 4, 10)]), ([("a car", 0.9, 4, 10)], [("a dog", 0, 4)]))
    assert set(result["clean"].values()) == {0.0}


def test_ap50_ranks_all_masks_by_score_across_images() -> None:
    right, wrong = ("a dog", 0, 5), ("a dog", 5, 10)
    good, bad = ([("a dog", 0.9, 0, 5)], [right]), ([("a dog", 0.3, 0, 5)], [wrong])
    assert scored(good, bad)["clean"]["AP50"] == pytest.approx(51 / 101)  # the false positive ranks last
    good, bad = ([("a dog", 0.3, 0, 5)], [right]), ([("a dog", 0.9, 0, 5)], [wrong])
    assert scored(good, bad)["clean"]["AP50"] == pytest.approx(51 / 101 / 2)  # it ranks first


@pytest.mark.parametrize(
    ("right", "wrong", "ap50"),
    [
        ("sa_2", "sa_10", 51 / 101 / 2),  # as strings: sa_10 comes first, a false positive
        ("sa_10", "sa_2", 51 / 101),
        (2, 10, 51 / 101),  # as numbers: 2 comes first
    ],
)
def test_equal_scores_rank_by_the_ids_of_their_images(right, wrong, ap50) -> None:
    score = SegCapScore(ExactSimilarity())
    score.update(wrong, [span(0, 5)], ["dog"], None, [span(5, 10)], ["dog"])
    score.update(right, [span(0, 5)], ["dog"], None, [span(0, 5)], ["dog"])
    result = score.compute()
    assert (result["parity"]["AP50"], result["clean"]["AP50"]) == pytest.approx((ap50, ap50))
    assert result["marked"]["AP50"] == "the masks of 2 images had no scores and count as 1"


def test_the_numbers_of_one_image() -> None:
    score = SegCapScore(ExactSimilarity())
    masks = [encode_mask(span(4, 10)), span(0, 2), span(0, 0)]
    result = score.update("x", masks, ["sky", "cat"], [0.5, 0.6, 0.7], [span(0, 4), span(4, 10)], ["dog", "sky"])
    assert result == {
        "image_id": "x",
        "masks": 2,
        "predicted_masks": 3,
        "clean": {"mIoU": 0.75, "mIoU_gt": 0.75, "mask_recall": 0.5, "ious": [0.5, 1.0], "pairs": [[1, 0]]},
        "parity": {"mIoU": 0.75, "pairs": [[1, 0]]},
    }


def test_rle_and_bool_masks_are_the_same() -> None:
    masks, phrases, scores, references, labels = arguments([("dog", 0.9, 0, 3), ("sky", 0.8, 5, 10)], REFERENCES)
    as_bytes = [{**encode_mask(mask), "counts": encode_mask(mask)["counts"].encode()} for mask in references]
    results = []
    for answer, truth in ((masks, references), ([encode_mask(mask) for mask in masks], as_bytes)):
        score = SegCapScore(ExactSimilarity())
        results.append((score.update(1, answer, phrases, scores, truth, labels), score.compute()))
    assert results[0] == results[1]


def test_nothing_of_a_mask_is_kept() -> None:
    """What is kept of an image grows neither with its size nor with the detail of its masks."""
    score = SegCapScore(ExactSimilarity())
    noise = np.random.default_rng(0).random((2, 300, 400)) > 0.5  # an RLE of 80 KB each
    result = score.update("noise", list(noise), ["dog", "sky"], None, list(noise), ["dog", "sky"])
    score.update("plain", *arguments(*PERFECT))
    kept = [
        sum(part.nbytes for record in (image.detections, image.detections50) for part in vars_of(record))
        for image in score._images.values()
    ]
    assert result["clean"]["mIoU"] == 1.0
    assert kept[0] == kept[1] < 1000


def vars_of(record) -> list[np.ndarray]:
    return [getattr(record, name) for name in record.__slots__]


@pytest.mark.parametrize("limits", [(6, 6), (0, 3), (3, 0), (130, 4)])  # predictions, ground truths; COCO counts 100
def test_ap_agrees_with_pycocotools(limits) -> None:
    rng = np.random.default_rng(sum(limits))
    images, references, detections = [], [], []
    ours, constant = SegCapScore(ExactSimilarity()), []
    for number in range(12):
        counts = [int(rng.integers(limit + 1)) if limit < 100 else limit for limit in limits]
        if number == 0:
            counts = [2, 2]
        shape = (120, 130)  # masks on both sides of 32 x 32 and 96 x 96 pixels
        predicted, true = (
            [_box(shape, rng.integers(0, 20, 2), rng.integers(10, 110, 2)) for _ in range(count)] for count in counts
        )
        scores = rng.random(len(predicted))
        ours.update(f"{number:02}", predicted, [], scores, true, [""] * len(true))
        images.append({"id": f"{number:02}", "height": 120, "width": 130})
        for mask in true:
            area = {"area": int(mask.sum()), "iscrowd": 0, "id": len(references) + 1}
            references.append({"image_id": f"{number:02}", "category_id": 1, "segmentation": encode_mask(mask)} | area)
        for mask, score in zip(predicted, scores, strict=True):
            record = {"image_id": f"{number:02}", "category_id": 1, "segmentation": encode_mask(mask)}
            detections.append(record | {"score": float(score)})
            constant.append(record | {"score": 1.0})
    result = ours.compute()
    parity = [result["parity"][name] for name in COCO_STATS]
    assert parity == pytest.approx(_coco(images, references, constant), abs=1e-9)
    assert result["clean"]["AP50"] == pytest.approx(_coco(images, references, detections)[1], abs=1e-9)


def _box(shape, corner, size) -> np.ndarray:
    mask = np.zeros(shape, dtype=bool)
    mask[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = True
    return mask


def _coco(images, references, detections) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {"images": images, "categories": [{"id": 1}], "annotations": references}
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "segm")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


NOUNS = ("dog", "cat", "sky")
INTERVALS = st.tuples(st.integers(0, 10), st.integers(0, 10)).map(sorted).map(tuple)  # some are empty
PREDICTIONS = st.tuples(st.sampled_from([*NOUNS, ""]), st.sampled_from([0.1, 0.5, 0.9]), INTERVALS)
TRUTHS = st.tuples(st.sampled_from(NOUNS), INTERVALS)
IMAGES = st.lists(
    st.tuples(
        st.lists(PREDICTIONS.map(lambda drawn: (*drawn[:2], *drawn[2])), max_size=4),
        st.lists(TRUTHS.map(lambda drawn: (drawn[0], *drawn[1])), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=50)
@given(IMAGES, st.randoms(use_true_random=False))
def test_the_order_of_images_and_objects_changes_nothing_in_clean(images, random) -> None:
    before = scored(*images)["clean"]
    numbered = list(enumerate(images))
    random.shuffle(numbered)
    score = SegCapScore(ExactSimilarity())
    for number, (predictions, references) in numbered:
        predictions, references = (random.sample(each, len(each)) for each in (predictions, references))
        score.update(f"{number}", *arguments(predictions, references))
    assert score.compute()["clean"] == pytest.approx(before, abs=1e-12)


@settings(max_examples=30)
@given(IMAGES, INTERVALS, st.integers(0, 4))
def test_one_more_wrong_mask_never_raises_recall(images, interval, place) -> None:
    """Wherever it stands and whatever it covers; in parity it can only end the image earlier."""
    before = scored(*images)
    wrong = ("zebra", 0.5, *interval)
    after = scored(*(([*one[:place], wrong, *one[place:]], truth) for one, truth in images))
    assert after["clean"]["mask_recall"] == before["clean"]["mask_recall"]
    assert after["parity"]["mask_recall"] <= before["parity"]["mask_recall"]


@settings(max_examples=30)
@given(IMAGES)
def test_the_references_as_predictions_are_perfect(images) -> None:
    images = [[(noun, min(start, 9), max(end, start + 1)) for noun, start, end in truth] for _, truth in images]
    result = scored(*(([(noun, 0.5, *box) for noun, *box in truth], truth) for truth in images))
    assert result["clean"] == pytest.approx(dict.fromkeys(result["clean"], 1.0))
    assert result["parity"]["AP"] == pytest.approx(1.0)
    assert result["parity"]["mIoU"] == 1.0


BROKEN = {"size": [4, 10], "counts": "0"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([span(0, 1)], ["dog"], [], [], []), "image 'x': 1 predicted masks need as many finite scores"),
        (([span(0, 1)], ["dog"], [float("nan")], [], []), "1 predicted masks need as many finite scores"),
        (([span(0, 1)], ["dog"], None, [np.ones((2, 2), bool)], ["dog"]), r"one size .* got \[\(2, 2\), \(4, 10\)\]"),
        (([span(0, 1)], ["dog"], None, [], [], "A dog."), "has a caption but no reference"),
        (([span(0, 1).astype(float)], ["dog"], None, [], []), "image 'x', predicted mask 0: .* bool mask"),
        # what pycocotools would read beyond its end, or score with the rest of the memory
        (
            ([], [], None, [span(0, 1), BROKEN], ["a", "b"]),
            "ground-truth mask 1: RLE counts cover 0 pixels",
        ),
        (([{"size": [4, 10], "counts": "P"}], [], None, [], []), "no complete COCO string"),
        (([{"size": [4, 10], "counts": [40]}], [], None, [], []), "compressed COCO string, got list"),
        (([{"counts": "X1"}], [], None, [], []), "predicted mask 0: a mask must be"),
    ],
)
def test_what_does_not_fit_is_refused_and_not_counted(given, message) -> None:
    score = SegCapScore(ExactSimilarity())
    with pytest.raises(ValueError, match=message):
        score.update("x", *given)
    score.update("x", *arguments(*PERFECT))
    assert score.compute()["images"] == 1


def test_an_image_is_scored_once() -> None:
    score = SegCapScore(ExactSimilarity())
    score.update("sa_1", *arguments(*PERFECT))
    with pytest.raises(ValueError, match="image 'sa_1' was scored before"):
        score.update("sa_1", [], [], [], [], [])


def test_no_reference_at_all_is_refused() -> None:
    score = SegCapScore(ExactSimilarity())
    score.update(1, [span(0, 1)], ["dog"], [0.5], [], [])
    with pytest.raises(ValueError, match="no ground-truth mask in 1 images"):
        score.compute()
    with pytest.raises(ValueError, match="no script of 'lisa' scores descriptions"):
        SegCapScore(ExactSimilarity(), "lisa")


class Captions:
    """In the place of `CaptioningScore`: its numbers tell what it was given."""

    def __init__(self, metrics) -> None:
        assert metrics == ("METEOR", "CIDEr")
        self.given = []

    def update(self, image_id, caption, references) -> None:
        self.given.append((image_id, caption, references))

    def compute(self) -> dict:
        answered = sum(caption is not None for _, caption, _ in self.given)
        modes = {"parity": {"CIDEr": answered, "images": 9}, "clean": {"CIDEr": len(self.given), "images": 9}}
        skipped = {"METEOR": "no Java"} if answered else {"METEOR": "no Java", "parity": "no prediction"}
        return {**modes, "missing": 0, "skipped": skipped, "marked": {"tokenizer": "python"}}


def test_captions_are_scored_for_all_and_for_each_split(monkeypatch) -> None:
    monkeypatch.setattr("mglmm.evaluation.metrics.segcap.CaptioningScore", Captions)
    score = SegCapScore(ExactSimilarity())
    score.update("a", *arguments(*PERFECT), "A dog.", ["The dog."], "root")
    score.update("b", *arguments(*PERFECT), "A sky.", ["The sky."], "root")
    score.update("c", *arguments([], REFERENCES), None, ["Nothing."], "subtree")
    score.update("d", *arguments([], REFERENCES), split="subtree")
    result = score.compute()
    root, subtree = result["splits"]["root"], result["splits"]["subtree"]
    assert [part["images"] for part in (result, root, subtree)] == [4, 2, 2]
    assert [part["clean"]["mask_recall"] for part in (result, root, subtree)] == [0.5, 1.0, 0.0]
    assert [part["clean"]["CIDEr"] for part in (result, root, subtree)] == [3, 2, 1]
    assert [part["parity"]["CIDEr"] for part in (result, root, subtree)] == [2, 2, 0]
    assert root["skipped"] == {"METEOR": "no Java"}
    assert root["marked"] == {"text_similarity": "exact-noun", "tokenizer": "python"}
    assert subtree["skipped"] == {"METEOR": "no Java", "captions (parity)": "no prediction"}
    assert subtree["marked"]["CIDEr"] == "of the 1 among 2 images that have reference captions"


def test_as_a_metric_of_evaluate(tmp_path) -> None:
    images = [PERFECT, ([], [("a car", 0, 5)])]
    rows = []
    for number, image in enumerate(images):
        masks, phrases, scores, references, labels = arguments(*image)
        row = {"predictions": [encode_mask(mask) for mask in masks], "phrases": phrases, "scores": scores}
        row |= {"references": [encode_mask(mask) for mask in references], "labels": labels, "image_ids": f"{number}"}
        rows.append(row | {"captions": "", "reference_captions": [], "splits": ""})
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    metric = SegCapMetric(cache_dir=str(tmp_path))
    assert metric.compute(**columns, text_similarity="exact-noun", original="glamm") == scored(
        *images, original="glamm"
    )
