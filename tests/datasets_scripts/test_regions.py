import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.regions import (
    Flickr30kEntities,
    RefcocogRegions,
    RefcocoPlusRegions,
    RefcocoRegions,
    VisualGenomeRegions,
    clip_box,
)

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
SIZE = (40, 60)
COCO_NAME = "COCO_train2014_000000000009.jpg"


def image(number: int, name: str = "9.jpg", **change: Any) -> dict:
    return {"id": number, "file_name": name, "height": 40, "width": 60, **change}


def region(number: int, of_image: int, bbox: Any, **change: Any) -> dict:
    return {"id": number, "image_id": of_image, "bbox": bbox, "area": 1, "iscrowd": 0, "category_id": 1, **change}


def genome(*regions: tuple[Any, Any]) -> dict:
    """Visual Genome: boxes (xywh) of one image and their captions."""
    return {
        "images": [image(9)],
        "annotations": [region(number, 9, box, caption=caption) for number, (box, caption) in enumerate(regions)],
        "categories": [{"id": 1, "name": "object"}],
    }


def expressions(*pairs: tuple[str, Any]) -> dict:
    """The RefCOCO family of MDETR: one entry in `images` for each expression, with one annotation."""
    return {
        "images": [
            image(number, COCO_NAME, caption=caption, original_id=9, dataset_name="refcoco")
            for number, (caption, _) in enumerate(pairs)
        ],
        "annotations": [
            region(number, number, box, tokens_positive=[[0, len(caption)]], original_id=5)
            for number, (caption, box) in enumerate(pairs)
        ],
        "categories": [{"id": 1, "name": "object"}],
    }


def sentence(caption: str, *spans: tuple[int, int, Any], **change: Any) -> dict:
    """Merged Flickr30k: a sentence and its boxes."""
    return {
        "images": [image(3, "36979.jpg", caption=caption, **change)],
        "annotations": [
            region(number, 3, box, tokens_positive=[[start, end], [0, 1]])
            for number, (start, end, box) in enumerate(spans)
        ],
    }


def only(builder: UscdfBuilder) -> list[dict]:
    """Every row."""
    items = [item for of_split in builder.split_items().values() for item in of_split]
    builder.skipped.clear()  # of missing splits
    return [row for item in items for row in builder.usable_rows(item)]


def described(rows: list[dict]) -> list[tuple[tuple[float, ...], str]]:
    """(box, text), over turns with one box each."""
    pairs = []
    for row in rows:
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        pairs += list(zip(map(tuple, row["regions"]), answers, strict=True))
    return sorted(pairs)


VG, VG_IMAGE = "visual_genome/train.json", "visual_genome/images/9.jpg"
VG_TEST = "visual_genome/test_caption.json"
ENTITIES = "flickr_30k/mdetr_annotations/final_flickr_mergedGT_train.json"
ENTITIES_VAL = "flickr_30k/mdetr_annotations/final_flickr_mergedGT_val.json"
FLICKR_IMAGE = "flickr_30k/images/36979.jpg"


def test_the_boxes_of_an_image_are_a_conversation(write_family: Callable[..., UscdfBuilder]) -> None:
    content = genome(([5, 5, 10, 20], "a man "), ([30, 10, 40, 20], "The Dog"))
    builder = write_family(VisualGenomeRegions, {VG: content}, VG_IMAGE)
    assert builder.split_items() == {"train": [("train", "9.jpg")]}
    (row,) = builder.usable_rows(("train", "9.jpg"))
    assert row == {
        "image": str(builder.data_dir / VG_IMAGE),
        "image_id": "9",
        "source": "visual_genome_regions",
        "task": "region",
        "messages": [
            {"role": "user", "content": "<image>\nTell me what <region> shows."},
            {"role": "assistant", "content": "The Dog"},
            {"role": "user", "content": "Tell me what <region> shows."},
            {"role": "assistant", "content": "a man"},
        ],
        "masks": [],
        "regions": [[30.0, 10.0, 60.0, 30.0], [5.0, 5.0, 15.0, 25.0]],  # xyxy, within the image
        "ignore_mask": None,
    }
    assert builder.skipped == {"split test without annotations or images": 1}


