"""
Data of your own -> USCDF rows.

The layout is recognised from what the data folder holds, or each of its split folders `train`, `val` (or `validation`) and
`test`; without them everything is train, unless the name of a COCO or JSONL file names a split (`instances_val.json`,
`test.jsonl`). The first that fits:

1. JSONL: a `*.jsonl` file. Each line is a row: `image` (path below the data folder), `question`, `answer` with its tags,
   `masks`, one for each `[SEG]`: COCO RLE, polygons, or the path of a PNG that is not zero where the mask is; optionally
   `task` ("referring" with masks and "conversation" without if it is not given).
2. COCO: a `*.json` file, there or in `annotations/`, with `images` (`id`, `file_name`, `width`, `height`), `annotations`
   (`image_id`, `category_id`, `segmentation`; optionally `iscrowd`) and `categories` (`id`, `name`; `isthing: 0` marks
   stuff).
3. labelme: `*.json` files, anywhere below, with `shapes` and `imagePath`. Polygons, rectangles, circles and masks count;
   points and lines have no area and are skipped. Shapes with one label and one `group_id` are one object.
4. Masks: `masks/` beside `images/`. `masks/NAME.png` is an index image; `labels.json` ({"1": "hat", ...}) or `labels.txt`
   (line n names value n, the first line value 0) names its values; 0 is background, 255 is unlabelled. A folder
   `masks/NAME/` holds one PNG for each object, called after its label, with a number if there are several: `hat.png`,
   `car_1.png`, `car_2.png`.

Images are looked for in `images/`, beside the annotations, and in the folder of the split.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import IMAGE_TOKEN, SEG_TOKEN

from .builder import Row, make_row
from .conversations import Turn
from .masks import Rle, read_index_image, rle_of, rles_of_values, union
from .scene import Vocabulary, count_labels
from .scene_builder import Record, SceneBuilder, merge_vocabularies
from .sources import MAX_JSON_BYTES, JsonTables, displayed_size, inside, read_json

SPLITS = {"train": "train", "val": "validation", "validation": "validation", "valid": "validation", "test": "test"}
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
BACKGROUND, UNLABELLED = 0, 255
SOURCE = "custom"
Key = tuple[int, Any]  # number of the layout, and the layout's own key


class Custom(SceneBuilder):
    SOURCE = SOURCE
    LICENSE = "unknown"

    def items(self) -> dict[str, Sequence[Key]]:
        self._layouts: list[_Layout] = []
        splits: dict[str, list[Key]] = {}
        folders = {self.data_dir / name: split for name, split in SPLITS.items() if (self.data_dir / name).is_dir()}
        # `images/` and `masks/` in the data folder itself win over folders that are called train, which may hold images.
        found = _layouts_of(self.data_dir, "train", self.data_dir, self.tables)
        if not found:
            found = [
                layout
                for folder, split in folders.items()
                for layout in _layouts_of(folder, split, self.data_dir, self.tables)
            ]
        if not found:
            raise FileNotFoundError(
                f"{self.data_dir} holds no JSONL, no COCO or labelme JSON and no folder masks/: see docs/own_data.md"
            )
        for number, layout in enumerate(found):
            self._layouts.append(layout)
            splits.setdefault(layout.split, []).extend((number, key) for key in layout.keys())
        return {split: splits[split] for split in dict.fromkeys(SPLITS.values()) if split in splits}

    def vocabulary(self) -> Vocabulary:
        return merge_vocabularies(self._label_counts())

    def _label_counts(self) -> Iterator[Vocabulary]:
        for layout in self._layouts:
            if layout.split != "train":
                continue
            for labels in layout.labels():
                try:
                    objects = [_object(number, label, None) for number, label in enumerate(sorted(labels))]
                    yield count_labels([({"source": SOURCE}, objects)])
                except (TypeError, AttributeError, ValueError):
                    continue  # `read` says what is wrong with it

    def record(self, item: Key) -> Record:
        number, key = item
        path, annotations, size, ignore_mask = self._layouts[number].read(key)
        height, width = size
        name = str(path.relative_to(self.data_dir))
        image = {"id": name, "file_name": name, "width": width, "height": height, "source": SOURCE}
        return path, {**image, "ignore_mask": ignore_mask}, annotations

    def rows(self, item: Key) -> Iterator[Row]:
        layout = self._layouts[item[0]]
        if isinstance(layout, _JsonLines):
            yield layout.row(item[1])
        else:
            yield from super().rows(item)


def _layouts_of(folder: Path, split: str, root: Path, tables: Callable[..., JsonTables]) -> list[_Layout]:
    """What lies in one folder; nothing if it is no known layout."""
    if files := sorted(folder.glob("*.jsonl")):
        return [_JsonLines(file, _split_of(file, split), root) for file in files]
    files = sorted([*folder.glob("*.json"), *folder.glob("annotations/*.json")])
    if files := [file for file in files if _looks_like_coco(file)]:
        return [_Coco(file, folder, _split_of(file, split), root, tables) for file in files]
    if (folder / "masks").is_dir():
        return [_Masks(folder, split, root)]
    for name in SPLITS:
        if (folder / name).is_dir():  # labelme files are looked for at any depth, but not across splits
            return []
    if next(folder.rglob("*.json"), None) is not None:
        return [_Labelme(folder, split, root)]
    return []


def _split_of(file: Path, split: str) -> str:
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), split)


def _looks_like_coco(file: Path) -> bool:
    """Whether its first 64 KB or its name promise `images` and `annotations` at the top, without reading it all."""
    with file.open("rb") as stream:
        head = stream.read(2**16)
    return b'"shapes"' not in head and any(f'"{name}"'.encode() in head for name in ("images", "annotations"))


def _find_image(name: str, folders: Sequence[Path], root: Path) -> Path:
    problems = []
    for folder in folders:
        try:
            return inside(root, str(folder.relative_to(root) / name))
        except ValueError as error:
            problems.append(error)
    raise problems[0]


def _object(number: int, label: str, segmentation: Rle | None, level: str = "object", crowd: bool = False) -> dict:
    described = {"id": number, "label": label, "level": level, "parent_id": None}
    return {**described, "segmentation": segmentation, "iscrowd": crowd}


class _Layout:
    """
    One annotation file or folder of one split; `read` gives the image, its annotations, size and ignore mask.

    One broken annotation discards its image: an object that was left out would be called absent.
    """

    split: str

    def keys(self) -> list[Any]:
        raise NotImplementedError

    def labels(self) -> Iterator[set[str]]:
        """Of each image; an image that is broken may be left out."""
        raise NotImplementedError

    def read(self, key: Any) -> tuple[Path, list[dict], tuple[int, int], Rle | None]:
        raise NotImplementedError


class _Coco(_Layout):
    def __init__(self, file: Path, folder: Path, split: str, root: Path, tables: Callable[..., JsonTables]) -> None:
        self.split, self._root = split, root
        self._tables = tables(
            file,
            images=("images.item", "id"),
            annotations=("annotations.item", "image_id"),
            categories=("categories.item", "id"),
        )
        self._categories = dict(self._tables.all("categories"))
        name = file.stem.split("_")[-1]  # "train2017" of instances_train2017.json
        self._folders = [
            parent / below for parent in (folder, root) for below in ("images", f"images/{name}", name, "")
        ]

    def keys(self) -> list[Any]:
        return self._tables.keys("images")

    def labels(self) -> Iterator[set[str]]:
        for key in self.keys():
            found = (self._categories.get(item.get("category_id")) for item in self._tables.get("annotations", key))
            yield {category["name"] for category in found if category and category.get("name")}

    def read(self, key: Any) -> tuple[Path, list[dict], tuple[int, int], Rle | None]:
        image = self._tables.one("images", key)
        path = _find_image(image["file_name"], self._folders, self._root)
        height, width = int(image["height"]), int(image["width"])
        annotations = []
        for number, item in enumerate(self._tables.get("annotations", key)):
            category = self._categories.get(item["category_id"])
            if category is None:
                raise ValueError("category_id is none of the categories")
            rle = rle_of(item["segmentation"], height, width)
            level = "stuff" if category.get("isthing") == 0 else "object"
            annotations.append(_object(number, category["name"], rle, level, bool(item.get("iscrowd"))))
        return path, annotations, (height, width), None


class _Labelme(_Layout):
    def __init__(self, folder: Path, split: str, root: Path) -> None:
        self.split, self._folder, self._root = split, folder, root

    def keys(self) -> list[str]:
        return sorted(str(file.relative_to(self._folder)) for file in self._folder.rglob("*.json"))

    def labels(self) -> Iterator[set[str]]:
        for key in self.keys():
            try:
                yield {shape["label"] for shape in read_json(self._folder / key)["shapes"]}
            except (KeyError, TypeError, ValueError):
                continue  # `read` says what is wrong with it

    def read(self, key: str) -> tuple[Path, list[dict], tuple[int, int], Rle | None]:
        file = self._folder / key
        content = read_json(file)
        if not isinstance(content, dict) or "shapes" not in content:
            raise ValueError("JSON is not of labelme: it has no shapes")
        name = PureWindowsPath(content["imagePath"]).as_posix()  # Windows writes backslashes
        path = inside(self._root, str(file.parent.relative_to(self._root) / name))
        height, width = content.get("imageHeight"), content.get("imageWidth")
        size = (int(height), int(width)) if height and width else displayed_size(path)
        groups: dict[tuple[str, Any], list[Rle]] = {}
        for number, shape in enumerate(content["shapes"]):
            rle = _labelme_rle(shape, *size)
            if rle is not None:
                group = shape.get("group_id")
                groups.setdefault((shape["label"], ("alone", number) if group is None else group), []).append(rle)
        annotations = [_object(n, label, union(rles)) for n, ((label, _), rles) in enumerate(groups.items())]
        return path, annotations, size, None


def _labelme_rle(shape: Mapping[str, Any], height: int, width: int) -> Rle | None:
    """The mask of a shape; none for points and lines."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind == "polygon":
        return rle_of([[value for point in points for value in point]], height, width)
    if kind not in ("rectangle", "circle", "mask"):
        return None
    (x1, y1), (x2, y2) = points
    if kind == "rectangle":
        return rle_of([[x1, y1, x2, y1, x2, y2, x1, y2]], height, width)
    if kind == "circle":  # centre, and a point on the circle
        radius = math.hypot(x2 - x1, y2 - y1)
        turns = [2 * math.pi * step / 72 for step in range(72)]
        circle = [(x1 + radius * math.cos(turn), y1 + radius * math.sin(turn)) for turn in turns]
        return rle_of([[value for point in circle for value in point]], height, width)
    try:
        patch = _bitmap(io.BytesIO(base64.b64decode(shape["mask"], validate=True)))
    except binascii.Error as error:
        raise ValueError("mask of labelme is not base64") from error
    mask = np.zeros((height, width), dtype=bool)
    left, top = round(x1), round(y1)
    if left < 0 or top < 0 or top + patch.shape[0] > height or left + patch.shape[1] > width:
        raise ValueError("mask of labelme leaves the image")
    mask[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return union([encode_mask(mask)])


class _Masks(_Layout):
    def __init__(self, folder: Path, split: str, root: Path) -> None:
        self.split, self._folder, self._root = split, folder, root
        self._names = _index_labels(folder) or _index_labels(root)
        index_image = next((folder / "masks").glob("*.png"), None)
        if index_image is not None and not self._names:
            raise FileNotFoundError(
                f"{folder / 'masks'} holds index images, but neither labels.json nor labels.txt names their values"
            )

    def keys(self) -> list[str]:
        masks = self._folder / "masks"
        return sorted(path.name for path in masks.iterdir() if path.is_dir() or path.suffix.lower() == ".png")

    def labels(self) -> Iterator[set[str]]:
        for key in self.keys():
            try:
                path = self._folder / "masks" / key
                if path.is_dir():
                    yield {_label_of(file) for file in path.glob("*.png")}
                else:
                    yield {self._names[value] for value in np.unique(_index_values(path)) if value in self._names}
            except ValueError:
                continue  # `read` says what is wrong with it

    def _objects(self, key: str) -> Iterator[tuple[str, Rle | Path]]:
        path = self._folder / "masks" / key
        if path.is_dir():
            for file in sorted(path.glob("*.png")):
                yield _label_of(file), file
            return
        values = _index_values(path)
        for value, rle in rles_of_values(values, (BACKGROUND, UNLABELLED)).items():
            if value not in self._names:
                raise ValueError("index image has a value without a label")
            yield self._names[value], rle

    def read(self, key: str) -> tuple[Path, list[dict], tuple[int, int], Rle | None]:
        mask = self._folder / "masks" / key
        stem = key if mask.is_dir() else mask.stem
        suffixes = (*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES))
        names = [f"{stem}{suffix}" for suffix in suffixes if (self._folder / "images" / f"{stem}{suffix}").is_file()]
        path = _find_image(names[0] if names else f"{stem}.jpg", [self._folder / "images"], self._root)
        size, ignore_mask = displayed_size(path), None
        if not mask.is_dir():
            values = _index_values(mask)
            size = values.shape
            if (values == UNLABELLED).any():
                ignore_mask = encode_mask(values == UNLABELLED)
        annotations = []
        for number, (label, found) in enumerate(self._objects(key)):
            # Not isinstance(found, Path): `datasets` puts a Path of its own into modules of builders.
            rle = found if isinstance(found, dict) else _png_rle(found, size)
            annotations.append(_object(number, label, rle))
        return path, annotations, size, ignore_mask


