import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.grand import GrandReferring, describe, without_role
from mglmm.datasets_scripts.masks import union
from mglmm.processing.uscdf import count_seg
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)
HAT, DOG = (5, 5, 15, 15), (30, 10, 50, 30)
REAL = Path(__file__).resolve().parents[3] / "shared/data/formats/grand/GranD/level_3_dense_caption/in_context_examples"


def expression(text: Any, box: tuple[int, int, int, int] | None, number: int = 0, size: tuple = SIZE) -> dict:
    segmentation = box_rle(size, box) if box else None
    return {"attribute": text, "id": number, "bbox": [1.5, 2.5, 3.5, 4.5], "segmentation": segmentation}


def raw_object(labels: list[str], attributes: Any, box: tuple[int, int, int, int] | None) -> dict:
    found = {"segmentation": box_rle(SIZE, box), "segmentation_source": "SAM"} if box else {}
    return {"bbox": [1.5, 2.5, 3.5, 4.5], "labels": labels, "score": 0.9, "attributes": attributes, "id": 0, **found}


def raw(*objects: dict, floating: tuple[dict, ...] = ()) -> dict:
    return {
        "objects": list(objects),
        "floating_objects": list(floating),
        "floating_attributes": [],
        "landmark": {"category": "Outdoor scene"},
        "relationships": {"object_ids": [], "grounding": []},
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., GrandReferring]:
    """Writes images sa_1 and sa_2, height 40 and width 60, and annotation files by name; returns the builder."""

    def build(
        files: dict[str, Any],
        *,
        annotations: str = "GranD/referring_expression",
        images: str = "SegmentAnything/imgs",
        listed: str | None = None,
        **options: Any,
    ) -> GrandReferring:
        folder = tmp_path / "data"
        (folder / images).mkdir(parents=True)
        (folder / annotations).mkdir(parents=True)
        for name in ("sa_1.jpg", "sa_2.jpg"):
            PIL.Image.new("RGB", (60, 40)).save(folder / images / name)
        for name, content in files.items():
            (folder / annotations / name).write_text(content if isinstance(content, str) else json.dumps(content))
        if listed is not None:
            (folder / annotations).with_name("anno_files.txt").write_text(listed)
        return GrandReferring(cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **options)

    return build


def phrases(rows: list[dict]) -> dict[str, dict]:
    """Phrase -> mask, over the rows."""
    answers = [message["content"] for row in rows for message in row["messages"] if message["role"] == "assistant"]
    names = [part.split(" </p>")[0] for answer in answers for part in answer.split("<p> ")[1:]]
    return dict(zip(names, (mask for row in rows for mask in row["masks"]), strict=True))


