import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.masks import union
from mglmm.datasets_scripts.reasoning import Muse, ReasonSeg, ask_with_reason, name_in, read_shapes
from mglmm.processing.rle import encode_mask
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)
HAT, DOG = (5, 5, 15, 15), (30, 10, 50, 30)


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (60, 40)).save(path)


def shape(label: str, box: tuple[int, int, int, int]) -> dict:
    """A labelme polygon that covers the box: its outline belongs to it."""
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    points = [[left, top], [right + 0.9, top], [right, bottom], [left + 0.5, bottom]]
    return {"label": label, "labels": [label], "shape_type": "polygon", "points": points, "group_id": None, "flags": {}}


def question(*texts: str, sentence: bool = True, shapes: list[dict] | None = None) -> dict:
    return {
        "text": list(texts),
        "is_sentence": sentence,
        "shapes": [shape("target", HAT)] if shapes is None else shapes,
    }


@pytest.fixture
def reasonseg(tmp_path: Path) -> Callable[..., ReasonSeg]:
    """Writes `{split folder}/{name}` -> annotation with images of height 40 and width 60; returns the builder."""

    def build(
        files: dict[str, Any], *, explanations: list | None = None, root: str = "reason_seg/ReasonSeg", **options: Any
    ) -> ReasonSeg:
        folder = tmp_path / "data" / root
        for name, content in files.items():
            photo(folder / f"{name}.jpg")
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            (folder / f"{name}.json").write_bytes(content)
        if explanations is not None:
            (folder / "explanatory").mkdir()
            (folder / "explanatory" / "train.json").write_text(json.dumps(explanations))
        return ReasonSeg(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), **options)

    return build


