import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.coco import CocoInstances, CocoPanoptic, CocoScenes, read_segment_map
from mglmm.processing.rle import decode_mask, encode_mask
from tests.datasets_scripts.conftest import box_rle

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
SIZE = (40, 60)
SKY, DOG, CAT, CROWD, WALL = (0, 0, 60, 15), (0, 15, 20, 40), (20, 15, 35, 40), (35, 15, 50, 40), (50, 15, 60, 40)
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person", "isthing": 1, "color": [1, 1, 1]},
    {"id": 17, "name": "cat", "supercategory": "animal", "isthing": 1, "color": [2, 2, 2]},
    {"id": 18, "name": "dog", "supercategory": "animal", "isthing": 1, "color": [3, 3, 3]},
    {"id": 175, "name": "wall-brick", "supercategory": "wall", "isthing": 0, "color": [4, 4, 4]},
    {"id": 187, "name": "sky-other-merged", "supercategory": "sky", "isthing": 0, "color": [5, 5, 5]},
]
NO_VALIDATION = {"split validation without annotations or images": 1}


def polygon(box: tuple[int, int, int, int]) -> list[list[int]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def runs(box: tuple[int, int, int, int]) -> dict:
    """The uncompressed RLE of a box over the whole height below its top."""
    left, top, right, _ = box
    counts = [left * SIZE[0] + top]
    for column in range(left, right):
        counts += [SIZE[0] - top, top if column < right - 1 else (SIZE[1] - right) * SIZE[0]]
    return {"size": list(SIZE), "counts": counts}


def union(*boxes: tuple[int, int, int, int]) -> dict:
    return encode_mask(np.logical_or.reduce([decode_mask(box_rle(SIZE, box)) for box in boxes]))


def instance(category: int, segmentation: Any, iscrowd: int = 0) -> dict:
    return {"image_id": 9, "category_id": category, "segmentation": segmentation, "iscrowd": iscrowd, "area": 1.0}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., CocoScenes]:
    """Writes the original layout with the image 9, 40x60, and returns the builder."""

    def build(
        kind: type[CocoScenes],
        annotations: list[dict],
        *,
        segments: np.ndarray | None = None,
        file: str = "annotations/instances_train2017.json",
        images: str = "train2017",
        root: str = "",
        categories: list[dict] = CATEGORIES,
        image: dict | None = None,
        **options: Any,
    ) -> CocoScenes:
        data = tmp_path / "data" / root
        (data / images).mkdir(parents=True)
        (data / file).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", SIZE[::-1]).save(data / images / "000000000009.jpg")
        entry = {"id": 9, "file_name": "000000000009.jpg", "height": SIZE[0], "width": SIZE[1], **(image or {})}
        numbered = [{"id": number, **each} for number, each in enumerate(annotations)]
        content = {"info": {}, "images": [entry], "annotations": numbered, "categories": categories}
        (data / file).write_text(json.dumps(content))
        if segments is not None:
            colours = np.stack([segments // 256**power % 256 for power in range(3)], axis=-1).astype(np.uint8)
            maps = (data / file).with_suffix("")
            maps.mkdir()
            PIL.Image.fromarray(colours).save(maps / "000000000009.png")
        return kind(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), **options)

    return build


@pytest.fixture
def panoptic(write: Callable[..., CocoScenes]) -> Callable[..., CocoScenes]:
    """The same for segments given as number -> (category, iscrowd, box)."""

    def build(segments: dict[int, tuple[int, int, tuple[int, int, int, int]]], **options: Any) -> CocoScenes:
        numbers = np.zeros(SIZE, dtype=np.int64)
        for number, (_, _, (left, top, right, bottom)) in segments.items():
            numbers[top:bottom, left:right] = number
        listed = [
            {"id": number, "category_id": category, "iscrowd": iscrowd, "area": 1, "bbox": [0, 0, 1, 1]}
            for number, (category, iscrowd, _) in segments.items()
        ]
        annotation = {"image_id": 9, "file_name": "000000000009.png", "segments_info": listed}
        options = {"file": "annotations/panoptic_train2017.json", "segments": numbers, **options}
        return write(CocoPanoptic, [options.pop("annotation", annotation)], **options)

    return build


def described(builder: CocoScenes) -> tuple[str, list[dict], dict | None]:
    """The panoptic answer of the image with its masks, and the ignore mask."""
    builder.split_items()
    (row,) = (row for row in builder.usable_rows(("train", 9)) if row["task"] == "panoptic")
    return row["messages"][1]["content"], row["masks"], row["ignore_mask"]


def test_instances_of_a_category_are_one_mask(write: Callable[..., CocoScenes]) -> None:
    builder = write(CocoInstances, [instance(18, polygon(DOG)), instance(18, runs(WALL)), instance(17, polygon(CAT))])
    assert builder.split_items() == {"train": [("train", 9)]}
    rows = builder.usable_rows(("train", 9))
    assert [row["task"] for row in rows] == ["referring", "referring", "referring", "panoptic"]
    assert rows[0] == {
        "image": str(builder.data_dir / "train2017/000000000009.jpg"),
        "image_id": "9",
        "source": "coco_instances",
        "task": "referring",
        "messages": [
            {"role": "user", "content": "<image>\nSeparate the cat and the dogs from the rest of the picture."},
            {"role": "assistant", "content": "The masks show <p> the cat </p> [SEG] and <p> the dogs </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, CAT), union(DOG, WALL)],
        "regions": [],
        "ignore_mask": None,
    }
    assert described(builder) == (
        "The picture shows <p> two dogs </p> [SEG] and <p> a cat </p> [SEG].",
        [union(DOG, WALL), box_rle(SIZE, CAT)],
        None,
    )


def test_a_crowd_is_ignored_and_makes_a_plural(write: Callable[..., CocoScenes]) -> None:
    overlap = (30, 15, 50, 40)  # with the cat, whose pixels count
    builder = write(
        CocoInstances, [instance(1, polygon(DOG)), instance(1, runs(overlap), iscrowd=1), instance(17, polygon(CAT))]
    )
    assert described(builder) == (
        "The picture shows <p> several people </p> [SEG] and <p> a cat </p> [SEG].",
        [union(DOG, overlap), box_rle(SIZE, CAT)],
        box_rle(SIZE, CROWD),
    )


def test_a_label_of_a_crowd_only_is_neither_asked_for_nor_denied(write: Callable[..., CocoScenes]) -> None:
    builder = write(CocoInstances, [instance(17, polygon(CAT)), instance(1, runs(CROWD), iscrowd=1)], variants=20)
    builder.split_items()
    rows = builder.usable_rows(("train", 9))
    words = json.dumps([row["messages"] for row in rows])
    assert "cat" in words and "person" not in words and "people" not in words
    assert {json.dumps(mask) for row in rows for mask in row["masks"]} == {json.dumps(box_rle(SIZE, CAT))}
    assert {json.dumps(row["ignore_mask"]) for row in rows} == {json.dumps(box_rle(SIZE, CROWD))}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (instance(18, []), "empty segmentation"),
        (instance(18, [[1, 1, 5, 5]]), "polygon of fewer than three points"),
        (instance(18, {"size": [60, 40], "counts": "PP1"}), "mask size differs from the image size"),
        (instance(99, polygon(DOG)), "category is not listed"),
        ({"image_id": 9, "category_id": 18}, "missing field 'segmentation'"),
    ],
)
def test_a_broken_instance_is_left_out(write: Callable[..., CocoScenes], broken: dict, reason: str) -> None:
    builder = write(CocoInstances, [broken, instance(17, polygon(CAT))])
    assert described(builder) == ("The picture shows <p> a cat </p> [SEG].", [box_rle(SIZE, CAT)], None)
    assert builder.skipped == {**NO_VALIDATION, reason: 1}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"file_name": "../../secret.jpg"}, "image file name leads out of the data folder"),
        ({"file_name": "gone.jpg"}, "image file is missing"),
        ({"height": 41}, "mask size differs from the image size"),  # of the only mask, so that none is left
        ({"width": "wide"}, "invalid literal for int() with base 10: 'wide'"),
    ],
)
def test_a_broken_image_is_skipped(panoptic: Callable[..., CocoScenes], image: dict, reason: str) -> None:
    builder = panoptic({5: (18, 0, DOG)}, image=image)
    builder.split_items()
    assert builder.usable_rows(("train", 9)) == []
    assert builder.skipped == {**NO_VALIDATION, reason: 1}


