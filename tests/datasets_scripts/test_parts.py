import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.parts import Ade20kParts, PacoLvis, PartAnnotations, PascalPart, category_names
from mglmm.datasets_scripts.scene import Label, read_scene
from mglmm.processing.rle import decode_mask, encode_mask
from tests.datasets_scripts.conftest import box_rle

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
SIZE = (40, 60)
Box = tuple[int, int, int, int]
SKY, CAR, CAR2, UNLABELLED = (0, 0, 60, 10), (0, 10, 30, 40), (30, 10, 50, 40), (50, 10, 60, 40)
DOOR, HANDLE, WHEEL = (2, 12, 20, 30), (4, 14, 12, 22), (32, 30, 42, 40)  # on CAR, DOOR and CAR2
SKY_CLASS, CAR_CLASS, DOOR_CLASS, HANDLE_CLASS, WHEEL_CLASS = 2420, 401, 774, 1180, 3034
ITEM = "training/urban/street/ADE_train_00000001"


def union(*boxes: Box) -> dict:
    return encode_mask(np.logical_or.reduce([decode_mask(box_rle(SIZE, box)) for box in boxes]))


def polygon(box: Box) -> list[list[int]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def described(builder: Any, item: Any, task: str) -> tuple[str, list[dict]]:
    """The answer of the first row of a task, with its masks."""
    row = next(row for row in builder.usable_rows(item) if row["task"] == task)
    return row["messages"][1]["content"], row["masks"]


def everything(builder: Any, item: Any) -> dict[tuple[str, str], dict]:
    """(label, label of the owner) -> mask, of the annotations of an item."""
    annotations = builder.record(item)[2]
    labels = {each["id"]: each["label"] for each in annotations}
    return {(each["label"], labels.get(each["parent_id"], "")): each["segmentation"] for each in annotations}


def thing(number: int, name: str, kind: int, level: int = 0, owner: Any = None) -> dict:
    parts = {"hasparts": [], "ispartof": [] if owner is None else owner, "part_level": level}
    return {"id": number, "name": name, "name_ndx": kind, "raw_name": name, "crop": 0, "attributes": [], "parts": parts}


THINGS = [
    thing(0, "sky", SKY_CLASS),
    thing(1, "car, auto, automobile, machine, motorcar", CAR_CLASS),
    thing(2, "car, auto, automobile, machine, motorcar", CAR_CLASS),
    thing(3, "door", DOOR_CLASS, 1, 1),
    thing(5, "wheel", WHEEL_CLASS, 1, 2),
    thing(7, "handle, grip, handgrip, hold", HANDLE_CLASS, 2, 3),  # numbers may have gaps
]


def colours(*regions: tuple[int, int, Box]) -> np.ndarray:
    """A PNG of regions (class, blue, box), as the dataset encodes them."""
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    for kind, blue, (left, top, right, bottom) in regions:
        image[top:bottom, left:right] = (kind // 256 * 10, kind % 256, blue)
    return image


LAYERS = {
    "seg": colours((SKY_CLASS, 85, SKY), (CAR_CLASS, 170, CAR), (CAR_CLASS, 255, CAR2)),
    "parts_1": colours((DOOR_CLASS, 128, DOOR), (WHEEL_CLASS, 255, WHEEL)),
    "parts_2": colours((HANDLE_CLASS, 255, HANDLE)),
}


@pytest.fixture
def ade(tmp_path: Path) -> Callable[..., Ade20kParts]:
    def build(
        layers: dict[str, Any] | None = None,
        things: Any = None,
        root: str = "ADE20K_2021_17_01",
        item: str = ITEM,
        **options: Any,
    ) -> Ade20kParts:
        stem = tmp_path / "data" / root / "images/ADE" / item
        stem.mkdir(parents=True)  # the folder of the masks of single instances
        PIL.Image.fromarray(np.zeros(SIZE, np.uint8)).save(stem / f"instance_000_{stem.name}.png")
        PIL.Image.new("RGB", SIZE[::-1]).save(f"{stem}.jpg")
        for name, layer in {**LAYERS, **(layers or {})}.items():
            if layer is not None:
                PIL.Image.fromarray(layer).save(f"{stem}_{name}.png")
        annotation = {"filename": f"{stem.name}.jpg", "imsize": [*SIZE, 3], "object": things or THINGS}
        text = things if isinstance(things, str) else json.dumps({"annotation": annotation})
        Path(f"{stem}.json").write_text(text, encoding="utf-8")
        return Ade20kParts(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), **options)

    return build


@pytest.mark.parametrize("root", ["", "ADE20K_2021_17_01", "ade20k"])
def test_objects_parts_and_parts_of_parts_of_ade20k(ade: Callable[..., Ade20kParts], root: str) -> None:
    builder = ade(root=root)
    assert builder.split_items() == {"train": [ITEM]}
    rows = builder.usable_rows(ITEM)
    assert rows[0] == {
        "image": str(builder.data_dir / root / "images/ADE" / f"{ITEM}.jpg"),
        "image_id": "ADE_train_00000001",
        "source": "ade20k_parts",
        "task": "referring",
        "messages": [
            {"role": "user", "content": "<image>\nshow wheel"},
            {"role": "assistant", "content": "Certainly, <p> wheel </p> [SEG]."},
            {"role": "user", "content": "Help me find the cars and the handle in this photograph."},
            {"role": "assistant", "content": "Sure, <p> the cars </p> [SEG] and <p> the handle </p> [SEG]."},
            {"role": "user", "content": "Thanks. And the car's door"},
            {"role": "assistant", "content": "Here you go: <p> the car's door </p> [SEG]."},
            {"role": "user", "content": "Make a mask that covers the sky."},
            {"role": "assistant", "content": "Sure, <p> the sky </p> [SEG]."},
        ],
        "masks": [
            box_rle(SIZE, WHEEL),
            union(CAR, CAR2),
            *(box_rle(SIZE, box) for box in (HANDLE, DOOR, SKY)),
        ],
        "regions": [],
        "ignore_mask": box_rle(SIZE, UNLABELLED),
    }
    assert described(builder, ITEM, "panoptic") == (
        "The picture shows <p> two cars </p> [SEG] and <p> the sky </p> [SEG].",
        [union(CAR, CAR2), box_rle(SIZE, SKY)],
    )
    assert described(builder, ITEM, "fine") == (
        "Looking closely at the cars, I see <p> the door </p> [SEG] and <p> the wheel </p> [SEG].",
        [box_rle(SIZE, DOOR), box_rle(SIZE, WHEEL)],
    )
    assert everything(builder, ITEM) == {
        ("sky", ""): box_rle(SIZE, SKY),
        ("car", ""): box_rle(SIZE, CAR2),  # the last of both cars
        ("door", "car"): box_rle(SIZE, DOOR),
        ("wheel", "car"): box_rle(SIZE, WHEEL),
        ("handle", "door"): box_rle(SIZE, HANDLE),
    }
    assert builder.skipped == {}


def test_the_owner_is_of_a_class_that_the_json_gives(ade: Callable[..., Ade20kParts]) -> None:
    # Most of the wheel lies on the sky, but wheels belong to cars.
    wheel = (2, 0, 20, 15)
    builder = ade({"parts_1": colours((WHEEL_CLASS, 255, wheel)), "parts_2": None})
    builder.split_items()
    assert everything(builder, ITEM)["wheel", "car"] == box_rle(SIZE, wheel)
    owners = {each["parent_id"] for each in builder.record(ITEM)[2] if each["level"] == "part"}
    (car,) = (each for each in builder.record(ITEM)[2] if each["id"] in owners)
    assert car["segmentation"] == box_rle(SIZE, CAR)


def test_parts_of_an_object_that_is_there_are_not_denied(ade: Callable[..., Ade20kParts]) -> None:
    # Not every car had its parts labelled.
    builder = ade()
    builder.split_items()
    scene = read_scene(*builder.record(ITEM)[1:])
    builder._vocabulary = {"ade20k_parts": {Label("bed"): 1, Label("hood", "car"): 1, Label("leg", "bed"): 1}}
    assert builder.deniable({}, scene) == {"ade20k_parts": {Label("bed"): 1, Label("leg", "bed"): 1}}


def test_the_vocabulary_of_ade20k_comes_from_the_json(ade: Callable[..., Ade20kParts]) -> None:
    builder = ade()
    builder.split_items()
    labels = [Label("car"), Label("door", "car"), Label("handle", "door"), Label("sky"), Label("wheel", "car")]
    assert builder._vocabulary == {"ade20k_parts": dict.fromkeys(labels, 1)}


@pytest.mark.parametrize(
    ("layers", "things", "reason"),
    [
        ({"seg": np.zeros(SIZE, np.uint8)}, None, "label image holds no colours"),
        ({"seg": colours()}, None, "label image without a labelled pixel"),
        ({"seg": None}, None, "label image is missing"),
        ({"parts_1": np.zeros((5, 5, 3), np.uint8)}, None, "part image differs in size from the label image"),
        (
            {"seg": np.full((20, 20, 3), 10, np.uint8), "parts_1": None},
            [thing(0, "x", 266)],
            "image size differs from its annotation",
        ),
        (None, "{", "annotation file is not valid JSON or too large"),
        (None, '{"annotation": {}}', "missing field 'object'"),
        (
            {"parts_1": colours()},
            [THINGS[0], {**THINGS[1], "parts": None}],
            "malformed annotation (TypeError: 'NoneType' object is not subscriptable)",
        ),
    ],
)
def test_a_broken_image_of_ade20k_is_skipped(
    ade: Callable[..., Ade20kParts], layers: Any, things: Any, reason: str
) -> None:
    builder = ade(layers, things)
    builder.split_items()
    assert builder.usable_rows(ITEM) == []
    assert builder.skipped == {reason: 1}


def test_broken_regions_of_ade20k_are_left_out(ade: Callable[..., Ade20kParts]) -> None:
    things = [each for each in THINGS if each["name"] not in ("sky", "wheel")]
    builder = ade({}, things)
    builder.split_items()
    rows = builder.usable_rows(ITEM)
    assert set(everything(builder, ITEM)) == {("car", ""), ("door", "car"), ("handle", "door")}
    assert rows[0]["ignore_mask"] == union(SKY, UNLABELLED)
    assert builder.skipped == {"class of the label image is not in the JSON": 2, "part without its owner": 2}


def test_real_images_of_ade20k(tmp_path: Path) -> None:
    sample = FORMATS / "ade20k_2021/dataset/ADE20K_2021_17_01"
    if not sample.is_dir():
        pytest.skip("the real samples are not at ../shared/data/formats")
    shutil.copytree(sample, tmp_path / "data/ADE20K_2021_17_01")
    builder = Ade20kParts(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"))
    items = builder.split_items()["train"]
    assert items == [f"training/urban/street/ADE_train_000{number}" for number in (16869, 16900, 16964)]
    assert builder.usable_rows(items[2]) and not builder.skipped

    # Against the JSON and the masks of single instances, whose visible pixels are 255.
    folder = sample / "images/ADE/training/urban/street"
    things = dict(enumerate(json.loads((folder / "ADE_train_00016964.json").read_text())["annotation"]["object"]))
    annotations = builder.record(items[2])[2]
    maps = {level: np.full((1467, 2200), len(annotations)) for level in ("object", "part")}
    for each in annotations:
        maps[each["level"]][decode_mask(each["segmentation"])] = each["id"]
    found = {}
    for number, thing in things.items():
        visible = np.asarray(PIL.Image.open(folder / thing["instance_mask"])) == 255
        covered = np.bincount(maps["part" if thing["parts"]["part_level"] else "object"][visible])
        found[number] = annotations[covered.argmax()]
        assert found[number]["label"] == thing["name"].split(",")[0]
        assert covered.max() >= 0.99 * max(visible.sum(), decode_mask(found[number]["segmentation"]).sum())
    parts = {number: thing["parts"]["ispartof"] for number, thing in things.items() if thing["parts"]["part_level"]}
    assert all(found[part]["parent_id"] == found[owner]["id"] for part, owner in parts.items())
    assert (len(annotations), len(things), len(parts)) == (32, 32, 8)


PACO_CATEGORIES = ["car_(automobile)", "car_(automobile):wheel", "trash_can", "dog", "trash_can:lid", "mug"]
PASCAL_CATEGORIES = ["dog:head", "dog:leg", "cat:head", "cat:tail"]


def annotation(number: int, category: int, box: Any, owner: int | None = None) -> dict:
    segmentation = polygon(box) if isinstance(box, tuple) else box
    result = {"id": number, "image_id": 9, "category_id": category, "segmentation": segmentation, "area": 1.0}
    return result if owner is None else {**result, "obj_ann_id": owner}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., PartAnnotations]:
    """Writes the original layout of PACO-LVIS or PASCAL-Part with the image 9, and returns the builder."""

    def build(
        kind: type[PartAnnotations],
        annotations: list[dict],
        *,
        file: str | None = None,
        images: str | None = None,
        image: dict | None = None,
        **options: Any,
    ) -> PartAnnotations:
        paco = kind is PacoLvis
        data = tmp_path / "data"
        path = data / (
            file or ("vlpart/paco/annotations/paco_lvis_v1_train.json" if paco else "vlpart/pascal_part/train.json")
        )
        path.parent.mkdir(parents=True)
        default = "coco" if paco else "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"
        folder = data / (default if images is None else images)
        name = "train2017/000000000009.jpg" if paco else "2008_000009.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", SIZE[::-1]).save(folder / name)
        names = PACO_CATEGORIES if paco else PASCAL_CATEGORIES
        content = {
            "images": [{"id": 9, "file_name": name, "height": SIZE[0], "width": SIZE[1], **(image or {})}],
            "annotations": annotations,
            "categories": [{"id": number, "name": each} for number, each in enumerate(names, start=1)],
        }
        path.write_text(json.dumps(content))
        return kind(cache_dir=str(tmp_path / "cache"), data_dir=str(data), **options)

    return build