def test_a_training_image_is_a_row_for_each_way_to_ask(reasonseg: Callable[..., ReasonSeg]) -> None:
    shapes = [shape("target", HAT), shape("ignore", DOG)]
    texts = ("What keeps the sun off?", "Which thing gives shade")
    builder = reasonseg({"train/7_1": question(*texts, shapes=shapes)})
    assert builder.split_items() == {"train": [("train", "7_1")]}
    first, second = builder.usable_rows(("train", "7_1"))
    assert first == {
        "image": str(builder.data_dir / "reason_seg/ReasonSeg/train/7_1.jpg"),
        "image_id": "7_1",
        "source": "reasonseg",
        "task": "reasoning",
        "messages": [
            {"role": "user", "content": "<image>\nWhat keeps the sun off? Return the mask of what you mean."},
            {"role": "assistant", "content": "Certainly, <p> the target </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, HAT)],
        "regions": [],
        "ignore_mask": box_rle(SIZE, DOG),
    }
    assert second["messages"] == [
        {"role": "user", "content": "<image>\nwhich thing gives shade. could you outline what fits?"},
        {"role": "assistant", "content": "Sure, <p> the target </p> [SEG]."},
    ]
    assert builder.skipped == {"split validation without a folder": 1, "split test without a folder": 1}


def test_a_phrase_names_its_target(reasonseg: Callable[..., ReasonSeg]) -> None:
    builder = reasonseg({"val/a": question("The food with most Vitamin C.", sentence=False)})
    builder.split_items()
    (row,) = builder.usable_rows(("validation", "a"))
    assert row["messages"] == [
        {"role": "user", "content": '<image>\nShow me "the food with most vitamin c".'},
        {"role": "assistant", "content": "<p> the food with most vitamin c </p> [SEG]."},
    ]
    assert row["ignore_mask"] is None


def test_a_benchmark_asks_the_first_question_once(reasonseg: Callable[..., ReasonSeg]) -> None:
    explanations = [{"image": "b.jpg", "query": "First?", "outputs": "The hat is big."}]
    builder = reasonseg({"test/b": question("First?", "Second?")}, explanations=explanations, variants=3)
    builder.split_items()
    (row,) = builder.usable_rows(("test", "b"))
    assert row["messages"][0]["content"].startswith("<image>\nFirst?")
    assert "The hat is big" not in row["messages"][1]["content"]


def test_explanations_are_given_with_the_mask_and_instead_of_it(reasonseg: Callable[..., ReasonSeg]) -> None:
    reason = "In the image, the straw hat has a wide brim."
    explanations = [{"image": "c.jpg", "query": "What gives shade?", "outputs": f'"{reason}" '}, {"image": "d.jpg"}]
    builder = reasonseg({"train/c": question("What gives shade?")}, explanations=explanations, variants=60)
    builder.split_items()
    rows = builder.usable_rows(("train", "c"))
    answers = {row["messages"][1]["content"]: row for row in rows}
    plain, explained, words = (
        "Sure, <p> the straw hat </p> [SEG].",
        f"Sure, <p> the straw hat </p> [SEG]. {reason}",
        reason,
    )
    assert [(answers[answer]["task"], answers[answer]["masks"]) for answer in (plain, explained, words)] == [
        ("reasoning", [box_rle(SIZE, HAT)]),
        ("reasoning", [box_rle(SIZE, HAT)]),
        ("conversation", []),
    ]
    assert all(row["messages"][0]["content"].startswith("<image>\n") for row in rows)
    counts = [
        sum(row["task"] == "conversation" for row in rows),
        sum(bool(row["masks"]) and row["messages"][1]["content"].endswith(reason) for row in rows),
    ]
    assert 1 <= counts[0] <= 15 and 15 <= counts[1] <= 45  # about 6 and 27 of 60
    assert builder.skipped["explanation: missing field 'outputs'"] == 1


def test_a_phrase_with_an_explanation_keeps_its_name() -> None:
    turns = [
        ask_with_reason(Random(seed), "red hat", False, box_rle(SIZE, HAT), "The cap is red.") for seed in range(40)
    ]
    assert any(turn.answer == "Sure, <p> red hat </p> [SEG]. The cap is red." for turn in turns)
    assert not any("<p> the cap </p>" in turn.answer for turn in turns)


@pytest.mark.parametrize(
    ("explanation", "name"),
    [
        ("The camera lens is made for close objects.", "the camera lens"),
        ("In the image, the woman in red has a bag.", "the woman"),
        ("In this picture there is a dog, which barks.", "a dog"),
        ("The most suitable object for sitting is the chair.", "the chair"),
        ("The front of the car is bent.", "the front of the car"),
        ("The woman wears a hat.", "the woman"),
        ("The picture shows it.", "the target"),  # nothing but the picture
        ("", "the target"),
    ],
)
def test_name_of_the_target_in_an_explanation(explanation: str, name: str) -> None:
    assert name_in(explanation) == name


@pytest.mark.parametrize(
    ("shapes", "target", "ignored"),
    [
        ([shape("target", HAT)], [HAT], []),
        ([shape("Target", HAT), shape("target_2", DOG)], [HAT, DOG], []),  # several are one target
        ([shape("target", HAT), shape("flag", DOG)], [HAT], []),  # a label without meaning
        ([shape("target", HAT), shape("ignore", DOG)], [HAT], [DOG]),
        ([shape("ignore", (10, 5, 15, 15)), shape("target", HAT)], [(5, 5, 10, 15)], [(10, 5, 15, 15)]),  # small on top
        ([shape("target", (10, 5, 15, 15)), shape("ignore", HAT)], [(10, 5, 15, 15)], [(5, 5, 10, 15)]),
        ([shape("target", (50, 30, 90, 90))], [(50, 30, 60, 40)], []),  # leaves the image
    ],
)
def test_shapes(shapes: list[dict], target: list, ignored: list) -> None:
    found, left_out, unused = read_shapes(shapes, SIZE)
    assert found == union(box_rle(SIZE, box) for box in target)
    assert left_out == (union(box_rle(SIZE, box) for box in ignored) if ignored else None)
    assert not unused


def test_an_outline_belongs_to_its_polygon() -> None:
    """As the original draws it: a triangle with its edges."""
    triangle = {"label": "target", "points": [[0, 0], [4.9, 0], [0, 4]], "shape_type": "polygon"}
    found, _, _ = read_shapes([triangle], (6, 6))
    rows, columns = np.indices((6, 6))
    assert found == encode_mask(rows + columns <= 4)


def test_text_that_is_not_utf_8(reasonseg: Callable[..., ReasonSeg]) -> None:
    """MGLMM's reader stops at these files."""
    content = json.dumps(question("Where is the café’s door?"), ensure_ascii=False).encode("cp1252")
    builder = reasonseg({"val/a": content})
    builder.split_items()
    (row,) = builder.usable_rows(("validation", "a"))
    assert "the café’s door" in row["messages"][0]["content"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (question(), "image without a question"),
        (question(" "), "image without a question"),
        (question("What?", shapes=[shape("ignore", HAT)]), "image without a target"),
        # a smaller ignored shape covers the whole target
        (question("What?", shapes=[shape("target", HAT), shape("ignore", HAT)]), "image without a target"),
        (question("What?", shapes=[{"label": "target"}]), "missing field 'points'"),
        ({"text": ["What?"], "is_sentence": True}, "missing field 'shapes'"),
    ],
)
def test_a_broken_image_is_counted(reasonseg: Callable[..., ReasonSeg], content: dict, reason: str) -> None:
    builder = reasonseg({"train/a": content}, root="")
    builder.split_items()
    builder.skipped.clear()
    assert builder.usable_rows(("train", "a")) == []
    assert builder.skipped == {reason: 1}


def test_an_unusable_shape_is_counted(reasonseg: Callable[..., ReasonSeg]) -> None:
    line = {"label": "target", "points": [[0, 0], [5, 5]], "shape_type": "line"}
    builder = reasonseg({"train/a": question("What?", shapes=[shape("target", HAT), line, shape("other", DOG)])})
    builder.split_items()
    builder.skipped.clear()
    (row,) = builder.usable_rows(("train", "a"))
    assert row["masks"] == [box_rle(SIZE, HAT)]
    assert builder.skipped == {"shape of fewer than three points": 1, "shape of an unknown label": 1}


def test_an_annotation_without_image_is_counted(reasonseg: Callable[..., ReasonSeg]) -> None:
    builder = reasonseg({"val/a": question("What?")})
    (builder.data_dir / "reason_seg/ReasonSeg/val/a.jpg").unlink()
    builder.split_items()
    assert builder.usable_rows(("validation", "a")) == []
    assert builder.skipped["image file is missing"] == 1


def test_a_missing_data_set_is_named(tmp_path: Path) -> None:
    for kind, name in ((ReasonSeg, "reason_seg/ReasonSeg/"), (Muse, "reason_seg/MUSE/MUSE_")):
        with pytest.raises(FileNotFoundError, match=name):
            kind(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path)).split_items()