@pytest.mark.parametrize("root", ["", "coco"])
def test_panoptic_rows_are_as_written_here(panoptic: Callable[..., CocoScenes], root: str) -> None:
    # Numbers that need all three colours; the cat's box is left unlabelled.
    segments = {7: (187, 0, SKY), 70000: (18, 0, DOG), 300: (18, 0, CROWD), 16777215: (175, 0, WALL)}
    builder = panoptic(segments, root=root)
    answer, masks, ignored = described(builder)
    assert answer == (
        "The image shows <p> two dogs </p> [SEG], <p> the sky </p> [SEG], and <p> a brick wall </p> [SEG]."
    )
    assert masks == [union(DOG, CROWD), box_rle(SIZE, SKY), box_rle(SIZE, WALL)]
    assert ignored == box_rle(SIZE, CAT)
    assert [each["level"] for each in builder.record(("train", 9))[2]] == ["stuff", "object", "object", "stuff"]
    assert builder.skipped == NO_VALIDATION


def test_a_crowd_of_a_panoptic_map_is_ignored(panoptic: Callable[..., CocoScenes]) -> None:
    segments = {1: (187, 0, SKY), 2: (1, 0, DOG), 3: (17, 0, CAT), 4: (1, 1, CROWD), 5: (175, 0, WALL)}
    answer, masks, ignored = described(panoptic(segments))
    assert answer == (
        "The image shows <p> several people </p> [SEG], <p> a cat </p> [SEG], <p> the sky </p> [SEG], "
        "and <p> a brick wall </p> [SEG]."
    )
    assert masks == [union(DOG, CROWD), box_rle(SIZE, CAT), box_rle(SIZE, SKY), box_rle(SIZE, WALL)]
    assert ignored == box_rle(SIZE, CROWD)