PACO = [
    annotation(100, 1, CAR, 100),
    annotation(101, 1, CAR2, 101),
    annotation(102, 2, DOOR, 100),
    annotation(103, 2, WHEEL, 101),
    annotation(104, 3, UNLABELLED, 104),
]
TRAIN = ("train", 9)
NO_SPLITS = {f"split {split} without annotations or images": 1 for split in ("validation", "test")}


@pytest.mark.parametrize(
    ("file", "images"),
    [
        (None, None),  # LISA, MGLMM
        ("Semantic_Segm/paco_lvis/annotations/paco_lvis_v1_train.json", "coco_2017"),  # GLaMM
        ("annotations/paco_lvis_v1_train.json", ""),
    ],
)
def test_instances_of_paco_are_united(write: Callable[..., PartAnnotations], file: Any, images: Any) -> None:
    # Published code asks "wheel of the car" with one of two masks.
    builder = write(PacoLvis, PACO, file=file, images=images)
    assert builder.split_items() == {"train": [TRAIN]}
    assert described(builder, TRAIN, "panoptic") == (
        "The picture shows <p> two cars </p> [SEG] and <p> a trash can </p> [SEG].",
        [union(CAR, CAR2), box_rle(SIZE, UNLABELLED)],
    )
    assert described(builder, TRAIN, "fine") == (
        "Of the cars one can see <p> the wheels </p> [SEG].",
        [union(DOOR, WHEEL)],
    )
    assert builder.skipped == NO_SPLITS