def test_an_image_is_a_conversation_about_its_expressions(write: Callable[..., GrandReferring]) -> None:
    entries = [expression("Assistant: The man's hat.", HAT), expression("a dog", DOG, 1)]
    builder = write({"sa_1.json": {"sa_1.jpg": entries}})
    assert builder.split_items() == {"train": ["sa_1.json"]}
    (row,) = builder.usable_rows("sa_1.json")
    assert row == {
        "image": str(builder.data_dir / "SegmentAnything/imgs/sa_1.jpg"),
        "image_id": "sa_1",
        "source": "grand_referring",
        "task": "referring",
        "messages": [
            {"role": "user", "content": '<image>\nSeparate "a dog" from the rest of the picture.'},
            {"role": "assistant", "content": "I found <p> a dog </p> [SEG]."},
            {"role": "user", "content": 'highlight "the man\'s hat".'},
            {"role": "assistant", "content": "Sure, <p> the man's hat </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, DOG), box_rle(SIZE, HAT)],
        "regions": [],
        "ignore_mask": None,
    }
    assert builder.skipped == {}


@pytest.mark.parametrize(
    ("annotations", "images", "listed", "items"),
    [
        ("GranD/referring_expression", "SegmentAnything/imgs", "sa_2\nsa_1.json\n\n", ["sa_2", "sa_1.json"]),  # MGLMM
        ("GranD_Data/referring_expression", "GranD_Data/images", None, ["sa_1.json", "sa_2.json"]),  # GLaMM's folders
        ("annotations", "images", None, ["sa_1.json", "sa_2.json"]),  # the folder itself
    ],
)
def test_published_layouts(
    write: Callable[..., GrandReferring], annotations: str, images: str, listed: str | None, items: list[str]
) -> None:
    files = {f"sa_{n}.json": {f"sa_{n}.jpg": [expression("hat", HAT)]} for n in (1, 2)}
    builder = write(files, annotations=annotations, images=images, listed=listed)
    assert builder.split_items() == {"train": items}
    assert [phrases(builder.usable_rows(item)) for item in items] == [{"hat": box_rle(SIZE, HAT)}] * 2


def test_objects_of_the_same_expression_share_one_mask(write: Callable[..., GrandReferring]) -> None:
    """The original asks for each of them by the same words, with another answer every time."""
    builder = write({"sa_1.json": {"sa_1.jpg": [expression("A chair.", HAT), expression("istant: a chair", DOG, 1)]}})
    builder.split_items()
    (row,) = builder.usable_rows("sa_1.json")
    assert phrases([row]) == {"a chair": union([box_rle(SIZE, HAT), box_rle(SIZE, DOG)])}


def test_at_most_ten_of_many_in_a_row_and_others_in_another_variant(write: Callable[..., GrandReferring]) -> None:
    entries = [expression(f"thing {number}", (number, 0, number + 1, 9), number) for number in range(30)]
    builder = write({"sa_1.json": {"sa_1.jpg": entries}}, variants=2)
    builder.split_items()
    first, second = builder.usable_rows("sa_1.json")
    assert [count_seg(row["messages"]) for row in (first, second)] == [10, 10]
    assert set(phrases([first])) != set(phrases([second]))
    assert all(
        mask == box_rle(SIZE, (int(name[6:]), 0, int(name[6:]) + 1, 9)) for name, mask in phrases([first]).items()
    )


def test_raw_annotations(write: Callable[..., GrandReferring]) -> None:
    floating = raw_object(["atmosphere"], "the vibrant atmosphere", DOG)
    content = raw(
        raw_object(["dining_table"], ["the cup", "istant: a Dining table"], HAT),
        raw_object(["dog"], "a brown dog", DOG),
        raw_object(["cat"], None, DOG),
        raw_object(["tree"], ["a tall tree"], None),
        floating=(floating,),
    )
    builder = write({"sa_1.json": {"sa_1.jpg": content}}, annotations="GranD/annotations")
    builder.split_items()
    rows = builder.usable_rows("sa_1.json")
    assert phrases(rows) == {"a dining table": box_rle(SIZE, HAT), "a brown dog": box_rle(SIZE, DOG)}
    assert builder.skipped == {"object without a mask": 1}


@pytest.mark.parametrize(
    ("attributes", "labels", "texts"),
    [
        (None, ["cup"], []),
        ("a cup", ["cup"], ["a cup"]),
        (["red"], ["cup"], ["red"]),  # one alone stays, whatever it names
        (["a mug", "a red cup", "the cup"], ["cup"], ["a red cup", "the cup"]),
        (["a mug", "a glass"], ["cup"], ["a mug"]),  # none names it
        (["a bowl", "the Wine glass"], ["wine_glass"], ["the Wine glass"]),
        (["istant:", "a cup"], ["cup"], ["a cup"]),
    ],
)
def test_choice_of_attributes(attributes: Any, labels: list[str], texts: list[str]) -> None:
    assert describe(attributes, labels) == texts


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("Assistant: a hat", "a hat"),
        ("istant: a hat", "a hat"),
        ("### assistant: a hat", "a hat"),
        ("sign: no entry", "sign: no entry"),  # a colon of the expression itself
        ("the assistant of the cook", "the assistant of the cook"),
    ],
)
def test_the_role_is_taken_off(text: str, rest: str) -> None:
    assert without_role(text) == rest


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        # the good object of the image stays
        (expression("cup", None), "object without a mask"),
        (expression(" . ", DOG), "empty phrase"),
        (
            expression(None, DOG),
            "malformed annotation (AttributeError: 'NoneType' object has no attribute 'partition')",
        ),
        ({"segmentation": box_rle(SIZE, DOG)}, "missing field 'attribute'"),
        (expression("cup", DOG, size=(60, 40)), "mask size differs from the image size"),
        (expression("cup", (0, 0, 0, 0)), "empty mask"),
    ],
)
def test_a_broken_object_is_counted(write: Callable[..., GrandReferring], entry: dict, reason: str) -> None:
    builder = write({"sa_1.json": {"sa_1.jpg": [expression("hat", HAT), entry]}})
    builder.split_items()
    assert phrases(builder.usable_rows("sa_1.json")) == {"hat": box_rle(SIZE, HAT)}
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"sa_1.jpg": []}, "image without a usable expression"),  # the original stops with an error
        ({"sa_1.jpg": [], "sa_2.jpg": []}, "annotation file is not about one image"),
        ([], "annotation file is not about one image"),
        ({"sa_9.jpg": [expression("hat", HAT)]}, "image file is missing"),
        ({"../../../x.jpg": [expression("hat", HAT)]}, "image file name leads out of the data folder"),
        ({"sa_1.jpg": {}}, "missing field 'objects'"),
        (
            "{",
            "sa_1.json is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        ),
    ],
)
def test_a_broken_file_is_counted(write: Callable[..., GrandReferring], content: Any, reason: str) -> None:
    builder = write({"sa_1.json": content})
    builder.split_items()
    assert builder.usable_rows("sa_1.json") == []
    assert builder.skipped == {reason: 1}