def test_segments_that_do_not_fit_the_map_are_left_out(panoptic: Callable[..., CocoScenes]) -> None:
    listed = [{"id": 1, "category_id": 18, "iscrowd": 0}, {"id": 3, "category_id": 17, "iscrowd": 0}]
    annotation = {"image_id": 9, "file_name": "000000000009.png", "segments_info": listed}
    builder = panoptic({1: (18, 0, DOG), 2: (17, 0, CAT)}, annotation=annotation)
    builder.split_items()
    (each,) = builder.record(("train", 9))[2]
    assert each["segmentation"] == box_rle(SIZE, DOG)
    assert builder.skipped == {
        **NO_VALIDATION,
        "segment without a pixel": 1,
        "pixels of a segment that is not listed": 1,
    }


def test_a_panoptic_image_without_segments_is_skipped(panoptic: Callable[..., CocoScenes]) -> None:
    builder = panoptic({}, annotation={"image_id": 9, "file_name": "000000000009.png", "segments_info": []})
    builder.split_items()
    assert builder.usable_rows(("train", 9)) == []
    assert builder.skipped == {**NO_VALIDATION, "image without a segment": 1}


def test_the_detection_format_gives_the_same(write: Callable[..., CocoScenes]) -> None:
    # What the published training code reads: its categories lack `isthing`.
    categories = [{key: each[key] for key in ("id", "name", "supercategory")} for each in CATEGORIES]
    annotations = [
        instance(187, box_rle(SIZE, SKY)),
        instance(18, box_rle(SIZE, DOG)),
        instance(175, box_rle(SIZE, WALL)),
    ]
    file = "cocopanoptic/annotations/panoptic_train2017_detection_format.json"
    builder = write(CocoPanoptic, annotations, file=file, categories=categories, images="coco/train2017")
    answer, masks, ignored = described(builder)
    assert answer == ("The image shows <p> a dog </p> [SEG], <p> the sky </p> [SEG], and <p> a brick wall </p> [SEG].")
    assert masks == [box_rle(SIZE, DOG), box_rle(SIZE, SKY), box_rle(SIZE, WALL)]
    assert ignored == union(CAT, CROWD)
    assert [each["level"] for each in builder.record(("train", 9))[2]] == ["stuff", "object", "stuff"]