def test_all_boxes_are_used_ten_to_a_row(write_family: Callable[..., UscdfBuilder]) -> None:
    regions = [([number, 0, 10, 10], f"thing {number}") for number in range(23)]
    rows = only(write_family(VisualGenomeRegions, {VG: genome(*regions)}, VG_IMAGE, variants=2))
    assert [len(row["regions"]) for row in rows] == [10, 10, 3, 10, 10, 3]
    every = [((float(number), 0.0, number + 10.0, 10.0), f"thing {number}") for number in range(23)]
    assert described(rows[:3]) == described(rows[3:]) == every
    assert rows[0]["regions"] != rows[3]["regions"]


def test_a_box_with_several_texts_comes_back_in_another_row(write_family: Callable[..., UscdfBuilder]) -> None:
    box = [5, 5, 10, 20]
    regions = [(box, "a man"), (box, "a tall man"), (box, "a man"), ([30, 10, 20, 20], "a dog")]
    rows = only(write_family(VisualGenomeRegions, {VG: genome(*regions)}, VG_IMAGE))
    assert [len(row["regions"]) for row in rows] == [2, 1]
    assert described(rows) == [
        ((5.0, 5.0, 15.0, 25.0), "a man"),
        ((5.0, 5.0, 15.0, 25.0), "a tall man"),
        ((30.0, 10.0, 50.0, 30.0), "a dog"),
    ]


def test_a_benchmark_asks_for_one_box_a_row(write_family: Callable[..., UscdfBuilder]) -> None:
    content = {  # one entry for each annotation, with the same number
        "images": [image(71), image(72)],
        "annotations": [
            region(71, 71, [5, 5, 10, 20], caption="a man"),
            region(72, 72, [30, 10, 20, 20], caption="a dog"),
        ],
    }
    builder = write_family(VisualGenomeRegions, {VG_TEST: content}, VG_IMAGE, variants=3)
    assert builder.split_items() == {"test": [("test", "9.jpg")]}
    rows = only(builder)
    assert [(row["image_id"], len(row["messages"])) for row in rows] == [("9", 2), ("9", 2)]
    assert described(rows) == [((5.0, 5.0, 15.0, 25.0), "a man"), ((30.0, 10.0, 50.0, 30.0), "a dog")]


@pytest.mark.parametrize(
    ("bbox", "box"),
    [
        ([5, 5, 10, 20], (5.0, 5.0, 15.0, 25.0)),
        ([-5, -5, 10, 10.5], (0.0, 0.0, 5.0, 5.5)),
        ([50, 30, 100, 100], (50.0, 30.0, 60.0, 40.0)),
        ([0, 0, 60, 40], (0.0, 0.0, 60.0, 40.0)),
    ],
)
def test_boxes_are_clipped(bbox: list, box: tuple) -> None:
    assert clip_box(bbox, *SIZE) == box


