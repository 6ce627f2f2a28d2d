import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.semantic import Ade20k, ClassMaps, CocoStuff, MapillaryVistas, vistas_name
from mglmm.processing.rle import decode_mask, encode_mask
from tests.datasets_scripts.conftest import box_rle

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
SIZE = (40, 60)
TOP, LEFT, RIGHT = (0, 0, 60, 15), (0, 15, 20, 40), (20, 15, 60, 40)
VISTAS = [
    ("void--unlabeled", "Unlabeled", False),
    ("object--vehicle--car", "Car", True),
    ("object--traffic-sign--front", "Traffic Sign (Front)", True),
    ("object--traffic-sign--back", "Traffic Sign (Back)", True),
    ("nature--sky", "Sky", False),
    ("human--rider--other-rider", "Other Rider", True),
]


def pixels(*boxes: tuple[int, tuple[int, int, int, int]], fill: int = 0) -> np.ndarray:
    values = np.full(SIZE, fill, dtype=np.uint8)
    for value, (left, top, right, bottom) in boxes:
        values[top:bottom, left:right] = value
    return values


LAYOUTS: dict[type[ClassMaps], tuple[str, str]] = {
    Ade20k: ("annotations/{training,validation}", "images/{training,validation}"),
    CocoStuff: ("cocostuff/{train2017,val2017}", "coco/{train2017,val2017}"),
    MapillaryVistas: ("{training,validation}/v2.0/labels", "{training,validation}/images"),
}


def folder_of(pattern: str, split: str) -> str:
    head, _, rest = pattern.partition("{")
    names, _, tail = rest.partition("}")
    return head + names.split(",")[split == "validation"] + tail


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., ClassMaps]:
    """Writes maps, by (split, stem), in the original layout, and returns the builder."""

    def build(
        kind: type[ClassMaps],
        maps: dict[tuple[str, str], Any],
        *,
        root: str = "",
        layout: tuple[str, str] | None = None,
        image_size: tuple[int, int] = SIZE,
        **options: Any,
    ) -> ClassMaps:
        data = tmp_path / "data"
        for (split, stem), values in maps.items():
            folders = [data / root / folder_of(pattern, split) for pattern in layout or LAYOUTS[kind]]
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            if isinstance(values, bytes):
                (folders[0] / f"{stem}.png").write_bytes(values)
            else:
                PIL.Image.fromarray(values).save(folders[0] / f"{stem}.png")
            PIL.Image.new("RGB", image_size[::-1]).save(folders[1] / f"{stem}.jpg")
        if kind is MapillaryVistas:
            labels = [
                {"name": n, "readable": r, "instances": i, "color": [0, 0, 0], "evaluate": True} for n, r, i in VISTAS
            ]
            (data / root / "config_v2.0.json").write_text(json.dumps({"labels": labels, "version": "1.1"}))
        return kind(cache_dir=str(tmp_path / "cache"), data_dir=str(data), **options)

    return build


def described(builder: ClassMaps, item: Any) -> tuple[str, list[dict], dict | None]:
    """The panoptic answer of an item with its masks, and the ignore mask."""
    (row,) = (row for row in builder.usable_rows(item) if row["task"] == "panoptic")
    return row["messages"][1]["content"], row["masks"], row["ignore_mask"]


def asked_labels(builder: ClassMaps, item: Any) -> dict[str, tuple[str, dict]]:
    """Label -> level and mask of the annotations of an item."""
    return {each["label"]: (each["level"], each["segmentation"]) for each in builder.record(item)[2]}