def _label_of(file: Path) -> str:
    return re.sub(r"[ _-]*\d+$", "", file.stem) or file.stem


def _index_labels(folder: Path) -> dict[int, str]:
    if (folder / "labels.json").is_file():
        content = read_json(folder / "labels.json")
        if not isinstance(content, dict) or not all(isinstance(name, str) for name in content.values()):
            raise ValueError(f'{folder / "labels.json"} must be of the form {{"1": "hat", "2": "dog"}}')
        return {int(value): name for value, name in content.items()}
    if (folder / "labels.txt").is_file():
        return dict(enumerate((folder / "labels.txt").read_text(encoding="utf-8-sig").splitlines()))
    return {}


def _index_values(path: Path) -> np.ndarray:
    values = read_index_image(path)
    if values.ndim != 2:
        raise ValueError("index image has colours in place of indices: save it as a grey or palette PNG")
    return values


def _bitmap(file: Path | io.BytesIO) -> np.ndarray:
    """Where a PNG is not black."""
    pixels = read_index_image(file)
    return np.asarray(pixels.any(axis=2) if pixels.ndim == 3 else pixels != 0)


def _png_rle(path: Path, size: tuple[int, int]) -> Rle:
    mask = _bitmap(path)
    if mask.shape != tuple(size):
        raise ValueError("mask size differs from the image size")
    return union([encode_mask(mask)])


