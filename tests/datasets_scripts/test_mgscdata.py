import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.mgscdata import MgscData, definite_phrase, object_label, read_mask, read_tags
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)
MAN, BIKE, HAT = (5, 5, 15, 38), (10, 20, 50, 38), (6, 4, 14, 9)


def packed(box: tuple[int, int, int, int], size: tuple[int, int] = SIZE) -> str:
    rle = box_rle(size, box)
    return json.dumps({"size": rle["size"], "counts": base64.b64encode(rle["counts"].encode()).decode()})


def key(label: str, box: tuple[int, int, int, int]) -> dict:
    return {"label": label, "mask": packed(box), "caption": f"A {label}.", "area": 1}


def root(caption: str = "<KEY1>A man</KEY1> rides <KEY2>a bike</KEY2>.", **change: Any) -> dict:
    return {
        "file_name": "sa_1.jpg",
        "type": "root",
        "label": "root",
        "gcg_caption": caption,
        "gcg_labels": ["KEY2", "KEY1"],  # not in the order of the caption
        "KEY1": key("man", MAN),
        "KEY2": key("bike", BIKE),
        **change,
    }


SUBTREE = {
    "file_name": "sa_1.jpg",
    "type": "subtree_1",
    "label": "subtree:  Man with a Hat ",
    "gcg_caption": '"He wears <KEY3> a red hat </KEY3>."',
    "gcg_labels": ["KEY3"],
    "KEY3": key("hat", HAT),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., MgscData]:
    """Writes the original layout with one image of height 40 and width 60, and returns the builder."""

    def build(
        entries: Any,
        *,
        folder: str = "MGLMM_gcg_new",
        lists: str = "",
        images: str = "SegmentAnything/imgs",
        name: str = "mglmm_sa_1.json",
        split: str = "train",
        **options: Any,
    ) -> MgscData:
        data = tmp_path / "data"
        (data / folder / "annotations").mkdir(parents=True, exist_ok=True)
        (data / folder / "annotations" / "mglmm_sa_1.json").write_text(json.dumps(entries))
        (data / folder / lists / f"MGLMM_{split}_split.txt").write_text(f"{name}\n\n")
        (data / images).mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", SIZE[::-1]).save(data / images / "sa_1.jpg")
        return MgscData(cache_dir=str(tmp_path / "cache"), data_dir=str(data), **options)

    return build


def only(builder: MgscData) -> list[tuple[str, list[dict]]]:
    """Answer and masks of every row."""
    items = [item for of_split in builder.split_items().values() for item in of_split]
    builder.skipped.clear()  # of missing splits
    rows = [row for item in items for row in builder.usable_rows(item)]
    return [(row["messages"][1]["content"], row["masks"]) for row in rows]


RODE = "<p> A man </p> [SEG] rides <p> a bike </p> [SEG]."
BOTH = [box_rle(SIZE, MAN), box_rle(SIZE, BIKE)]


def test_an_image_has_a_coarse_and_fine_descriptions(write: Callable[..., MgscData]) -> None:
    builder = write([root(), SUBTREE])
    assert builder.split_items() == {"train": [("train", "mglmm_sa_1.json")]}
    assert builder.skipped == {"split validation without a list": 1}
    coarse, fine = builder.usable_rows(("train", "mglmm_sa_1.json"))
    assert coarse == {
        "image": str(builder.data_dir / "SegmentAnything/imgs/sa_1.jpg"),
        "image_id": "sa_1",
        "source": "mgscdata",
        "task": "panoptic",
        "messages": [
            {"role": "user", "content": "<image>\nWhat can you see here? Segment each thing"},
            {"role": "assistant", "content": RODE},
        ],
        "masks": BOTH,
        "regions": [],
        "ignore_mask": None,
    }
    assert fine["task"] == "fine"
    assert fine["messages"] == [
        {"role": "user", "content": "<image>\nDescribe the parts of the man with a hat with masks."},
        {"role": "assistant", "content": "He wears <p> a red hat </p> [SEG]."},
    ]
    assert fine["masks"] == [box_rle(SIZE, HAT)]


def test_the_configuration_has_a_name(write: Callable[..., MgscData]) -> None:
    assert write([root()]).config.name == "mgsc" and list(MgscData.builder_configs) == ["mgsc"]


