import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.masks import union
from mglmm.datasets_scripts.reasoning import Muse, MuseTarget, numbered, read_text_answer
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)
HAT, DOG, BALL = (5, 5, 15, 15), (30, 10, 50, 30), (2, 30, 8, 36)
URL = "http://images.cocodataset.org"


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (60, 40)).save(path)


def target(category: str, box: tuple[int, int, int, int], name: str | None = None, **change: Any) -> dict:
    left, top, right, bottom = box
    rephrased = {} if name is None else {"rephrased_name": name}
    polygon = [left, top, right, top, right, bottom, left, bottom]
    return {"category_name": category, "segmentation": [polygon], "bbox": [0, 0, 1, 1], "id": 1, **rephrased, **change}


def entry(asked: list[str], targets: list[list[dict]], **fields: Any) -> dict:
    image = {"coco_url": f"{URL}/train2017/000000000009.jpg", "height": 40, "width": 60, "ann_list": []}
    return {**image, "questions": asked, "answers": targets, **fields}


@pytest.fixture
def muse(tmp_path: Path) -> Callable[..., Muse]:
    """Writes MUSE files by split name with one image in train2014, train2017 and val2017 each; returns the builder."""

    def build(splits: dict[str, list], *, file: str = "reason_seg/MUSE/MUSE_{}.json", **options: Any) -> Muse:
        folder = tmp_path / "data"
        photo(folder / "coco/train2014/COCO_train2014_000000000009.jpg")
        photo(folder / "coco/train2017/000000000009.jpg")
        photo(folder / "coco/val2017/000000000139.jpg")
        for split, entries in splits.items():
            path = folder / file.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(entries))
        return Muse(cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **options)

    return build


