"""Region captioning: ids that occur twice, and which metrics are computed. The scorers are tested with captioning."""

import pytest

from mglmm.evaluation.metrics.region_captioning import RegionCaptioning, RegionCaptioningScore

pytest.importorskip("pycocoevalcap", reason="needs mglmm[eval]")


@pytest.fixture(autouse=True)
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


def score_of(original: str, *captions: tuple[int, str | None]) -> RegionCaptioningScore:
    score = RegionCaptioningScore(original)
    references = {1: ["a red dog on grass"], 2: ["two cats sleep all day"]}
    for image_id, caption in captions:
        score.update(image_id, caption, references[image_id])
    return score


DOG, CATS = (1, "a red dog on grass"), (2, "two cats sleep all day")


def test_meteor_and_cider():
    result = score_of("mglmm", DOG, CATS).compute()
    assert result["parity"] == result["clean"] == {"CIDEr": pytest.approx(10), "images": 2}
    assert set(result["skipped"]) == {"PTB", "METEOR"}  # the test has no Java
    assert result["repeated"] == 0


def test_a_box_that_a_sampler_repeats_counts_once():
    once, twice = score_of("mglmm", DOG, CATS).compute(), score_of("mglmm", DOG, CATS, DOG).compute()
    assert twice["repeated"] == 1
    assert (twice["parity"], twice["clean"]) == (once["parity"], once["clean"])


def test_glamm_has_no_numbers_with_repeated_ids():
    result = score_of("glamm", DOG, CATS, DOG, DOG).compute()
    assert result["parity"] == {} and result["clean"]["images"] == 2
    assert result["skipped"]["parity"] == "GLaMM's scoring stops at repeated image ids: 1, first 1"
    assert score_of("glamm", DOG, CATS).compute()["parity"]["images"] == 2


def test_glamms_scoring_does_stop_at_repeated_ids():
    from pycocoevalcap.bleu.bleu import Bleu

    with pytest.raises(AssertionError):
        Bleu(4).compute_score({1: ["a dog"]}, {1: ["a dog", "a dog"]}, verbose=0)


@pytest.mark.parametrize(
    "second",
    [
        (1, "something else"),
        (1, None),  # a prediction, and none
    ],
)
def test_two_captions_of_a_box_are_an_error_in_clean_and_the_first_in_parity(second):
    score = score_of("mglmm", DOG, CATS, second, (1, "third"))
    with pytest.raises(
        ValueError, match=r"1 image ids have two captions, the first is 1 with 'a red dog on grass' and"
    ):
        score.compute()
    result = score.compute(modes=["parity"])
    assert "clean" not in result and result["parity"]["CIDEr"] == pytest.approx(10)


def test_other_references_of_a_box_are_an_error():
    score = score_of("mglmm", DOG)
    with pytest.raises(ValueError, match="image id 1 occurs twice with other references"):
        score.update(1, "a red dog on grass", ["a cat"])
    with pytest.raises(ValueError, match="no region captions by 'lisa'"):
        RegionCaptioningScore("lisa")


def test_metric_of_evaluate_gives_the_same(tmp_path):
    metric = RegionCaptioning(cache_dir=str(tmp_path))
    result = metric.compute(
        predictions=["a dog", "a cat", "a dog"],
        references=[["a dog"], ["a cat"], ["a dog"]],
        image_ids=["1", "2", "1"],
        original="glamm",
    )
    assert result["parity"] == {} and result["clean"]["images"] == 2 and result["repeated"] == 1