def test_variants_word_the_question_anew(write: Callable[..., MgscData]) -> None:
    builder = write([root()], variants=2)
    builder.split_items()
    first, second = builder.usable_rows(("train", "mglmm_sa_1.json"))
    assert first["messages"][1] == second["messages"][1]
    assert first["messages"][0] != second["messages"][0]
    assert len(only(write([root()], split="val", variants=2))) == 3  # validation is asked once


@pytest.mark.parametrize(
    ("folder", "lists", "images"),
    [
        ("MGLMM_gcg_new", "", "SegmentAnything/imgs"),  # where the training code looks
        ("MGLMM_gcg_new", "annotations", "SegmentAnything/imgs"),  # where the converter looks
        ("MGLMM_gcg_new/MGLMM_gcg", "", "SegmentAnything/imgs"),
        ("MGLMM_gcg_new/COCO_MGLMM_gcg", "", "coco/train2017"),
        ("", "", "images"),
        ("", "annotations", "SegmentAnything/imgs"),
    ],
)
def test_layouts(write: Callable[..., MgscData], folder: str, lists: str, images: str) -> None:
    assert only(write([root()], folder=folder, lists=lists, images=images)) == [(RODE, BOTH)]


def test_images_of_coco_are_found_beside_those_of_sam(write: Callable[..., MgscData]) -> None:
    builder = write([root(file_name="000000000139.jpg"), root()])
    (builder.data_dir / "coco/train2017").mkdir(parents=True)
    PIL.Image.new("RGB", SIZE[::-1]).save(builder.data_dir / "coco/train2017/000000000139.jpg")
    assert only(builder) == [(RODE, BOTH)] * 2


@pytest.mark.parametrize(
    ("caption", "answer", "boxes", "skipped"),
    [
        # masks in the order of the caption
        (
            "<KEY2>A bike</KEY2> below <KEY1>a man</KEY1>",
            "<p> A bike </p> [SEG] below <p> a man </p> [SEG]",
            [BIKE, MAN],
            {},
        ),
        # a key named twice has its mask twice
        (
            "<KEY1>A man</KEY1> on <KEY2>a bike</KEY2>; <KEY1>he</KEY1> smiles",
            "<p> A man </p> [SEG] on <p> a bike </p> [SEG]; <p> he </p> [SEG] smiles",
            [MAN, BIKE, MAN],
            {},
        ),
        # never: its mask goes
        ("<KEY1>A man</KEY1>", "<p> A man </p> [SEG]", [MAN], {"key that its caption never names": 1}),
        # tags of unknown keys and tags that do not pair are taken out, and nothing between them
        (
            "<KEY9>A</KEY9> <KEY1>man</KEY1> on <KEY2>a bike</KEY3> in </KEY1>the sun",
            "A <p> man </p> [SEG] on a bike in the sun",
            [MAN],
            {"key that its caption never names": 1},
        ),
        # the published converter deletes all between the first and the last stray bracket
        (
            "If 1 < 2, <KEY1>a man</KEY1> has > 1 <KEY2>bike</KEY2>",
            "If 1 < 2, <p> a man </p> [SEG] has > 1 <p> bike </p> [SEG]",
            [MAN, BIKE],
            {},
        ),
        # a tag in a tag: the longest phrase stays
        (
            "<KEY1>A man on <KEY2>a bike</KEY2></KEY1>",
            "<p> A man on a bike </p> [SEG]",
            [MAN],
            {"phrase that overlaps a longer one": 1},
        ),
        # tags of the target format
        (
            "<p>A</p> <KEY1>man</KEY1> [SEG] <region> on <KEY2>a bike</KEY2>",
            "A <p> man </p> [SEG] [ SEG] on <p> a bike </p> [SEG]",
            [MAN, BIKE],
            {},
        ),
        (
            '"<KEY1>A man</KEY1> on <KEY2>a bike</KEY2>"',
            "<p> A man </p> [SEG] on <p> a bike </p> [SEG]",
            [MAN, BIKE],
            {},
        ),
    ],
)
def test_tags(write: Callable[..., MgscData], caption: str, answer: str, boxes: list, skipped: dict[str, int]) -> None:
    builder = write([root(caption)])
    assert only(builder) == [(answer, [box_rle(SIZE, box) for box in boxes])]
    assert builder.skipped == skipped


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "key without a mask"),
        ("None", "key without a mask"),
        ("", "key without a mask"),
        ("{", "mask is no JSON string of an RLE with base64 counts (JSONDecodeError)"),
        ("null", "mask is no JSON string of an RLE with base64 counts (TypeError)"),
        ("{}", "mask is no JSON string of an RLE with base64 counts (KeyError)"),
        (json.dumps(box_rle(SIZE, MAN)), "mask is no JSON string of an RLE with base64 counts (Error)"),  # not packed
        (packed((1, 1, 3, 3), (60, 40)), "mask size differs from the image size"),
        (packed((0, 0, 0, 0)), "empty mask"),
    ],
)
def test_a_broken_mask_leaves_the_others(write: Callable[..., MgscData], mask: Any, reason: str) -> None:
    builder = write([root(KEY2={"label": "bike", "mask": mask})])
    assert only(builder) == [("<p> A man </p> [SEG] rides a bike.", [box_rle(SIZE, MAN)])]
    assert builder.skipped == {reason: 1}