class _JsonLines(_Layout):
    def __init__(self, file: Path, split: str, root: Path) -> None:
        self.split, self._file, self._root = split, file, root

    def keys(self) -> list[int]:
        """Where the lines begin, in bytes."""
        offsets, position = [], 0
        with self._file.open("rb") as stream:
            for line in stream:
                if line.strip():
                    offsets.append(position)
                position += len(line)
        return offsets

    def labels(self) -> Iterator[set[str]]:
        return iter(())  # nothing is asked beside what the lines ask

    def row(self, key: int) -> Row:
        with self._file.open("rb") as stream:
            stream.seek(key)
            line = stream.readline(MAX_JSON_BYTES)
        try:
            content = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError("line is not valid JSON") from error
        path = _find_image(content["image"], [self._root, self._file.parent, self._file.parent / "images"], self._root)
        size = displayed_size(path)
        masks = tuple(self._mask(mask, size) for mask in content.get("masks") or [])
        question = content["question"].replace(IMAGE_TOKEN, "").strip()
        task = content.get("task") or ("referring" if masks or SEG_TOKEN in content["answer"] else "conversation")
        name = str(path.relative_to(self._root))
        return make_row(path, name, SOURCE, task, [Turn(question, content["answer"], masks)], size=size)

    def _mask(self, mask: Any, size: tuple[int, int]) -> Rle:
        if isinstance(mask, str):
            return _png_rle(inside(self._root, mask, "mask file"), size)
        return rle_of(mask, *size)