@pytest.mark.parametrize(
    ("bbox", "caption", "reason"),
    [
        ([60, 5, 10, 10], "a cat", "box outside the image"),
        ([5, -20, 10, 10], "a cat", "box outside the image"),
        ([5, 5, 0, 10], "a cat", "box below one pixel"),
        ([5, 5, -3, 10], "a cat", "box below one pixel"),
        ([5, 5, 10, 0.5], "a cat", "box below one pixel"),
        ([59.5, 5, 10, 10], "a cat", "box below one pixel"),
        ([5, 5, 10], "a cat", "box is not four numbers"),
        ([5, 5, 10, "10"], "a cat", "box is not four numbers"),
        (None, "a cat", "malformed annotation (TypeError: object of type 'NoneType' has no len())"),
        ([5, 5, 10, 10], " ", "region without a text"),
    ],
)
def test_a_broken_box_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], bbox: Any, caption: str, reason: str
) -> None:
    content = genome((bbox, caption), ([30, 10, 20, 20], "a dog"))
    builder = write_family(VisualGenomeRegions, {VG: content}, VG_IMAGE)
    assert described(only(builder)) == [((30.0, 10.0, 50.0, 30.0), "a dog")]
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("change", "size", "reason"),
    [
        ({"height": 41}, SIZE, "image size differs from its annotation"),
        ({"file_name": "gone.jpg"}, SIZE, "image file is missing"),
        ({"file_name": "../../../9.jpg"}, SIZE, "image file name leads out of the data folder"),
        ({"height": 31}, (31, 60), "image side below 32 pixels"),
        ({"id": 8}, SIZE, "image without a usable region"),
    ],
)
def test_a_broken_image_is_counted(
    write_family: Callable[..., UscdfBuilder], change: dict[str, Any], size: tuple[int, int], reason: str
) -> None:
    content = genome(([5, 5, 10, 20], "a man"))
    content["images"][0] |= change
    builder = write_family(VisualGenomeRegions, {VG: content}, VG_IMAGE, size=size)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("kind", "file", "image_name", "split"),
    [
        (VisualGenomeRegions, "train.json", "images/9.jpg", "train"),
        (RefcocogRegions, "finetune_refcocog_train.json", f"train2014/{COCO_NAME}", "train"),
        (RefcocoRegions, "mdetr_annotations/finetune_refcoco_testA.json", f"coco/train2014/{COCO_NAME}", "testA"),
        (
            RefcocoPlusRegions,
            "RefCoco_Reg/mdetr_annotations/finetune_refcoco+_val.json",
            f"coco_2014/train2014/{COCO_NAME}",
            "validation",
        ),
    ],
)
def test_layouts(
    write_family: Callable[..., UscdfBuilder], kind: type[UscdfBuilder], file: str, image_name: str, split: str
) -> None:
    content = genome(([5, 5, 10, 20], "a man"))
    content["images"][0]["file_name"] = Path(image_name).name
    builder = write_family(kind, {file: content}, image_name)
    assert list(builder.split_items()) == [split]
    (row,) = only(builder)
    assert (row["image"], row["source"]) == (str(builder.data_dir / image_name), kind.SOURCE)


@pytest.mark.parametrize("kind", [VisualGenomeRegions, RefcocogRegions, RefcocoRegions, Flickr30kEntities])
def test_an_empty_folder_is_refused(write_family: Callable[..., UscdfBuilder], kind: type[UscdfBuilder]) -> None:
    builder = write_family(kind, {"other.json": []})
    with pytest.raises(FileNotFoundError, match="is it the folder of this dataset"):
        builder.split_items()


# The RefCOCO family


def test_expressions_of_one_photograph_come_together(write_family: Callable[..., UscdfBuilder]) -> None:
    left, right = [5, 5, 10, 20], [30, 10, 20, 20]
    content = expressions(("left man", left), ("man in red", left), ("right man", right))
    builder = write_family(
        RefcocoRegions,
        {"RefCoco_Reg/mdetr_annotations/finetune_refcoco_train.json": content},
        f"coco/train2014/{COCO_NAME}",
    )
    assert builder.split_items() == {"train": [("train", COCO_NAME)]}
    rows = only(builder)
    assert [row["image_id"] for row in rows] == ["COCO_train2014_000000000009"] * 2
    assert rows[0]["messages"][0]["content"] == (
        "<image>\nGive a short expression that tells <region> apart from the rest of the picture."
    )
    assert described(rows) == [
        ((5.0, 5.0, 15.0, 25.0), "left man"),
        ((5.0, 5.0, 15.0, 25.0), "man in red"),
        ((30.0, 10.0, 50.0, 30.0), "right man"),
    ]


def test_validation_has_a_file_of_its_own(write_family: Callable[..., UscdfBuilder]) -> None:
    # The published code reads the training file for the validation of RefCOCO.
    files = {
        f"RefCoco_Reg/mdetr_annotations/finetune_refcoco_{name}.json": expressions((f"{name} man", [5, 5, 10, 20]))
        for name in ("train", "val", "testA", "testB")
    }
    builder = write_family(RefcocoRegions, files, f"coco/train2014/{COCO_NAME}")
    assert {
        split: described(builder.usable_rows(items[0]))[0][1] for split, items in builder.split_items().items()
    } == {"train": "train man", "validation": "val man", "testA": "testA man", "testB": "testB man"}


