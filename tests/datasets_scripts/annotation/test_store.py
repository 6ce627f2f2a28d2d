import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.config import AnnotationConfig, digest_of
from mglmm.datasets_scripts.annotation.facts import ObjectFacts, TargetFacts, read_objects, read_targets
from mglmm.datasets_scripts.annotation.store import ImageFolder, finished_images, shard_of

PAYLOAD = {"nodes": [], "größe": 1.5}
BROKEN = [
    "",  # truncated to nothing
    '{"schema": 1, "payload"',  # cut in the middle
    '{"schema": 2, "inputs": "a", "config": "b", "payload": {}}',  # of another version of this package
    "[1]",  # something else
    '{"schema": 1, "inputs": "a", "config": "b"}',  # without its payload
]


def test_a_stage_is_read_back_if_it_was_made_from_the_same(tmp_path: Path) -> None:
    folder = ImageFolder(tmp_path, "sa_1")
    assert folder.read("geometry") is None
    folder.write("geometry", PAYLOAD, inputs="a", config="b")
    assert folder.read("geometry") == folder.read("geometry", "a", "b") == PAYLOAD
    assert folder.read("geometry", "other", "b") is None and folder.read("geometry", "a", "other") is None
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("content", BROKEN)
def test_a_broken_stage_is_none(tmp_path: Path, content: str) -> None:
    folder = ImageFolder(tmp_path, "sa_1")
    folder.write("labels", PAYLOAD, inputs="a", config="b")
    (folder.path / "labels.json").write_text(content)
    assert folder.read("labels") is None


@given(st.lists(st.text(min_size=1), min_size=2, max_size=6, unique=True))
def test_no_two_images_share_a_folder_and_none_leaves_the_run(names: list[str]) -> None:
    run = Path("/run")
    folders = [ImageFolder(run, name).path for name in [*names, "../../etc/passwd", "..", "a/b", "a_b"]]
    assert len({str(folder).lower() for folder in folders}) >= len({name.lower() for name in names})
    assert len(set(folders)) == len(names) + 4
    for folder in folders:
        assert folder.parent.parent == run / "images" and folder.name not in ("", ".", "..")


def test_finished_images_come_in_the_order_of_their_ids(tmp_path: Path) -> None:
    for name in ("b", "a/c", "a"):
        status = {"image_id": name, "state": "done", "round": 0, "seeds": {}, "made_from": "x"}
        ImageFolder(tmp_path, name).write_status(status)  # type: ignore[arg-type]
    (ImageFolder(tmp_path, "b").path / "status.json").write_text("{")  # cut by hand
    assert [status["image_id"] for _, status in finished_images(tmp_path)] == ["a", "a/c"]


def test_shards_part_the_images() -> None:
    names = [f"sa_{number}" for number in range(200)]
    shards = [{name for name in names if shard_of(name, 4) == number} for number in range(4)]
    assert set().union(*shards) == set(names) and sum(map(len, shards)) == 200 and min(map(len, shards)) > 20


def test_settings_from_sections() -> None:
    config = AnnotationConfig.from_dict({"geometry": {"max_nodes": 3}, "merging": {"no_merge_labels": ["person"]}})
    assert (config.geometry.max_nodes, config.geometry.max_level1) == (3, 24)
    assert config.merging.no_merge_labels == ("person",)
    assert AnnotationConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"geometri": {}}, "unknown section geometri; known: geometry, labeling, merging, context"),
        ([1], "settings are sections such as geometry, not a list"),
        ({"geometry": 5}, "geometry is no section of settings: 5"),
        ({"geometry": {"max_nodes": "ten"}}, "geometry.max_nodes is 'ten', which is no int"),
        ({"geometry": {"containment": 1.5}}, "geometry.containment is 1.5, but must be from 0 to 1"),
        ({"labeling": {"attempts": 0}}, "labeling.attempts is 0, which is too small"),
        ({"merging": {"no_merge_labels": "person"}}, "no_merge_labels is 'person', which is no list of names"),
        ({"context": {"max_subtree": 1}}, "context: unknown max_subtree; known: max_root_targets, "),
    ],
)
def test_wrong_settings_are_named(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnnotationConfig.from_dict(values)


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": 2})


OBJECT = ObjectFacts("m0012", "lime green", (0.1, 0.2, 0.3, 0.44), 3.2, "small house")
TARGET = TargetFacts("obj_3", "dog collar", 2, (0, 0.05, 1, 0.5), "A red collar, worn.", 2)


def test_lines_of_prompts_and_back() -> None:
    assert str(OBJECT) == "m0012 | outline: lime green | box: (0.10, 0.20, 0.30, 0.44) | area: 3.2 % | in: small house"
    known = ObjectFacts(**{**vars(OBJECT), "known": "left window"})
    assert str(known) == f"{OBJECT} | said to be: left window"
    assert read_objects(f"Objects:\n{OBJECT}\n{known}\nAnswer.") == [OBJECT, known]
    assert str(TARGET) == "  obj_3 | dog collar | count: 2 | box: (0.00, 0.05, 1.00, 0.50) | A red collar, worn."
    first = TargetFacts(**{**vars(TARGET), "depth": 1})
    assert read_targets(f"Targets:\n{first}\n{TARGET}") == [first, TARGET]