def test_only_verified_labels_of_paco_are_denied(write: Callable[..., PartAnnotations]) -> None:
    builder = write(PacoLvis, PACO, image={"neg_category_ids": [4, 5, 77]})
    builder.split_items()
    builder._vocabulary = {
        "paco_lvis": {Label("dog"): 3, Label("mug"): 9, Label("lid", "trash can"): 2, Label("car"): 4}
    }
    image = builder.record(TRAIN)[1]
    assert builder.deniable(image, None) == {"paco_lvis": {Label("dog"): 3, Label("lid", "trash can"): 2}}


def test_labels_that_are_not_exhaustive_are_not_asked_for(write: Callable[..., PartAnnotations]) -> None:
    builder = write(PacoLvis, PACO, image={"not_exhaustive_category_ids": [1]}, variants=9)
    builder.split_items()
    rows = builder.usable_rows(TRAIN)
    assert {json.dumps(mask) for row in rows for mask in row["masks"]} == {json.dumps(box_rle(SIZE, UNLABELLED))}
    assert not re.search(r"\bcars?\b", json.dumps([row["messages"] for row in rows]))
    assert builder.skipped == {**NO_SPLITS, "part of a label that is not annotated exhaustively": 2}


def test_parts_of_pascal_have_no_object_to_ask_for(write: Callable[..., PartAnnotations]) -> None:
    annotations = [annotation(1, 1, DOOR), annotation(2, 2, WHEEL), annotation(3, 2, UNLABELLED), annotation(4, 3, SKY)]
    builder = write(PascalPart, annotations, variants=5)
    assert builder.split_items() == {"train": [TRAIN]}
    rows = builder.usable_rows(TRAIN)
    assert {row["task"] for row in rows} == {"referring", "fine"}
    assert described(builder, TRAIN, "fine") == (
        "Of the dog one can see <p> the head </p> [SEG] and <p> the legs </p> [SEG].",
        [box_rle(SIZE, DOOR), union(WHEEL, UNLABELLED)],
    )
    head, legs, head_of_cat = box_rle(SIZE, DOOR), union(WHEEL, UNLABELLED), box_rle(SIZE, SKY)
    one_leg = box_rle(SIZE, WHEEL), box_rle(SIZE, UNLABELLED)
    assert all(mask in (head, legs, head_of_cat, *one_leg) for row in rows for mask in row["masks"])
    assert builder._vocabulary == {
        "pascal_part": {Label("head", "cat"): 1, Label("head", "dog"): 1, Label("leg", "dog"): 1}
    }


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (annotation(1, 2, CAR, 77), "part without its object"),
        (annotation(1, 2, CAR), "part without its object"),
        (annotation(1, 99, CAR, 1), "category is not listed"),
        (annotation(1, 4, [], 1), "empty segmentation"),
        (annotation(1, 4, [[1, 2, 3]], 1), "polygon of fewer than three points"),
        (annotation(1, 4, {"size": [9, 9], "counts": "1"}, 1), "mask size differs from the image size"),
    ],
)
def test_a_broken_annotation_of_paco_is_left_out(
    write: Callable[..., PartAnnotations], broken: dict, reason: str
) -> None:
    builder = write(PacoLvis, [broken, PACO[4]])
    builder.split_items()
    assert described(builder, TRAIN, "panoptic") == (
        "The picture shows <p> a trash can </p> [SEG].",
        [box_rle(SIZE, UNLABELLED)],
    )
    assert builder.skipped == {**NO_SPLITS, reason: 1}


@pytest.mark.parametrize(
    ("image", "annotations", "reason"),
    [
        ({"file_name": "../secret.jpg"}, PACO, "image file name leads out of the data folder"),
        ({"file_name": "train2017/gone.jpg"}, PACO, "image file is missing"),
        ({}, [], "image without a usable annotation"),
    ],
)
def test_a_broken_image_of_paco_is_skipped(
    write: Callable[..., PartAnnotations], image: dict, annotations: list, reason: str
) -> None:
    builder = write(PacoLvis, annotations, image=image)
    builder.split_items()
    assert builder.usable_rows(TRAIN) == []
    assert builder.skipped == {**NO_SPLITS, reason: 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("trash_can", ("trash can", "")),  # published code keeps the underscore
        ("drum_(musical_instrument):inner_side", ("drum", "inner side")),
    ],
)
def test_names_of_categories(name: str, expected: tuple[str, str]) -> None:
    assert category_names(name) == expected
