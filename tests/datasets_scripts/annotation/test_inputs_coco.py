"""Pictures with masks in COCO's files, as the annotation reads them."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.annotation.image_item import ImageItem
from mglmm.datasets_scripts.annotation.inputs import find_images
from tests.datasets_scripts.annotation.input_files import (
    CAT,
    CAT_RLE,
    DOG,
    DOG_RLE,
    SIZE,
    one,
    shown,
    write_json,
    write_picture,
)
from tests.datasets_scripts.conftest import box_rle, polygon


def coco_content(*annotations: Any, images: Any = None) -> dict[str, Any]:
    return {
        "images": [{"id": 5, "file_name": "a/cat.jpg", "height": 40, "width": 60}] if images is None else images,
        "annotations": list(annotations),
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "wall-other-merged"}, {"id": 3, "name": ""}],
    }


def coco_annotation(number: int, segmentation: Any, category: Any = 1, **change: Any) -> dict[str, Any]:
    return {"id": number, "image_id": 5, "category_id": category, "segmentation": segmentation, "iscrowd": 0, **change}


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., list[ImageItem]]:
    def build(content: Any) -> list[ImageItem]:
        write_picture(tmp_path / "images" / "a" / "cat.jpg")
        file = write_json(tmp_path / "instances.json", content)
        return find_images("coco", file, tmp_path / "images", cache=tmp_path / "cache")

    return build


def test_coco(coco: Callable[..., list[ImageItem]]) -> None:
    uncompressed = {"size": [40, 60], "counts": [0, 40, 2360]}  # the first column
    item = one(
        coco(
            coco_content(
                coco_annotation(1, [polygon(CAT)]),
                coco_annotation(2, uncompressed, 2, iscrowd=1),
                coco_annotation(3, DOG_RLE, 9),
                coco_annotation(4, DOG_RLE, 3),
            )
        )
    )
    info, masks = item.load()
    assert info == {"image_id": "a/cat", "file_name": "a/cat.jpg", "width": 60, "height": 40}
    assert shown(masks) == [
        (1, CAT_RLE, "cat"),
        (2, box_rle(SIZE, (0, 0, 1, 40)), "wall"),
        (3, DOG_RLE, None),  # a category that is not listed
        (4, DOG_RLE, None),  # one without a name
    ]
    assert item.picture().size == (60, 40)


@pytest.mark.parametrize(
    ("segmentation", "reason"),
    [
        ([[1, 1, 5, 5]], "polygon of fewer than three points"),
        ([], "empty segmentation"),
        (None, "segmentation is neither polygons nor RLE but NoneType"),
        ({"size": [40, 60], "counts": "0"}, "broken RLE"),
        (box_rle((60, 40), CAT), "mask size differs from the image size"),
    ],
)
def test_a_broken_annotation_of_coco_leaves_the_others(
    coco: Callable[..., list[ImageItem]], segmentation: Any, reason: str
) -> None:
    item = one(coco(coco_content(coco_annotation(1, segmentation), coco_annotation(2, [polygon(DOG)]))))
    assert [(mask.ann_id, mask.invalid) for mask in item.load()[1]] == [(1, reason), (2, "")]


@pytest.mark.parametrize(
    ("entry", "name", "reason"),
    [
        ({"id": 5, "file_name": "dog.jpg", "height": 40, "width": 60}, "dog", "image file is missing"),
        (
            {"id": 5, "file_name": "../dog.jpg", "height": 40, "width": 60},
            "../dog",
            "image file name leads out of the data folder",
        ),
        ({"id": 5, "file_name": "a/cat.jpg", "height": 60, "width": 40}, "a/cat", "image is EXIF-rotated"),
        ({"id": 5, "file_name": "a/cat.jpg", "width": 40}, "a/cat", "missing field 'height'"),
        ({"id": 5, "height": 40, "width": 60}, "image 5", "missing field 'file_name'"),
        ({"id": 6, "file_name": "a/cat.jpg", "height": 40, "width": 60}, "a/cat", "image without a mask"),
        ("text", "image 0", "malformed annotation (TypeError"),
    ],
)
def test_why_an_image_of_coco_fails(coco: Callable[..., list[ImageItem]], entry: Any, name: str, reason: str) -> None:
    item = one(coco(coco_content(coco_annotation(1, [polygon(CAT)]), images=[entry])))
    assert item.image_id == name
    with pytest.raises(ValueError) as error:
        item.load()
    assert str(error.value).startswith(reason)


def test_only_the_image_of_a_broken_entry_fails(coco: Callable[..., list[ImageItem]]) -> None:
    images = [{"id": 5, "file_name": "a/cat.jpg", "height": 40, "width": 60}, {"id": 6, "file_name": "b.jpg"}]
    items = coco(coco_content(coco_annotation(1, [polygon(CAT)]), images=images))
    assert [item.image_id for item in items] == ["a/cat", "b"]
    assert len(items[0].load()[1]) == 1
    with pytest.raises(ValueError):
        items[1].load()


def test_items_travel_between_processes_and_threads(coco: Callable[..., list[ImageItem]]) -> None:
    item = one(coco(coco_content(coco_annotation(1, [polygon(CAT)]))))
    expected = item.fingerprint(), item.load()
    travelled = pickle.loads(pickle.dumps(item))  # noqa: S301 (our own)
    assert (travelled.fingerprint(), travelled.load()) == expected
    with ThreadPoolExecutor(1) as threads:
        assert (threads.submit(item.fingerprint).result(), threads.submit(item.load).result()) == expected


def test_a_fingerprint_is_that_of_the_image(coco: Callable[..., list[ImageItem]]) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "height": 40, "width": 60} for n in (5, 6)]
    first = [item.fingerprint() for item in coco(coco_content(coco_annotation(1, [polygon(CAT)]), images=images))]
    content = coco_content(coco_annotation(1, [polygon(CAT)]), coco_annotation(2, DOG_RLE, image_id=6), images=images)
    second = [item.fingerprint() for item in coco(content)]
    assert first[0] == second[0] and first[1] != second[1] and first[0] != first[1]
    content["categories"][0]["name"] = "tiger"
    third = [item.fingerprint() for item in coco(content)]
    assert third[0] != second[0]


def test_names_must_be_told_apart(coco: Callable[..., list[ImageItem]]) -> None:
    images = [{"id": n, "file_name": f"cat.{n}", "height": 40, "width": 60} for n in ("jpg", "png")]
    with pytest.raises(ValueError, match="1 images of .* have the name of another one, such as 'cat'"):
        coco(coco_content(images=images))


# ------------------------------------------------------------------ COCO panoptic


def write_panoptic(tmp_path: Path, values: dict[int, tuple[int, int, int, int]], segments: Any) -> ImageItem:
    numbers = np.zeros(SIZE, dtype=np.int64)
    for number, (left, top, right, bottom) in values.items():
        numbers[top:bottom, left:right] = number
    colours = np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], axis=2).astype(np.uint8)
    folder = tmp_path / "annotations" / "panoptic_val"
    folder.mkdir(parents=True)
    PIL.Image.fromarray(colours).save(folder / "cat.png")
    write_picture(tmp_path / "images" / "cat.jpg")
    content = {
        "images": [{"id": 5, "file_name": "cat.jpg", "height": 40, "width": 60}],
        "annotations": [{"image_id": 5, "file_name": "cat.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "sky-other-merged"}],
    }
    file = write_json(tmp_path / "annotations" / "panoptic_val.json", content)
    return one(find_images("coco_panoptic", file, tmp_path / "images", cache=tmp_path / "cache"))


def test_coco_panoptic(tmp_path: Path) -> None:
    segments = [{"id": 70_000, "category_id": 1}, {"id": 3, "category_id": 2}, {"id": 4, "category_id": 2}]
    item = write_panoptic(tmp_path, {70_000: CAT, 3: DOG, 9: (55, 0, 60, 5)}, segments)
    info, masks = item.load()
    assert info["file_name"] == "cat.jpg"
    assert shown(masks) == [
        (70_000, CAT_RLE, "cat"),
        (3, DOG_RLE, "sky"),
        (4, {}, None),
        (9, box_rle(SIZE, (55, 0, 60, 5)), None),  # pixels that are not listed have no name, but a mask
    ]
    assert masks[2].invalid == "segment without a pixel"
    before = item.fingerprint()
    PIL.Image.new("RGB", SIZE[::-1]).save(tmp_path / "annotations" / "panoptic_val" / "cat.png")
    assert item.fingerprint() != before
    (tmp_path / "annotations" / "panoptic_val" / "cat.png").unlink()
    with pytest.raises(ValueError, match="^label image is missing$"):
        item.load()


def test_coco_panoptic_needs_its_pngs(tmp_path: Path) -> None:
    file = write_json(tmp_path / "panoptic.json", coco_content())
    with pytest.raises(FileNotFoundError, match="holds none of panoptic"):
        find_images("coco_panoptic", file, cache=tmp_path / "cache")