def test_a_key_may_be_missing(write: Callable[..., MgscData]) -> None:
    entry = root()
    del entry["KEY2"]
    builder = write([entry])
    assert only(builder) == [("<p> A man </p> [SEG] rides a bike.", [box_rle(SIZE, MAN)])]
    assert builder.skipped == {"key without a mask": 1}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (root(""), "empty caption"),
        (root('""'), "empty caption"),
        (root(None), "empty caption"),  # type: ignore[arg-type]
        (root("A man rides a bike."), "caption without a grounded phrase"),
        (root(file_name="sa_2.jpg"), "image file is missing"),
        (root(file_name="../../sa_2.jpg"), "image file name leads out of the data folder"),
        (root(label="subtree: "), "empty phrase"),
        ({"file_name": "sa_1.jpg"}, "missing field 'gcg_labels'"),
        ("text", "malformed annotation (TypeError: string indices must be integers, not 'str')"),
    ],
)
def test_a_broken_entry_leaves_the_others(write: Callable[..., MgscData], entry: Any, reason: str) -> None:
    builder = write([entry, SUBTREE], split="val")
    assert only(builder) == [("He wears <p> a red hat </p> [SEG].", [box_rle(SIZE, HAT)])]
    reasons = {name: count for name, count in builder.skipped.items() if name != "key that its caption never names"}
    assert reasons == {reason: 1}


@pytest.mark.parametrize(
    ("entries", "name", "reason"),
    [
        ({"root": root()}, "mglmm_sa_1.json", "annotation file holds no list of entries"),
        ([], "mglmm_sa_1.json", "annotation file holds no list of entries"),
        ([root()], "mglmm_sa_2.json", "annotation file is missing"),
        ([root()], "../MGLMM_train_split.txt", "annotation file name leads out of the data folder"),
    ],
)
def test_a_broken_file_is_counted(write: Callable[..., MgscData], entries: Any, name: str, reason: str) -> None:
    builder = write(entries, name=name)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


def test_a_folder_without_lists_is_refused(write: Callable[..., MgscData]) -> None:
    builder = write([root()])
    (builder.data_dir / "MGLMM_gcg_new/MGLMM_train_split.txt").unlink()
    with pytest.raises(FileNotFoundError, match="MGLMM_val_split.txt"):
        builder.split_items()


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("root", None),
        (" Root", None),
        ("subtree: man", "the man"),  # the published evaluation keeps the blank
        ("subtree:A  Red Car.", "the red car"),
        ("subtree: the roof: left", "the roof: left"),
    ],
)
def test_object_label(label: str, name: str | None) -> None:
    assert object_label(label) == name


def test_small_parts() -> None:
    assert definite_phrase("An owl") == "the owl"
    assert definite_phrase("his hat") == "his hat"
    assert definite_phrase("a") == "the a"
    assert read_tags("<a b>x</a b> <c>y</c>", {"a b"}) == ("x y", [("a b", 0, 1)])
    assert read_mask(packed(MAN), *SIZE) == box_rle(SIZE, MAN)