def test_refcocog_is_evaluated_on_its_file_of_captions(write_family: Callable[..., UscdfBuilder]) -> None:
    captions = {
        "images": [image(5, COCO_NAME)],
        "annotations": [region(5, 5, [5, 5, 10, 20], caption="the man on the left")],
    }
    files = {
        "RefCoco_Reg/mdetr_annotations/finetune_refcocog_val.json": expressions(("other", [5, 5, 10, 20])),
        "RefCoco_Reg/mdetr_annotations/finetune_refcocog_val_captions.json": captions,
    }
    builder = write_family(RefcocogRegions, files, f"coco/train2014/{COCO_NAME}")
    assert builder.split_items() == {"validation": [("validation", COCO_NAME)]}
    assert described(only(builder)) == [((5.0, 5.0, 15.0, 25.0), "the man on the left")]


# Flickr30k Entities

CAPTION = "Two men walk a dog ."


def test_a_sentence_and_the_phrases_of_its_boxes(write_family: Callable[..., UscdfBuilder]) -> None:
    spans = [(0, 7, [5, 5, 10, 20]), (13, 18, [30, 10, 20, 20])]
    builder = write_family(Flickr30kEntities, {ENTITIES: sentence(CAPTION, *spans)}, FLICKR_IMAGE)
    assert builder.split_items() == {"train": [("train", 3)]}
    (row,) = only(builder)
    # The published code writes two markers for each box but passes each box once.
    assert row == {
        "image": str(builder.data_dir / FLICKR_IMAGE),
        "image_id": "36979",
        "source": "flickr30k_entities",
        "task": "region",
        "messages": [
            {"role": "user", "content": "<image>\nWrite one sentence about <region> and <region>."},
            {"role": "assistant", "content": CAPTION},
            {"role": "user", "content": "Describe <region>."},
            {"role": "assistant", "content": "Two men"},
            {"role": "user", "content": "What does the box <region> contain?"},
            {"role": "assistant", "content": "a dog"},
        ],
        "masks": [],
        "regions": [
            [5.0, 5.0, 15.0, 25.0],
            [30.0, 10.0, 50.0, 30.0],
            [5.0, 5.0, 15.0, 25.0],
            [30.0, 10.0, 50.0, 30.0],
        ],
        "ignore_mask": None,
    }
    assert builder.skipped == {}


def test_sentence_and_phrases_are_about_the_same_ten_boxes(write_family: Callable[..., UscdfBuilder]) -> None:
    # The published code takes ten phrases and all boxes.
    spans = [(number, number + 1, [number, 0, 10, 10]) for number in range(12)]
    (row,) = only(write_family(Flickr30kEntities, {ENTITIES: sentence("abcdefghijkl", *spans)}, FLICKR_IMAGE))
    assert len(row["messages"]) == 22
    assert row["messages"][0]["content"].count("<region>") == 10
    assert row["regions"][:10] == row["regions"][10:]
    letters = [message["content"] for message in row["messages"][3::2]]
    assert letters == ["abcdefghijkl"[int(box[0])] for box in row["regions"][10:]]


def test_a_validation_row_has_one_question(write_family: Callable[..., UscdfBuilder]) -> None:
    spans = [(0, 7, [5, 5, 10, 20]), (13, 18, [30, 10, 20, 20])]
    rows = only(write_family(Flickr30kEntities, {ENTITIES_VAL: sentence(CAPTION, *spans)}, FLICKR_IMAGE, variants=2))
    assert [(row["messages"][1]["content"], len(row["regions"])) for row in rows[:1]] == [(CAPTION, 2)]
    assert described(rows[1:]) == [((5.0, 5.0, 15.0, 25.0), "Two men"), ((30.0, 10.0, 50.0, 30.0), "a dog")]


