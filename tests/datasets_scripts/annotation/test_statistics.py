from pathlib import Path

import pytest

from mglmm.datasets_scripts.annotation.statistics import collect
from tests.datasets_scripts.annotation.run_folder import (
    ROOT_TEXT,
    both_contexts,
    context,
    exchange,
    house_tree,
    tree_node,
    write_image,
    write_run,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tmp_path / "images")


def test_numbers_of_one_image(run: Path) -> None:
    write_image(run, dropped=[(7, "low_quality"), (8, "duplicate_of:m0003"), (9, "duplicate_of:m0001")])
    found = collect(run)
    assert found.to_dict() == {
        "images": {"done": 1, "failed": 0, "reasons": {}},
        "items": {"ok": 2},
        "masks_per_item": 2.0,
        "words_per_item": 10.5,  # "A tall tree stands beside a brick house. The sky is grey." has 12, the other text 9
        "subtrees_per_image": 1.0,
        "coverage": 0.5625,  # (900 + 450) of 2,400 pixels; windows and door lie in the house
        "objects": {"ok": 5},
        "rules": {
            **{f"L{n}": {"asked": 1, "passed_first": 1.0, "passed": 1.0} for n in (1, 2, 4, 5, 8)},
            **{f"C{n}": {"asked": 2, "passed_first": 1.0, "passed": 1.0} for n in (1, 2, 3, 4, 5, 7)},
        },
        "flags": {},
        "requests": 3,
        "retries": 0,
        "prompt_tokens": 300,
        "completion_tokens": 30,
        "labels": {"door": 1, "house": 1, "tree": 1, "window": 1},
        "dropped": {"duplicate_of": 2, "low_quality": 1},
        "warnings": ["2.0 masks a description, not 6 to 16 as in MGSCData"],
    }


def test_rules_at_the_first_and_at_the_last_answer(run: Path) -> None:
    items = both_contexts()
    items[0]["exchange"] = exchange(["C2", "C2"], [])  # twice in one answer is one answer
    items[1] |= {"status": "failed", "exchange": exchange(["C2"], ["finish:length"], ["C2", "C5"])}  # type: ignore[typeddict-item]
    write_image(
        run, items=items, exchanges=[exchange(["L1"], ["L4"], []), exchange([]), exchange(["finish:length"], [])]
    )
    rules = collect(run).rules
    assert {code: (rule.asked, rule.first, rule.last) for code, rule in rules.items()} == {
        "L1": (3, 1, 0),
        "L2": (3, 0, 0),
        "L4": (3, 0, 0),  # broken in between only
        "L5": (3, 0, 0),
        "L8": (3, 0, 0),
        "C1": (2, 0, 0),
        "C2": (2, 2, 1),
        "C3": (2, 0, 0),
        "C4": (2, 0, 0),
        "C5": (2, 0, 1),
        "C7": (2, 0, 0),
        "finish:length": (5, 1, 0),  # may happen at either step
    }
    assert list(rules)[0] == "L1" and list(rules)[-1] == "finish:length"
    assert (rules["C2"].passed_first, rules["C2"].passed) == (0.0, 0.5)


def test_failed_descriptions_have_no_share_in_the_means(run: Path) -> None:
    root, house = both_contexts()
    root |= {"status": "failed", "tagged": "", "targets": []}  # type: ignore[typeddict-item]
    write_image(run, items=[root, house])
    write_image(run, "sa_2", items=[context("root", ROOT_TEXT, ["obj_2", "obj_1"], status="template")])
    found = collect(run)
    assert found.items == {"ok": 1, "failed": 1, "template": 1}
    assert (found.described, found.subtrees, found.masks, found.words) == (1, 1, 2, 9)
    assert found.coverage is None
    assert found.warnings == [
        "2.0 masks a description, not 6 to 16 as in MGSCData",
        "0.5 described objects an image, not 1 to 3 as in MGSCData",
    ]


def test_what_a_failed_image_cost_counts(run: Path) -> None:
    write_image(run, reason="the server refuses this picture", exchanges=[exchange(["L1"], ["L1"])])
    write_image(run, "sa_2", tree=house_tree(obj_1=True, obj_2=True))
    found = collect(run)
    assert (found.done, found.failed) == (1, 1)
    assert found.reasons == {"the server refuses this picture": 1}
    assert (found.requests, found.retries, found.prompt_tokens) == (7, 1, 700)
    assert found.objects == {"ok": 3, "weak": 2} and found.flags == {"L6": 2}
    assert found.rules["L1"].asked == 2


def test_overlapping_targets_are_covered_once(run: Path) -> None:
    nodes = [tree_node(1, "wall", (0, 0, 30, 40)), tree_node(2, "poster", (20, 0, 40, 40))]
    items = [context("root", "<obj_1>A wall</obj_1> has <obj_2>a poster</obj_2>.", ["obj_1", "obj_2"])]
    write_image(run, tree={"nodes": nodes}, items=items)
    assert collect(run).coverage == pytest.approx(40 / 60)


def test_a_broken_stage_file_is_a_reason(run: Path) -> None:
    folder = write_image(run)
    (folder.path / "tree.json").write_text('{"schema": 1, "payl')
    found = collect(run)
    assert (found.done, found.reasons) == (0, {"a stage file is missing or broken": 1})


def test_only_the_most_frequent_labels_are_listed(run: Path) -> None:
    nodes = [tree_node(n, f"thing {n:02d}", (n, 0, n + 1, 1)) for n in range(1, 40)]
    write_image(run, tree={"nodes": [*nodes, tree_node(40, "thing 39", (45, 0, 46, 1))]}, items=[])
    labels = collect(run).to_dict()["labels"]
    assert list(labels.items())[:2] == [("thing 39", 2), ("thing 01", 1)] and len(labels) == 30


def test_the_table(run: Path) -> None:
    write_image(run, tree=house_tree(obj_4=True), exchanges=[exchange(["L1"], [])])
    write_image(run, "sa_2", reason="image is missing")
    lines = str(collect(run)).splitlines()
    assert lines[0] == "images            1 done, 1 failed"
    assert "L1 answers about what was asked              2       50.0%      100.0%" in lines
    assert "L6 caption does not name the label           1" in lines
    assert "labels: door 1, house 1, tree 1, window 1" in lines
    assert lines[-2:] == ["failed 1 x image is missing", "warning: 2.0 masks a description, not 6 to 16 as in MGSCData"]


def test_an_empty_run_and_none(run: Path, tmp_path: Path) -> None:
    found = collect(run)
    assert (found.done, found.coverage, found.warnings, found.rules) == (0, None, [], {})
    assert "descriptions      none" in str(found)
    with pytest.raises(ValueError, match="is no folder of `mglmm annotate run`"):
        collect(tmp_path)
