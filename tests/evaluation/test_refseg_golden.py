"""Parity of referring segmentation with what LISA's, GLaMM's and MGLMM's own code prints on the same logits and masks."""

import json

import numpy as np
import pytest

from mglmm.evaluation.metrics import GeneralizedReferringSegmentationScore, ReferringSegmentationScore


@pytest.fixture(scope="module")
def golden(shared_dir):
    """(names in order, name -> (predicted bool masks, uint8 targets)), and the folder of the results."""
    folder = shared_dir / "golden" / "evaluation"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared/golden/evaluation` beside the repository")
    names = [str(entry["n"]) for entry in json.loads((folder / "data" / "refseg.json").read_text())]
    with np.load(folder / "data" / "refseg.npz") as arrays:
        data = {
            name: (list(arrays[f"{name}.logits"] > 0), list(arrays[f"{name}.gt"]) if f"{name}.gt" in arrays else [])
            for name in names
        }
    return data, folder / "results"


def subset(data, which: str) -> list[str]:
    plain = [name for name in data if not name.startswith("merge")]
    return {
        "default.all30": plain,
        "default.equal_counts": [name for name in plain if len(data[name][0]) == len(data[name][1])],
        "merge.all34": list(data),
    }.get(which) or [which.rsplit(".", 1)[-1]]


CASES = [
    *(
        (original, which)
        for original in ("lisa", "glamm", "mglmm")
        for which in ("default.all30", "default.equal_counts")
    ),
    *(("mglmm", which) for which in ("merge.all34", *(f"merge.single.merge{i}" for i in range(4)))),
]


@pytest.mark.parametrize(("original", "which"), CASES)
def test_equal_to_the_original(golden, original, which) -> None:
    data, results = golden
    expected = json.loads((results / f"refseg_{original}.json").read_text())
    assert {case for o, case in CASES if o == original} == set(expected["giou_ciou"])  # nothing is left out
    merge = which.startswith("merge")
    score = ReferringSegmentationScore(original, merge=merge)
    for name in subset(data, which):
        score.update(*data[name], image_id=name)
    printed = score.compute()["parity"]
    assert [printed["gIoU"], printed["cIoU"]] == pytest.approx(expected["giou_ciou"][which], abs=1e-7)
    if merge:
        generalized = GeneralizedReferringSegmentationScore()
        for name in subset(data, which):
            generalized.update(*data[name], name)
        assert generalized.compute()["parity"] == printed


def test_what_clean_makes_of_the_same(golden) -> None:
    """The originals drop unanswered questions from cIoU; three images have a mask too few, three others one too many."""
    data, _ = golden
    score = ReferringSegmentationScore()
    for name in subset(data, "default.all30"):
        score.update(*data[name])
    result = score.compute()
    clean, parity = result["clean"], result["parity"]
    assert (clean["questions"], clean["missing"], clean["surplus"]) == (59, 3, 3)
    assert clean["cIoU"] < parity["cIoU"]
    assert clean["gIoU"] == pytest.approx(parity["gIoU"], abs=1e-6)  # a missing mask counts 0 in both
