"""The held-out evaluation: scores worked out by hand, and the whole of it with a tiny random model."""

import json
from collections import Counter

import datasets
import numpy as np
import pytest

from mglmm.evaluation import held_out
from mglmm.evaluation.held_out import choose_rows, evaluate, score, to_markdown
from mglmm.processing import SegCap, Segment
from tests.evaluation.conftest import CARS, FASHION, SCENES, SIZES, columns


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


def test_predictions_that_do_not_fit_are_refused(rows, predictions) -> None:
    with pytest.raises(ValueError, match="2 of 10 rows have no prediction, the first is row 4"):
        score(rows, {row: predictions[row] for row in predictions if row not in (4, 9)}, range(10))
    moved = predictions | {0: predictions[4]}
    with pytest.raises(ValueError, match="row 0 has the image_id '1' but its prediction '2'"):
        score(rows, moved, range(10))
    small = SegCap("", "", [Segment("x", None, np.ones((4, 4), bool), 0.5)], (4, 4)).to_dict()
    with pytest.raises(ValueError, match=r"\(40, 60\) belongs to another picture than one of \(4, 4\)"):
        score(rows, predictions | {0: predictions[0] | small}, range(10))


def many_rows() -> datasets.Dataset:
    sizes = {("a", "object"): 100, ("a", "part"): 50, ("b", "object"): 30, ("b", "fine"): 1}
    pairs = [pair for pair, count in sizes.items() for _ in range(count)]
    return datasets.Dataset.from_dict({"source": [a for a, _ in pairs], "task": [b for _, b in pairs]})


def test_a_subset_is_spread_over_sources_and_tasks() -> None:
    data = many_rows()
    chosen = choose_rows(data, 18)
    assert len(set(chosen)) == 18 and chosen == sorted(chosen)
    counts = Counter((data[row]["source"], data[row]["task"]) for row in chosen)
    assert counts[("b", "fine")] == 1  # the rare kind is there
    assert [counts[kind] for kind in (("a", "object"), ("a", "part"), ("b", "object"))] == [9, 5, 3]
    assert choose_rows(data, 18) == chosen
    assert choose_rows(data, 18, seed=1) != chosen
    assert set(chosen) < set(choose_rows(data, 60))
    assert choose_rows(data, 1000) == choose_rows(data) == list(range(181))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        choose_rows(data, 0)


@pytest.fixture
def checkpoint(tiny, tmp_path, monkeypatch):
    """A folder with the tiny model; short answers and a private cache for the test's speed."""
    monkeypatch.setattr(held_out, "MAX_NEW_TOKENS", dict.fromkeys(held_out.MAX_NEW_TOKENS, 5))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "checkpoint"
    tiny.model.save_pretrained(folder)
    tiny.processor.save_pretrained(folder)
    return folder


def test_from_a_folder_to_results(checkpoint, data_folder, tmp_path) -> None:
    output = tmp_path / "out"
    first = evaluate(checkpoint, data_folder, output=output, limit=4, batch_size=2)
    assert (first["rows"], first["rows_answered"]) == (4, 4)
    results = evaluate(checkpoint, data_folder, output=output, batch_size=4)
    assert (results["rows"], results["rows_answered"]) == (10, 6)  # the four of the subset are there
    assert json.loads((output / "results.json").read_text()) == results
    assert sorted(path.name for path in output.iterdir()) == ["predictions.jsonl", "results.json", "settings.json"]
    assert [group["rows"] for group in results["groups"].values()] == [8, 10, 2, 4, 4]
    assert results["settings"]["max_new_tokens"]["fine"] == 5
    assert results["versions"]["torch"].startswith("2.")

    (checkpoint / "README.md").write_text("A changed model card changes nothing.")
    assert evaluate(checkpoint, data_folder, output=output)["rows_answered"] == 0
    with pytest.raises(ValueError, match="holds predictions made with another dtype: choose another output folder"):
        evaluate(checkpoint, data_folder, output=output, dtype="bfloat16")
    with open(checkpoint / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="made with another checkpoint_sha256"):
        evaluate(checkpoint, data_folder, output=output)


def test_nothing_is_kept_without_an_output_folder(checkpoint, data_folder, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert evaluate(checkpoint, data_folder, limit=3)["rows"] == 3
    assert not [
        path for path in set(tmp_path.rglob("*")) - set(before) if tmp_path / "cache" not in (path, *path.parents)
    ]


def test_the_table_holds_every_group_and_escapes_names(rows, predictions) -> None:
    groups = score(rows, predictions, range(10))
    groups["<b>x|y\n"] = groups.pop(SCENES)
    results = {
        "groups": groups,
        "mode": "clean",
        "settings": {
            "split": "validation",
            "checkpoint_sha256": "0123456789abcdef",
            "dtype": "float32",
            "max_new_tokens": {"object": 48},
        },
        "limit": None,
        "seed": 0,
        "rows": 10,
        "rows_answered": 10,
        "seconds": 12.3,
        "device": "cpu (x86_64)",
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    }
    lines = to_markdown(results).splitlines()
    assert lines[0] == f"|  | fashion+cars | all | {CARS} | {FASHION} | &lt;b&gt;x\\|y |"
    assert "| object gIoU | 0.750 | 0.500 | 0.500 | 1.000 | 0.000 |" in lines
    assert "| part gIoU | 0.250 | 0.250 | 0.500 | 0.000 | – |" in lines
    assert "| absent targets refused | 66.7% | 66.7% | 50.0% | 100.0% | – |" in lines
    assert "| panoptic mask recall (exact noun) | – | 0.500 | – | – | 0.500 |" in lines
    assert lines[-1].startswith(
        "10 rows of the split validation, mode clean, checkpoint `0123456789ab`, float32, greedy"
    )