def test_names_of_the_list_stay_inside(write: Callable[..., GrandReferring]) -> None:
    builder = write({}, listed="../../secret\nsa_7\n")
    for item in builder.split_items()["train"]:
        assert builder.usable_rows(item) == []
    assert builder.skipped == {"annotation file name leads out of the data folder": 1, "annotation file is missing": 1}


def test_real_annotations(write: Callable[..., GrandReferring]) -> None:
    """A published file of before the step that adds masks; here they are the boxes."""
    if not REAL.is_dir():
        pytest.skip(f"the real GranD files are not at {REAL}")
    content = json.loads((REAL / "sa_310343.json").read_text())
    builder = write({"before.json": content, "after.json": {}}, annotations="GranD/annotations")
    size = (1500, 2251)
    PIL.Image.new("RGB", size[::-1]).save(builder.data_dir / "SegmentAnything/imgs/sa_310343.jpg")
    for kind in ("objects", "floating_objects"):
        for entry in content["sa_310343.jpg"][kind]:
            entry["segmentation"] = box_rle(size, tuple(map(int, entry["bbox"])))
    (builder.data_dir / "GranD/annotations/after.json").write_text(json.dumps(content))
    builder.split_items()
    assert builder.usable_rows("before.json") == []
    assert builder.skipped == {"object without a mask": 4, "image without a usable expression": 1}
    assert phrases(builder.usable_rows("after.json")) == {
        "a yellow, red and blue hot air balloon": box_rle(size, (532, 76, 1485, 1299)),
        "a blue and white sky": box_rle(size, (6, 3, 2250, 964)),
        "a clear blue sky": box_rle(size, (6, 3, 2250, 964)),
        "a beautiful view of the cityscape and a river below": box_rle(size, (1, 936, 2246, 1486)),
        "white and red logo on the kite": box_rle(size, (1325, 474, 1420, 599)),
    }
