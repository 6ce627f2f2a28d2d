"""Data of one's own: every layout is recognised and gives the rows that its annotations say."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.custom import Custom
from mglmm.datasets_scripts.prepare import prepare
from mglmm.processing.rle import decode_mask
from tests.datasets_scripts.conftest import box_rle

SIZE = (40, 60)
HAT, DOG, CAR = (5, 5, 20, 20), (30, 5, 50, 30), (2, 25, 30, 38)
Files = dict[str, Any]


def box_polygon(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def png(values: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(values)


def box_png(*boxes: tuple[tuple[int, int, int, int], int], size: tuple[int, int] = SIZE) -> PIL.Image.Image:
    values = np.zeros(size, dtype=np.uint8)
    for (left, top, right, bottom), value in boxes:
        values[top:bottom, left:right] = value
    return png(values)


PHOTO = PIL.Image.new("RGB", SIZE[::-1], (90, 120, 30))


def write(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, PIL.Image.Image):
            content.save(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Custom]:
    def build(files: Files, **options: Any) -> Custom:
        folder = write(tmp_path / "data", files)
        return Custom(cache_dir=str(tmp_path / "cache"), data_dir=str(folder), **options)

    return build


def rows_of(builder: Custom) -> dict[str, list[dict]]:
    return {
        split: [row for item in items for row in builder.usable_rows(item)]
        for split, items in builder.split_items().items()
    }


def coco(*images: tuple[int, str], **replaced: Any) -> dict:
    annotations = [
        {"id": 10 * number + k, "image_id": number, "category_id": k, "segmentation": [box_polygon(box)]}
        for number, _ in images
        for k, box in ((1, HAT), (2, DOG))
    ]
    content = {
        "info": {},
        "images": [{"id": number, "file_name": name, "width": 60, "height": 40} for number, name in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "hat"}, {"id": 2, "name": "dog"}],
    }
    return {**content, **replaced}


def shape(label: str, points: list, kind: str = "polygon", **more: Any) -> dict:
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}, **more}


def corners(box: tuple[int, int, int, int]) -> list:
    left, top, right, bottom = box
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def labelme(*shapes: dict, image: str = "a.jpg", **more: Any) -> dict:
    return {
        "version": "5.4.1",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": image,
        "imageData": None,
        "imageHeight": 40,
        "imageWidth": 60,
        **more,
    }


def line(**fields: Any) -> str:
    row = {
        "image": "images/a.jpg",
        "question": "Where is the hat?",
        "answer": "Here is <p> the hat </p> [SEG].",
        "masks": [box_rle(SIZE, HAT)],
    }
    return json.dumps({**row, **fields}) + "\n"


TWO_SHAPES = (shape("hat", corners(HAT)), shape("dog", corners(DOG)))
INDEX = box_png((HAT, 1), (DOG, 2))

# One image with a hat and a dog, in every layout.
LAYOUTS: dict[str, Files] = {
    "coco beside images": {"annotations.json": coco((1, "a.jpg")), "images/a.jpg": PHOTO},
    "coco in annotations": {"annotations/instances_train2017.json": coco((1, "a.jpg")), "train2017/a.jpg": PHOTO},
    "coco in split folders": {"train/_annotations.coco.json": coco((1, "a.jpg")), "train/a.jpg": PHOTO},
    "labelme": {"a.json": labelme(*TWO_SHAPES), "a.jpg": PHOTO},
    "labelme in sub-folders, from Windows": {
        "json/a.json": labelme(*TWO_SHAPES, image="..\\images\\a.jpg"),
        "images/a.jpg": PHOTO,
    },
    "index masks, names in JSON": {
        "images/a.jpg": PHOTO,
        "masks/a.png": INDEX,
        "labels.json": {"1": "hat", "2": "dog"},
    },
    "index masks, names in text": {"images/a.jpg": PHOTO, "masks/a.png": INDEX, "labels.txt": "nothing\nhat\ndog\n"},
    "palette masks in split folders": {
        "train/images/a.jpg": PHOTO,
        "train/masks/a.png": INDEX.convert("P"),
        "labels.txt": "nothing\nhat\ndog\n",
    },
    "object masks": {
        "images/a.jpg": PHOTO,
        "masks/a/hat.png": box_png((HAT, 255)),
        "masks/a/dog.png": box_png((DOG, 255)).convert("1"),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_targets(build: Callable[..., Custom], layout: str) -> None:
    builder = build(LAYOUTS[layout], variants=2)
    rows = rows_of(builder)
    assert list(rows) == ["train"] and not builder.skipped
    masks = {json.dumps(mask) for row in rows["train"] for mask in row["masks"]}
    assert masks == {json.dumps(box_rle(SIZE, box)) for box in (HAT, DOG)}
    panoptic = next(row for row in rows["train"] if row["task"] == "panoptic")
    assert "<p> a hat </p> [SEG]" in panoptic["messages"][1]["content"]
    assert "<p> a dog </p> [SEG]" in panoptic["messages"][1]["content"]
    assert {(row["source"], Path(row["image"]).name) for row in rows["train"]} == {("custom", "a.jpg")}


def test_jsonl_rows_stay_as_they_are(build: Callable[..., Custom]) -> None:
    lines = [
        line(),
        "\n",
        line(masks=[[box_polygon(HAT)]], task="reasoning", question="<image>\nWhat keeps the sun off?"),
        line(masks=["masks/hat.png"]),
        line(question="What is it?", answer="A dog.", masks=[]),
    ]
    files = {"images/a.jpg": PHOTO, "masks/hat.png": box_png((HAT, 7)), "rows.jsonl": "".join(lines)}
    (row, reasoning, from_png, text) = rows_of(build(files))["train"]
    assert row == {
        "image": str(Path(row["image"])),
        "image_id": "images/a.jpg",
        "source": "custom",
        "task": "referring",
        "messages": [
            {"role": "user", "content": "<image>\nWhere is the hat?"},
            {"role": "assistant", "content": "Here is <p> the hat </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, HAT)],
        "regions": [],
        "ignore_mask": None,
    }
    assert reasoning["task"] == "reasoning" and reasoning["messages"][0]["content"].count("<image>") == 1
    assert reasoning["masks"] == from_png["masks"] == row["masks"]
    assert (text["task"], text["masks"]) == ("conversation", [])


def test_splits_by_folder_and_by_file_name(build: Callable[..., Custom], tmp_path: Path) -> None:
    by_folder = {
        f"{split}/a{number}.json": labelme(*TWO_SHAPES) for number, split in enumerate(("train", "val", "test"))
    }
    by_folder |= {f"{split}/a.jpg": PHOTO for split in ("train", "val", "test")}
    assert list(rows_of(build(by_folder))) == ["train", "validation", "test"]
    by_name = {f"{split}.jsonl": line() for split in ("train", "validation")} | {"images/a.jpg": PHOTO}
    other = Custom(cache_dir=str(tmp_path / "c"), data_dir=str(write(tmp_path / "b", by_name)))
    assert {split: len(rows) for split, rows in rows_of(other).items()} == {"train": 1, "validation": 1}


def test_instances_of_one_label_are_one_target(build: Callable[..., Custom]) -> None:
    files = {
        "images/a.jpg": PHOTO,
        "masks/a/dog_1.png": box_png((HAT, 255)),
        "masks/a/dog-2.png": box_png((DOG, 255)),
    }
    panoptic = next(row for row in rows_of(build(files))["train"] if row["task"] == "panoptic")
    assert "<p> two dogs </p> [SEG]" in panoptic["messages"][1]["content"] or "dogs" in str(panoptic["messages"])
    (mask,) = panoptic["masks"]
    assert (decode_mask(mask) == decode_mask(box_rle(SIZE, HAT)) | decode_mask(box_rle(SIZE, DOG))).all()


def test_shapes_of_labelme(build: Callable[..., Custom]) -> None:
    patch = io.BytesIO()
    png(np.full((13, 28), 255, dtype=np.uint8)).save(patch, "PNG")
    shapes = (
        shape("hat", [[5, 5], [20, 20]], "rectangle"),
        # one dog in two pieces
        shape("dog", corners((30, 5, 40, 30)), group_id=1),
        shape("dog", corners((40, 5, 50, 30)), group_id=1),
        shape("car", [[2, 25], [29, 37]], "mask", mask=base64.b64encode(patch.getvalue()).decode()),
        shape("ball", [[30, 20], [30, 25]], "circle"),
        shape("nose", [[3, 3]], "point"),
    )
    rows = rows_of(build({"a.json": labelme(*shapes), "a.jpg": PHOTO}))["train"]
    panoptic = next(row for row in rows if row["task"] == "panoptic")
    text, masks = panoptic["messages"][1]["content"], panoptic["masks"]
    assert len(masks) == 4 and "a dog" in text and "nose" not in text
    assert [mask for mask in masks if mask in [box_rle(SIZE, box) for box in (HAT, DOG, CAR)]] == [
        mask for mask in masks if abs(int(decode_mask(mask).sum()) - 78) > 8
    ]  # all but the circle of radius 5


def test_unlabelled_pixels_are_kept_apart(build: Callable[..., Custom]) -> None:
    index = box_png((HAT, 1), (DOG, 255))
    files = {"images/a.png": PHOTO, "masks/a.png": index, "labels.json": {"1": "hat"}}
    rows = rows_of(build(files))["train"]
    assert {json.dumps(row["ignore_mask"]) for row in rows} == {json.dumps(box_rle(SIZE, DOG))}


BAD_ANNOTATION = {"id": 1, "image_id": 1, "category_id": 1}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        # COCO
        ({"a.json": coco((1, "b.jpg"))}, "image file is missing"),
        ({"a.json": coco((1, "../../../etc/hostname"))}, "image file name leads out of the data folder"),
        ({"a.json": coco((1, "/etc/hostname"))}, "image file name leads out of the data folder"),
        ({"a.json": coco((1, "a.jpg"), categories=[])}, "category_id is none of the categories"),
        ({"a.json": coco((1, "a.jpg"), annotations=[BAD_ANNOTATION])}, "missing field 'segmentation'"),
        ({"a.json": coco((1, "a.jpg"), annotations=[{**BAD_ANNOTATION, "segmentation": []}])}, "empty segmentation"),
        (
            {"a.json": coco((1, "a.jpg"), images=[{"id": 1, "file_name": "a.jpg", "width": 40, "height": 60}])},
            "image is EXIF-rotated and its annotation is not: apply the rotation to one of them",
        ),
        # labelme
        ({"a.json": labelme(*TWO_SHAPES, image="../b.jpg")}, "image file name leads out of the data folder"),
        ({"a.json": labelme(shape("hat", [[1, 1], [2, 2]]))}, "polygon of fewer than three points"),
        ({"a.json": labelme(*TWO_SHAPES, imageHeight=20)}, "image size differs from its annotation"),
        ({"a.json": '{"shapes": [}'}, "a.json is not valid JSON: Expecting value: line 1 column 13 (char 12)"),
        ({"a.json": {"version": 1}}, "JSON is not of labelme: it has no shapes"),
        ({"a.json": labelme(shape("hat", [[1, 1], [2, 2]], "mask", mask="?"))}, "mask of labelme is not base64"),
        # masks
        ({"masks/a.png": INDEX, "labels.json": {"1": "hat"}}, "index image has a value without a label"),
        (
            {"masks/a.png": INDEX.convert("RGB"), "labels.json": {"1": "hat"}},
            "index image has colours in place of indices: save it as a grey or palette PNG",
        ),
        ({"masks/b/hat.png": box_png((HAT, 255))}, "image file is missing"),
        ({"masks/a/hat.png": box_png((HAT, 9), size=(30, 30))}, "mask size differs from the image size"),
        ({"masks/a/hat.png": box_png()}, "empty mask"),
        # JSONL
        ({"a.jsonl": "{"}, "line is not valid JSON"),
        ({"a.jsonl": line(image="b.jpg")}, "image file is missing"),
        ({"a.jsonl": line(masks=[])}, "1 [SEG] in assistant turns but 0 masks."),
        ({"a.jsonl": line(masks=["../../x.png"])}, "mask file name leads out of the data folder"),
        ({"a.jsonl": line(masks=[box_rle((9, 9), (1, 1, 2, 2))])}, "mask size differs from the image size"),
        ({"a.jsonl": line(answer="<p> the hat [SEG]")}, "message 1 has unbalanced or nested tags: 1 <p>, 0 </p>."),
        ({"a.jsonl": json.dumps({"image": "images/a.jpg", "answer": "A dog."})}, "missing field 'question'"),
    ],
)
def test_what_is_broken_is_counted(build: Callable[..., Custom], files: Files, reason: str) -> None:
    builder = build({"images/a.jpg": PHOTO, "a.jpg": PHOTO, **files})
    assert rows_of(builder) == {"train": []}
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images/a.jpg": PHOTO}, "holds no JSONL, no COCO or labelme JSON and no folder masks/"),
        ({"images/a.jpg": PHOTO, "masks/a.png": INDEX}, "neither labels.json nor labels.txt names their values"),
    ],
)
def test_unknown_layouts_are_refused(build: Callable[..., Custom], files: Files, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        build(files).split_items()


def test_own_data_is_prepared_without_a_validation_split(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", LAYOUTS["labelme"])
    prepare("custom", folder, tmp_path / "rows", num_proc=1)
    assert datasets.get_dataset_config_names(str(tmp_path / "rows")) == ["default"]
    rows = datasets.load_dataset(str(tmp_path / "rows"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[0]["image"].size == (60, 40)