def test_a_label_whose_only_mask_is_broken_is_not_denied(write: Callable[..., CocoScenes]) -> None:
    builder = write(CocoInstances, [instance(18, []), instance(17, polygon(CAT))], variants=20)
    builder.split_items()
    assert "dog" not in json.dumps([row["messages"] for row in builder.usable_rows(("train", 9))])


def test_a_grey_image_is_no_segment_map(tmp_path: Path) -> None:
    PIL.Image.new("L", (5, 5)).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match="label image holds no colours"):
        read_segment_map(tmp_path / "x.png")


def test_real_panoptic_maps_agree_with_the_detection_format(tmp_path: Path) -> None:
    sample = FORMATS / "panopticapi" / "sample_data"
    if not sample.is_dir():
        pytest.skip("the real samples are not at ../shared/data/formats")
    builders = []
    for name, file in (("png", "panoptic_examples"), ("rle", "panoptic_coco_detection_format")):
        data = tmp_path / name
        shutil.copytree(sample / "input_images", data / "val2017")
        (data / "annotations").mkdir()
        if name == "png":
            shutil.copytree(sample / file, data / "annotations/panoptic_val2017")
            shutil.copy(sample / f"{file}.json", data / "annotations/panoptic_val2017.json")
        else:
            shutil.copy(sample / f"{file}.json", data / "annotations/panoptic_val2017_detection_format.json")
        builders.append(CocoPanoptic(cache_dir=str(tmp_path / "cache"), data_dir=str(data), config_name="benchmark"))
    segments = json.loads((sample / "panoptic_examples.json").read_bytes())["annotations"]
    assert [builder.split_items() for builder in builders] == [
        {"validation": [("validation", 142238), ("validation", 439180)]}
    ] * 2
    for number, entry in zip((142238, 439180), segments, strict=True):
        annotations = builders[0].record(("validation", number))[2]
        areas = [int(decode_mask(each["segmentation"]).sum()) for each in annotations]
        assert areas == [segment["area"] for segment in entry["segments_info"]]
        rows = [builder.usable_rows(("validation", number)) for builder in builders]
        assert rows[0] and len(rows[0]) == len(rows[1])
        for left, right in zip(*rows, strict=True):
            assert {**left, "image": ""} == {**right, "image": ""}
    assert [builder.skipped["missing field 'segmentation'"] for builder in builders] == [0, 0]


def test_real_rles_of_instances(tmp_path: Path) -> None:
    sample = FORMATS / "cocoapi" / "results" / "instances_val2014_fakesegm100_results.json"
    if not sample.is_file():
        pytest.skip("the real samples are not at ../shared/data/formats")
    results = [each for each in json.loads(sample.read_bytes()) if each["image_id"] in (42, 73, 74)]
    sizes = {each["image_id"]: each["segmentation"]["size"] for each in results}
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    (data / "val2017").mkdir()
    images = []
    for number, (height, width) in sizes.items():
        images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": height, "width": width})
        PIL.Image.new("RGB", (width, height)).save(data / "val2017" / images[-1]["file_name"])
    categories = [{"id": n, "name": f"thing {n}"} for n in {each["category_id"] for each in results}]
    annotations = [{"id": n, "iscrowd": 0, **each} for n, each in enumerate(results)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (data / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    builder = CocoInstances(cache_dir=str(tmp_path / "cache"), data_dir=str(data))
    for item in builder.split_items()["validation"]:
        assert builder.usable_rows(item)
        kept = [each["segmentation"] for each in results if each["image_id"] == item[1]]
        assert [each["segmentation"] for each in builder.record(item)[2]] == kept