def test_ade20k_rows_are_as_written_here(write: Callable[..., ClassMaps]) -> None:
    # Classes are 1 to 150; 0 is other: ignored.
    builder = write(Ade20k, {("train", "ADE_train_1"): pixels((3, TOP), (21, LEFT), fill=0)})
    item = ("train", "ADE_train_1")
    assert builder.split_items() == {"train": [item]}
    rows = builder.usable_rows(item)
    assert [row["task"] for row in rows] == ["referring", "referring", "panoptic"]
    assert rows[0] == {
        "image": str(builder.data_dir / "images/training/ADE_train_1.jpg"),
        "image_id": "ADE_train_1",
        "source": "ade20k",
        "task": "referring",
        "messages": [
            {"role": "user", "content": "<image>\nsky"},
            {"role": "assistant", "content": "Sure, <p> sky </p> [SEG]."},
            {"role": "user", "content": "Good, now show me the car."},
            {"role": "assistant", "content": "Sure, <p> the car </p> [SEG]."},
            {"role": "user", "content": "Make a stencil of the car on the left."},
            {"role": "assistant", "content": "Sure, <p> the car on the left </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, TOP), box_rle(SIZE, LEFT), box_rle(SIZE, LEFT)],
        "regions": [],
        "ignore_mask": box_rle(SIZE, RIGHT),
    }
    assert builder.skipped == {"split validation without annotations or images": 1}


def test_classes_are_objects_or_stuff(write: Callable[..., ClassMaps]) -> None:
    builder = write(Ade20k, {("train", "x"): pixels((1, TOP), (150, LEFT), (140, RIGHT))})
    builder.split_items()
    assert asked_labels(builder, ("train", "x")) == {
        "wall": ("stuff", box_rle(SIZE, TOP)),
        "flag": ("object", box_rle(SIZE, LEFT)),
        "fan": ("object", box_rle(SIZE, RIGHT)),
    }


def test_the_whole_of_an_ade20k_map_may_be_labelled(write: Callable[..., ClassMaps]) -> None:
    builder = write(Ade20k, {("validation", "x"): pixels((3, TOP), fill=10)}, config_name="benchmark")
    assert builder.split_items() == {"validation": [("validation", "x")]}
    rows = builder.usable_rows(("validation", "x"))
    assert [row["task"] for row in rows] == ["object", "object", "panoptic"]
    assert {row["ignore_mask"] is None for row in rows} == {True}


def test_absent_classes_come_from_other_training_maps(write: Callable[..., ClassMaps]) -> None:
    maps = {("train", "x"): pixels((3, TOP), fill=10), ("train", "y"): pixels((91, TOP), fill=10)}
    builder = write(Ade20k, {**maps, ("validation", "z"): pixels((3, TOP), fill=10)}, config_name="benchmark")
    builder.split_items()
    rows = [row for row in builder.usable_rows(("validation", "z")) if row["task"] == "absent"]
    assert rows and all("plane" in row["messages"][0]["content"] and row["masks"] == [] for row in rows)


def test_coco_stuff_asks_for_hyphenated_classes_too(write: Callable[..., ClassMaps]) -> None:
    # Published code turns the 28 names with a hyphen into void. Pixels are numbers less one: 170 is 171, wall-brick.
    values = pixels((170, TOP), (0, LEFT), (255, RIGHT))
    builder = write(CocoStuff, {("train", "000000000009"): values})
    builder.split_items()
    answer, masks, ignored = described(builder, ("train", "000000000009"))
    assert answer == "The photo contains <p> a brick wall </p> [SEG] and <p> a person </p> [SEG]."
    assert masks == [box_rle(SIZE, TOP), box_rle(SIZE, LEFT)]
    assert ignored == box_rle(SIZE, RIGHT)
    assert {label: level for label, (level, _) in asked_labels(builder, ("train", "000000000009")).items()} == {
        "wall-brick": "stuff",
        "person": "object",
    }


def test_rest_classes_of_coco_stuff_are_void(write: Callable[..., ClassMaps]) -> None:
    # 160 is solid-other, 164 structural-other, 116 floor-stone.
    builder = write(CocoStuff, {("train", "x"): pixels((159, TOP), (163, LEFT), (115, RIGHT))})
    builder.split_items()
    assert asked_labels(builder, ("train", "x")) == {"stone floor": ("stuff", box_rle(SIZE, RIGHT))}
    ignored = builder.record(("train", "x"))[1]["ignore_mask"]
    np.testing.assert_array_equal(decode_mask(ignored), pixels((0, RIGHT), fill=1).astype(bool))
    assert builder.skipped == {"split validation without annotations or images": 1}


def test_names_of_coco_stuff_may_come_from_its_file(write: Callable[..., ClassMaps], tmp_path: Path) -> None:
    builder = write(CocoStuff, {("train", "x"): pixels((0, TOP), (91, LEFT), fill=255)})
    labels = tmp_path / "data/cocostuff/labels.txt"
    labels.write_text("0: unlabeled\n1: pedestrian\n92: flag\n")
    builder.split_items()
    assert asked_labels(builder, ("train", "x")) == {
        "pedestrian": ("object", box_rle(SIZE, TOP)),
        "flag": ("stuff", box_rle(SIZE, LEFT)),
    }
    labels.write_text("person\n")
    with pytest.raises(ValueError, match="a line is not 'number: name': 'person'"):
        builder.split_items()


def test_void_labels_of_vistas_are_ignored_and_like_names_united(write: Callable[..., ClassMaps]) -> None:
    # Published code keeps "Unlabeled" as a class, and takes the first of labels that read alike.
    upper, lower = (0, 15, 20, 30), (0, 30, 20, 40)
    values = pixels((4, TOP), (2, upper), (3, lower), (5, RIGHT), (0, (50, 15, 60, 40)))
    builder = write(MapillaryVistas, {("train", "abc"): values}, root="mapillary")
    builder.split_items()
    answer, masks, ignored = described(builder, ("train", "abc"))
    assert answer == "The picture shows <p> the sky </p> [SEG] and <p> a traffic sign </p> [SEG]."
    assert masks == [box_rle(SIZE, TOP), box_rle(SIZE, LEFT)]
    assert ignored == box_rle(SIZE, RIGHT)
    assert [each["level"] for each in builder.record(("train", "abc"))[2]] == ["object", "stuff"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Bird", "bird"),
        ("Crosswalk - Plain", "plain crosswalk"),
        ("Lane Marking (only) - Dashed Line", "dashed line lane marking"),
        ("Traffic Light - General (Upright)", "traffic light"),
        ("Traffic Light - Pedestrians", "pedestrian traffic light"),
        ("Signage - Ambiguous", "signage"),
        ("Person Group", "group of people"),
        ("Ambiguous Barrier", None),  # a rest class
    ],
)
def test_names_of_vistas_are_said_as_one_would(name: str, expected: str | None) -> None:
    assert vistas_name(name) == expected


@pytest.mark.parametrize(
    ("kind", "root", "layout"),
    [
        (Ade20k, "ade20k", LAYOUTS[Ade20k]),  # LISA, MGLMM
        (Ade20k, "Semantic_Segm/ade20k", LAYOUTS[Ade20k]),  # GLaMM
        (CocoStuff, "", ("cocostuff", "coco/{train2017,val2017}")),  # MGLMM: flat
        (CocoStuff, "Semantic_Segm", ("coco_stuff/{train2017,val2017}", "coco_2017/{train2017,val2017}")),  # GLaMM
        (CocoStuff, "", ("stuffthingmaps/{train2017,val2017}", "{train2017,val2017}")),  # as unpacked
        (MapillaryVistas, "", LAYOUTS[MapillaryVistas]),
        (MapillaryVistas, "Semantic_Segm/mapillary", LAYOUTS[MapillaryVistas]),  # GLaMM
    ],
)
def test_published_layouts_are_found(write: Callable[..., ClassMaps], kind: Any, root: str, layout: Any) -> None:
    builder = write(kind, {("train", "x"): pixels(fill=1)}, root=root, layout=layout)
    assert builder.split_items() == {"train": [("train", "x")]}
    assert builder.usable_rows(("train", "x"))


@pytest.mark.parametrize(
    ("values", "image_size", "reason"),
    [
        (b"\x89PNG", SIZE, "label image cannot be read (UnidentifiedImageError)"),
        (np.zeros((*SIZE, 3), np.uint8), SIZE, "label image holds colours instead of one index per pixel"),
        (pixels(fill=0), SIZE, "label image without a labelled pixel"),
        (pixels(fill=4), (20, 60), "image size differs from its annotation"),
        (
            pixels(fill=4),
            SIZE[::-1],
            "image is EXIF-rotated and its annotation is not: apply the rotation to one of them",
        ),
    ],
)
def test_a_broken_map_is_skipped(
    write: Callable[..., ClassMaps], values: Any, image_size: tuple[int, int], reason: str
) -> None:
    builder = write(Ade20k, {("train", "x"): values}, image_size=image_size)
    builder.split_items()
    assert builder.usable_rows(("train", "x")) == []
    assert builder.skipped[reason] == 1


def test_a_missing_image_and_an_unknown_value_are_counted(write: Callable[..., ClassMaps]) -> None:
    builder = write(Ade20k, {("train", "x"): pixels((151, TOP), fill=4), ("train", "y"): pixels(fill=4)})
    (builder.data_dir / "images/training/y.jpg").unlink()
    builder.split_items()
    assert described(builder, ("train", "x"))[1:] == (
        [encode_mask(pixels(fill=4) == pixels((9, TOP), fill=4))],
        box_rle(SIZE, TOP),
    )
    assert builder.usable_rows(("train", "y")) == []
    assert builder.skipped == {
        "split validation without annotations or images": 1,
        "pixel value that is no class": 1,
        "image file is missing": 1,
    }


def test_real_ade20k_maps(tmp_path: Path) -> None:
    sample = FORMATS / "ade150_sceneparsing" / "sampleData"
    if not sample.is_dir():
        pytest.skip("the real samples are not at ../shared/data/formats")
    for kind in ("annotations", "images"):
        shutil.copytree(sample / kind, tmp_path / "data" / kind / "validation")
    builder = Ade20k(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), config_name="benchmark")
    items = builder.split_items()["validation"]
    assert items == [("validation", f"ADE_val_0000000{number}") for number in (1, 2, 3)]
    for item in items:
        values = np.asarray(PIL.Image.open(sample / "annotations" / f"{item[1]}.png"))
        rows = builder.usable_rows(item)
        assert rows
        expected = {encode_mask(values == value)["counts"] for value in np.unique(values) if value}
        assert {mask["counts"] for row in rows for mask in row["masks"]} <= expected
        assert rows[0]["ignore_mask"] == encode_mask(values == 0)


def test_a_real_palette_map_of_vistas(tmp_path: Path) -> None:
    sample = FORMATS / "mmseg/tests/data/pseudo_mapillary_dataset"
    if not sample.is_dir():
        pytest.skip("the real samples are not at ../shared/data/formats")
    data = tmp_path / "data"
    shutil.copytree(sample / "v2.0", data / "training/v2.0/labels")
    shutil.copytree(sample / "images", data / "training/images")
    labels = [{"name": f"object--{n}", "readable": f"Thing {n}", "instances": True} for n in range(124)]
    (data / "config_v2.0.json").write_text(json.dumps({"labels": labels}))
    builder = MapillaryVistas(cache_dir=str(tmp_path / "cache"), data_dir=str(data))
    (item,) = builder.split_items()["train"]
    assert set(asked_labels(builder, item)) == {"thing 27", "thing 84", "thing 85"}
    assert builder.usable_rows(item)