@pytest.mark.parametrize(
    ("start", "end", "reason"),
    [
        (13, 90, "phrase outside its caption"),
        (-2, 5, "phrase outside its caption"),
        (5, 5, "phrase outside its caption"),
        (7, 8, "phrase outside its caption"),  # a blank
        (None, 5, "malformed annotation (TypeError: "),
    ],
)
def test_a_broken_phrase_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], start: Any, end: int, reason: str
) -> None:
    spans = [(start, end, [5, 5, 10, 20]), (13, 18, [30, 10, 20, 20])]
    builder = write_family(Flickr30kEntities, {ENTITIES: sentence(CAPTION, *spans)}, FLICKR_IMAGE)
    rows = only(builder)
    assert described(rows) == [((30.0, 10.0, 50.0, 30.0), "a dog")]  # alone: no question about several boxes
    ((found, count),) = builder.skipped.items()
    assert found.startswith(reason)
    assert count == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (sentence(CAPTION), "image without a usable region"),
        (sentence(" ", (0, 1, [5, 5, 10, 20])), "empty caption"),
        (sentence(CAPTION, (0, 7, [5, 5, 10, 20]), width=61), "image size differs from its annotation"),
    ],
)
def test_a_broken_sentence_is_counted(write_family: Callable[..., UscdfBuilder], content: dict, reason: str) -> None:
    builder = write_family(Flickr30kEntities, {ENTITIES: content}, FLICKR_IMAGE)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


# Real files


def test_sentences_of_flickr30k_entities(write_family: Callable[..., UscdfBuilder], tmp_path: Path) -> None:
    """Published sentences with their phrases, and a photograph of the set, in the merged layout of MDETR."""
    source = FORMATS / "flickr30k_entities/test_fixtures/vision"
    if not source.is_dir():
        pytest.skip("the published samples are not at ../shared/data/formats")
    content: dict[str, list] = {"images": [], "annotations": []}
    for number, line in enumerate((source / "flickr30k/sentences/4945942737.txt").read_text().splitlines()):
        caption, position = "", 0
        for match in re.finditer(r"\[/EN#\d+/\S+ ([^\]]+)\]", line):
            caption += line[position : match.start()]
            span = [len(caption), len(caption) + len(match[1])]
            caption, position = caption + match[1], match.end()
            box = [10 * len(content["annotations"]), 20, 30, 40]
            content["annotations"].append(region(len(content["annotations"]), number, box, tokens_positive=[span]))
        caption += line[position:]
        content["images"].append(image(number, "4945942737.jpg", caption=caption, height=500, width=333))
    (tmp_path / "data/flickr_30k/images").mkdir(parents=True)
    shutil.copyfile(source / "images/flickr30k/4945942737.jpg", tmp_path / "data/flickr_30k/images/4945942737.jpg")
    builder = write_family(Flickr30kEntities, {ENTITIES_VAL: content})
    rows = only(builder)
    assert rows[0]["messages"][1]["content"] == (
        "A girl with brown hair sits on the edge of a cement area overlooking water ."
    )
    assert described(rows[1:5]) == [
        ((0.0, 20.0, 30.0, 60.0), "A girl"),
        ((10.0, 20.0, 40.0, 60.0), "brown hair"),
        ((20.0, 20.0, 50.0, 60.0), "the edge of a cement area"),
        ((30.0, 20.0, 60.0, 60.0), "overlooking water"),
    ]
    assert builder.skipped == {}


def test_published_expressions(write_family: Callable[..., UscdfBuilder]) -> None:
    """Published expressions with their boxes and sizes, in the layout of RefCOCOg."""
    source = FORMATS / "refer/refcocos_test.json"
    if not source.is_file():
        pytest.skip("the published samples are not at ../shared/data/formats")
    entries = [entry for entry in json.loads(source.read_text()) if entry["solution"]][:20]
    content: dict[str, list] = {"images": [], "annotations": []}
    for number, entry in enumerate(entries):
        left, top, right, bottom = entry["solution"]
        name = Path(entry["image"]).name
        size = {"height": entry["height"], "width": entry["width"]}
        content["images"].append(image(number, name, caption=entry["normal_caption"], **size))
        content["annotations"].append(region(number, number, [left, top, right - left, bottom - top]))
    builder = write_family(RefcocogRegions, {"finetune_refcocog_test.json": content})
    for entry in entries:
        path = builder.data_dir / "train2014" / Path(entry["image"]).name
        path.parent.mkdir(exist_ok=True)
        PIL.Image.new("L", (entry["width"], entry["height"])).save(path)
    rows = only(builder)
    assert len(rows) == len(entries)
    texts = {row["messages"][1]["content"]: row["regions"] for row in rows}
    assert texts["a bowl whose exterior is neither red nor white"] == [
        pytest.approx([342.29, 236.85, 392.62, 265.01]),
    ]
    assert builder.skipped == {}