def test_a_training_image_is_a_conversation(muse: Callable[..., Muse]) -> None:
    questions = ["What can I wear?", "What plays with what?"]
    answers = [[target("straw_hat", HAT)], [target("dog", DOG, "the brown Dog."), target("ball_(toy)", BALL)]]
    texts = [None, "A dog {seg} plays with the {{red}} balls ({seg}).</s>"]
    builder = muse({"train": [entry(questions, answers, text_answers=texts)]})
    assert builder.split_items() == {"train": [("train", 0)]}
    (row,) = builder.usable_rows(("train", 0))
    assert row == {
        "image": str(builder.data_dir / "coco/train2017/000000000009.jpg"),
        "image_id": "000000000009",
        "source": "muse",
        "task": "reasoning",
        "messages": [
            {"role": "user", "content": "<image>\nWhat can I wear? Name them, and give their masks."},
            {"role": "assistant", "content": "Sure, <p> straw hat </p> [SEG]."},
            {"role": "user", "content": "What plays with what?"},
            {"role": "assistant", "content": "A <p> dog </p> [SEG] plays with the {red} <p> balls </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, box) for box in (HAT, DOG, BALL)],
        "regions": [],
        "ignore_mask": None,
    }


def test_three_questions_a_row_in_training_and_one_elsewhere(muse: Callable[..., Muse]) -> None:
    many = [entry([f"Question {n}?" for n in range(4)], [[target("hat", HAT)]] * 4)]
    builder = muse({"train": many, "test_many": many}, variants=2)
    assert builder.split_items() == {"train": [("train", 0)], "test_many": [("test_many", 0)]}
    assert [len(row["masks"]) for row in builder.usable_rows(("train", 0))] == [3, 1, 3, 1]
    rows = builder.usable_rows(("test_many", 0))
    assert [row["messages"][0]["content"][8:19].lower() for row in rows] == [f"question {n}?" for n in range(4)]


@pytest.mark.parametrize(
    ("fields", "image"),
    [
        ({"file_name": "COCO_train2014_000000000009.jpg"}, "train2014/COCO_train2014_000000000009.jpg"),
        ({"coco_url": f"{URL}/train2017/000000000009.jpg"}, "train2017/000000000009.jpg"),
        ({"coco_url": f"{URL}/val2017/000000000139.jpg"}, "val2017/000000000139.jpg"),
    ],
)
def test_places_of_images(muse: Callable[..., Muse], fields: dict, image: str) -> None:
    builder = muse({"val": [entry(["What?"], [[target("hat", HAT)]], **fields)]}, file="muse_{}.json")
    builder.split_items()
    (row,) = builder.usable_rows(("validation", 0))
    assert row["image"] == str(builder.data_dir / "coco" / image)


def test_parts_of_a_target_are_one_mask_of_zeros_and_ones(muse: Callable[..., Muse]) -> None:
    """The original adds the polygons up, to values above 1 where they overlap."""
    twice = target("hat", HAT)["segmentation"] * 2 + target("hat", DOG)["segmentation"]
    builder = muse({"val": [entry(["What?"], [[target("hat", HAT, segmentation=twice)]])]})
    builder.split_items()
    (row,) = builder.usable_rows(("validation", 0))
    assert row["masks"] == [union([box_rle(SIZE, HAT), box_rle(SIZE, DOG)])]


def targets(*names: str) -> list[MuseTarget]:
    """Targets of "category" or "category: name", with boxes of growing width."""
    pairs = [(name.partition(": ")[0], name.partition(": ")[2]) for name in names]
    return [
        MuseTarget(category, name or category, box_rle(SIZE, (0, 0, number, 9)))
        for number, (category, name) in enumerate(pairs, 1)
    ]


@pytest.mark.parametrize(
    ("text", "names", "answer"),
    [
        ("Use the knife {seg}.", ["knife"], "Use the <p> knife </p> [SEG]."),
        # case is kept, also at the start, where the original lower-cases all
        ("Cup {seg} or Mug {seg}?", ["cup", "mug"], "<p> Cup </p> [SEG] or <p> Mug </p> [SEG]?"),
        ("The dogs {seg} run.</s>", ["dog"], "The <p> dogs </p> [SEG] run."),
        ("A wine_glass {seg}.", ["wine glass"], "A <p> wine_glass </p> [SEG]."),
        ("A cup and a cup ({seg}), yes.", ["cup"], "A cup and a <p> cup </p> [SEG], yes."),  # the last mention
        ("A cup, eh, {seg}.", ["cup"], "A <p> cup </p> [SEG], eh,."),  # five characters between
        ("{{A}} cup {seg}", ["cup"], "{A} <p> cup </p> [SEG]"),
        ("A [SEG] cup {seg}", ["cup"], "A [ SEG] <p> cup </p> [SEG]"),
        # not the words of the targets: the answer lists them instead
        ("The two cups {seg} {seg}.", ["cup", "cup"], None),  # one after the other
        ("The cup {seg} and plate.", ["cup", "plate"], None),  # fewer than the targets
        ("The mug {seg}.", ["cup"], None),
        ("The cupboard {seg}.", ["cup"], None),
        ("The cup of white tea {seg}.", ["cup"], None),  # too far away
    ],
)
def test_text_answers(text: str, names: list[str], answer: str | None) -> None:
    wanted = targets(*names)
    expected = None if answer is None else (answer, tuple(target.mask for target in wanted))
    assert read_text_answer(text, wanted) == expected


@pytest.mark.parametrize(
    ("names", "tagged"),
    [
        (["cup"], ["<p> cup </p> [SEG]"]),
        (["cup: the red cup on a tray"], ["the red <p> cup </p> [SEG] on a tray"]),
        (["cup", "dog", "cup"], ["<p> cup-1 </p> [SEG]", "<p> dog </p> [SEG]", "<p> cup-2 </p> [SEG]"]),
        (["cup: red cup", "cup: blue cup"], ["red <p> cup </p> [SEG]", "blue <p> cup </p> [SEG]"]),
    ],
)
def test_lists_of_targets(names: list[str], tagged: list[str]) -> None:
    assert numbered(targets(*names)) == tagged


def test_a_text_that_does_not_fit_becomes_a_list(muse: Callable[..., Muse]) -> None:
    """The original draws another image instead, even for validation."""
    answers = [[target("dog", HAT, "left dog"), target("dog", DOG, "the animal"), target("ball", BALL, None)]]
    builder = muse({"val": [entry(["Who?"], answers, text_answers=["The two {seg} {seg} and it {seg}."])]})
    builder.split_items()
    (row,) = builder.usable_rows(("validation", 0))
    assert row["messages"][1]["content"] == "Sure, left <p> dog </p> [SEG], <p> dog </p> [SEG] and <p> ball </p> [SEG]."
    assert row["masks"] == [box_rle(SIZE, box) for box in (HAT, DOG, BALL)]


@pytest.mark.parametrize(
    ("asked", "answer", "reason"),
    [
        # the good question of the image stays
        ("What is in [1, 2, 3, 4]?", [target("dog", DOG)], "question about a box"),
        (" ", [target("dog", DOG)], "empty question"),
        ("What?", [], "question without a target"),
        ("What?", [target("dog", DOG), target("dog", DOG, segmentation=[])], "empty segmentation"),
        ("What?", [target("dog", (1, 1, 1, 1))], "empty mask"),
        ("What?", [target("_(x)", DOG)], "empty phrase"),
        ("What?", [{"category_name": "dog"}], "missing field 'segmentation'"),
    ],
)
def test_a_broken_question_is_counted(muse: Callable[..., Muse], asked: str, answer: list, reason: str) -> None:
    builder = muse({"val": [entry(["Good?", asked], [[target("hat", HAT)], answer])]})
    builder.split_items()
    builder.skipped.clear()
    (row,) = builder.usable_rows(("validation", 0))
    assert row["masks"] == [box_rle(SIZE, HAT)]
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"questions": []}, "numbers of questions and answers differ"),
        ({"text_answers": ["a", "b"]}, "numbers of questions and answers differ"),
        ({"questions": [], "answers": []}, "image without a usable question"),
        ({"height": 41}, "image size differs from its annotation"),
        ({"file_name": "gone.jpg"}, "image file is missing"),
        ({"file_name": "../../../../x.jpg"}, "image file name leads out of the data folder"),
        ({"coco_url": None}, "malformed annotation (TypeError: argument of type 'NoneType' is not iterable)"),
    ],
)
def test_a_broken_muse_image_is_counted(muse: Callable[..., Muse], fields: dict, reason: str) -> None:
    builder = muse({"val": [entry(["What?"], [[target("hat", HAT)]], **fields)]})
    builder.split_items()
    builder.skipped.clear()
    assert builder.usable_rows(("validation", 0)) == []
    assert builder.skipped == {reason: 1}


def test_a_missing_image_folder_is_counted(muse: Callable[..., Muse]) -> None:
    builder = muse({"val": [entry(["What?"], [[target("hat", HAT)]])]})
    (builder.data_dir / "coco/train2017").rename(builder.data_dir / "elsewhere")
    builder.split_items()
    assert builder.usable_rows(("validation", 0)) == []
    assert builder.skipped["there is no folder of COCO train2017"] == 1
