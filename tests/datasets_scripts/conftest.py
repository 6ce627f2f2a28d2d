import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.attributes import describe_colours
from mglmm.datasets_scripts.builder import UscdfBuilder, make_row
from mglmm.datasets_scripts.hierarchical_coco import HierarchicalCoco
from mglmm.datasets_scripts.scene import AbsentLabels, read_scene
from mglmm.datasets_scripts.scene_builder import benchmark_turns, training_turns
from mglmm.processing.rle import encode_mask

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "photos"


def box_rle(size: tuple[int, int], box: tuple[int, int, int, int]) -> dict:
    """The RLE of a filled box (xyxy, exclusive) in an image of size (height, width)."""
    mask = np.zeros(size, dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return encode_mask(mask)


def polygon(box: tuple[int, int, int, int]) -> list[int]:
    """The outline of a box (xyxy) as COCO writes polygons."""
    left, top, right, bottom = box
    return [left, top, right, top, right, bottom, left, bottom]


def scene_rows(
    image,
    annotations,
    *,
    vocabulary,
    seed: int = 0,
    variants: int = 1,
    benchmark: bool = False,
    path: Path | None = None,
) -> list[dict]:
    """The rows of one record, without the columns `image` and `ignore_mask`; with the colours of the picture at `path`."""
    scene = read_scene(image, annotations)
    if path is not None:
        scene = describe_colours(scene, path)
    absent = AbsentLabels(scene, vocabulary)

    def generator(*key: object) -> random.Random:
        return random.Random("/".join(map(str, (seed, image["source"], image["file_name"], *key))))

    if benchmark:
        tasks = benchmark_turns(scene, absent, generator)
    else:
        tasks = training_turns(scene, absent, generator, variants, regions=True)
    size = image["height"], image["width"]
    rows = [make_row(Path("x"), image["id"], image["source"], task, turns, size=size) for task, turns in tasks]
    return [{key: row[key] for key in row if key not in ("image", "size", "ignore_mask")} for row in rows]


def annotation(number: int, image: int, label: str, level: str, parent: int | None, size, box) -> dict:
    return {
        "id": number,
        "image_id": image,
        "label": label,
        "level": level,
        "parent_id": parent,
        "segmentation": box_rle(size, box),
    }


@pytest.fixture
def tiny_content() -> dict:
    """Three images, height 40 and width 60: a dressed person, a park in train, and a car in val."""
    size = (40, 60)
    images = [
        ("person.jpg", "fashion", "train"),
        ("park.jpg", "scenes", "train"),
        ("car.jpg", "cars", "val"),
        ("car2.jpg", "cars", "train"),
    ]
    return {
        "images": [
            {"id": index, "file_name": name, "width": 60, "height": 40, "source": source, "split": split}
            for index, (name, source, split) in enumerate(images, 1)
        ],
        "annotations": [
            annotation(1, 1, "person", "object", None, size, (20, 0, 40, 40)),
            annotation(2, 1, "hair", "part", 1, size, (25, 0, 35, 8)),
            annotation(3, 1, "coat", "part", 1, size, (20, 10, 40, 24)),
            annotation(4, 1, "jeans", "part", 1, size, (22, 24, 38, 36)),
            annotation(5, 1, "ring", "part", 1, size, (20, 20, 22, 22)),  # 4 pixels: too small to ask for
            annotation(6, 1, "bag", "object", None, size, (42, 15, 52, 30)),
            annotation(7, 2, "sky-other-merged", "stuff", None, size, (0, 0, 60, 15)),
            annotation(8, 2, "grass-merged", "stuff", None, size, (0, 15, 60, 40)),
            annotation(9, 2, "dog", "object", None, size, (5, 20, 15, 30)),
            annotation(10, 2, "dog", "object", None, size, (45, 20, 55, 30)),
            annotation(11, 3, "car", "object", None, size, (5, 10, 55, 35)),
            annotation(12, 3, "hood", "part", 11, size, (5, 12, 20, 20)),
            annotation(13, 3, "wheel", "part", 11, size, (10, 28, 17, 35)),
            annotation(14, 3, "wheel", "part", 11, size, (40, 28, 47, 35)),
            annotation(15, 4, "car", "object", None, size, (5, 10, 55, 35)),
            annotation(16, 4, "trunk", "part", 15, size, (5, 12, 20, 20)),
            annotation(17, 4, "front glass", "part", 15, size, (25, 12, 40, 20)),
        ],
    }


@pytest.fixture
def tiny_dataset(tmp_path: Path, tiny_content: dict) -> Path:
    """The data folder of `tiny_content`, on disk."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for image in tiny_content["images"]:
        PIL.Image.new("RGB", (60, 40), (90, 120, 30)).save(folder / "images" / image["file_name"])
    (folder / "annotations.json").write_text(json.dumps(tiny_content))
    return folder


@pytest.fixture
def hierarchical(tmp_path: Path) -> Callable[..., HierarchicalCoco]:
    """The builder of a data folder."""

    def build(data_dir: Path, **options: Any) -> HierarchicalCoco:
        return HierarchicalCoco(cache_dir=str(tmp_path / "cache"), data_dir=str(data_dir), **options)

    return build


@pytest.fixture
def write_family(tmp_path: Path) -> Callable[..., UscdfBuilder]:
    """Writes JSON files and empty images of height 40 and width 60, and returns the builder of a family."""

    def build(
        kind: type[UscdfBuilder],
        files: dict[str, Any],
        *images: str,
        size: tuple[int, int] = (40, 60),
        **options: Any,
    ) -> UscdfBuilder:
        for name in images:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", size[::-1]).save(path)
        for name, content in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return kind(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), **options)

    return build


@pytest.fixture(scope="session")
def photos() -> Path:
    if not (PHOTOS / "annotations.json").is_file():
        pytest.skip("the real photographs are not at ../shared/data/photos")
    return PHOTOS
