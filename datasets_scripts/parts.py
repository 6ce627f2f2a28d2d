"""
Objects with their parts -> USCDF rows: full ADE20K, PACO-LVIS and PASCAL-Part.

Layouts, below the data folder or in the sub-folder that published code gives them:

- ADE20K (ADE20K_2021_17_01): `images/ADE/{training,validation}/*/*/` with, for each image, `{x}.jpg`, `{x}_seg.png`,
  `{x}_parts_1.png`, `{x}_parts_2.png` ... and `{x}.json`. The class of a pixel of the PNGs is R // 10 * 256 + G, B tells
  instances apart, class 0 is unlabelled. The JSON's `annotation.object` is a list of `id`, `name` (synonyms after commas),
  `name_ndx` (the class) and `parts` (`part_level`, `ispartof`: the `id` of the owner).
- PACO-LVIS: `paco_lvis_v1_{train,val,test}.json`, images of COCO 2017 by `file_name` (`train2017/...`). The JSON holds `images`
  (`id`, `file_name`, `height`, `width`, `neg_category_ids`, `not_exhaustive_category_ids`), `annotations` (`id`, `image_id`,
  `category_id`, `segmentation`, `obj_ann_id`) and `categories` (`id`, `name` as "object" or "object:part").
- PASCAL-Part (the JSON of VLPart): `pascal_part/{train,val}.json` as PACO-LVIS, but with parts only and without `obj_ann_id`;
  images in `VOCdevkit/VOC2010/JPEGImages/`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from mglmm.processing.rle import encode_mask

from .builder import reason_of
from .conversations import Turn, describe_parts
from .labels import readable
from .layouts import coco_images
from .masks import Rle, read_index_image, rle_of, union
from .scene import AbsentLabels, Label, Scene, Vocabulary
from .scene_builder import Record
from .semantic import CategorisedScenes, LabelledScenes
from .sources import first_existing, inside, read_json
from .targets import Target

ADE_ROOTS = ("", "ADE20K_2021_17_01/", "ade20k/", "dataset/ADE20K_2021_17_01/")
NO_CLASS = 0


class Ade20kParts(LabelledScenes):
    """
    Masks are what is visible of an object, from the PNGs. The owner of a part is the object (or part) below it whose class
    the JSON gives as an owner of such parts. Unlabelled pixels are ignored.
    """

    SOURCE = "ade20k_parts"
    LICENSE = "ADE20K terms of use: non-commercial research and education only"

    def items(self) -> dict[str, Sequence[Any]]:
        root = first_existing(self.data_dir, *(f"{root}{name}" for root in ADE_ROOTS for name in ("images/ADE", "ADE")))
        self._root: Path = root
        # Not `**`: beside each image lies a folder of a mask for every instance, 900,000 files in all.
        self._splits: dict[str, list[Any]] = {
            split: [str(path.relative_to(root).with_suffix("")) for path in sorted(root.glob(f"{folder}/*/*/*.json"))]
            for split, folder in (("train", "training"), ("validation", "validation"))
        }
        return dict(self._splits)

    def labels(self, item: str) -> Iterable[Label]:
        things = self._things(item)
        for thing in things.values():
            owner = things.get(_owner_of(thing))
            if _level_of(thing) == 0:
                yield Label(_readable_name(thing))
            elif owner is not None:
                yield Label(_readable_name(thing), _readable_name(owner))

    def deniable(self, image: Mapping[str, Any], scene: Scene) -> Vocabulary:
        # Only some objects had their parts labelled, so that a missing part tells nothing.
        return {
            source: {label: number for label, number in labels.items() if label.owner not in scene.names}
            for source, labels in self._vocabulary.items()
        }

    def record(self, item: str) -> Record:
        path = inside(self._root, f"{item}.jpg")
        things = self._things(item)
        names = {int(thing["name_ndx"]): _name_of(thing) for thing in things.values()}
        regions, below = _regions(inside(self._root, f"{item}_seg.png", "label image"))
        height, width = below.shape
        numbers = count()
        annotations: list[dict[str, Any]] = []
        found: dict[int, dict[str, Any]] = {}  # the annotation of each code of the level below
        labelled = np.zeros(below.shape, dtype=bool)
        for code, mask in regions:
            label = names.get(code // 256)
            if label is None:
                self.skipped["class of the label image is not in the JSON"] += 1
                continue
            labelled |= mask
            found[code] = _annotation(next(numbers), label, "object", None, encode_mask(mask))
        annotations += found.values()
        if not annotations:
            raise ValueError("label image without a labelled pixel")
        for level in count(start=1):
            if not (self._root / f"{item}_parts_{level}.png").is_file():
                break
            regions, codes = _regions(inside(self._root, f"{item}_parts_{level}.png", "label image"))
            if codes.shape != below.shape:
                raise ValueError("part image differs in size from the label image")
            owners = _owner_classes(things, level)
            parts: dict[int, dict[str, Any]] = {}
            for code, mask in regions:
                owner = _most_below(below[mask], [c for c in found if c // 256 in owners[code // 256]])
                if code // 256 not in names or owner is None:
                    self.skipped["part without its owner"] += 1
                    continue
                parts[code] = _annotation(
                    next(numbers), names[code // 256], "part", found[owner]["id"], encode_mask(mask)
                )
            annotations += parts.values()
            found, below = parts, codes
        image = {"id": path.stem, "file_name": path.name, "height": height, "width": width, "source": self.SOURCE}
        known = frozenset(map(_readable_name, things.values()))
        ignored = None if labelled.all() else encode_mask(~labelled)
        return path, {**image, "known": known, "ignore_mask": ignored}, annotations

    def _things(self, item: str) -> dict[int, Mapping[str, Any]]:
        path = inside(self._root, f"{item}.json", "annotation file")
        try:
            content = read_json(path)
        except ValueError as error:  # which names the file
            raise ValueError("annotation file is not valid JSON or too large") from error
        return {int(thing["id"]): thing for thing in content["annotation"]["object"]}


def _name_of(thing: Mapping[str, Any]) -> str:
    return thing["name"].split(",")[0].strip()


def _readable_name(thing: Mapping[str, Any]) -> str:
    return readable(_name_of(thing)).name


def _level_of(thing: Mapping[str, Any]) -> int:
    return int(thing["parts"]["part_level"])


def _owner_of(thing: Mapping[str, Any]) -> Any:
    """The `id` of the owner; an empty list stands for none."""
    owner = thing["parts"]["ispartof"]
    return None if isinstance(owner, list) else owner


def _owner_classes(things: Mapping[int, Mapping[str, Any]], level: int) -> dict[int, set[int]]:
    """Class of a part -> classes of its owners."""
    classes: dict[int, set[int]] = defaultdict(set)
    for thing in things.values():
        owner = things.get(_owner_of(thing))
        if _level_of(thing) == level and owner is not None:
            classes[int(thing["name_ndx"])].add(int(owner["name_ndx"]))
    return classes


def _regions(path: Path) -> tuple[Iterator[tuple[int, np.ndarray]], np.ndarray]:
    """(code, mask) of each labelled instance, and the codes of all pixels: class * 256 + blue."""
    colours = read_index_image(path)
    if colours.ndim != 3:
        raise ValueError("label image holds no colours")
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    # By columns, as RLE runs: then no mask is transposed to be encoded.
    codes = np.asfortranarray((red // 10 * 256 + green) * 256 + blue)
    present = [int(code) for code in np.unique(codes) if code // 256 != NO_CLASS]
    return ((code, codes == code) for code in present), codes


def _most_below(codes: np.ndarray, candidates: Sequence[int]) -> int | None:
    """The candidate that most of the codes are equal to; `None` if none is."""
    values, counts = np.unique(codes, return_counts=True)
    area = dict(zip(values.tolist(), counts.tolist(), strict=True))
    best = max(candidates, key=lambda code: area.get(code, 0), default=None)
    return best if best in area else None


def _annotation(number: Any, label: str, level: str, parent: Any, rle: Rle, *, asked: bool = True) -> dict[str, Any]:
    return {
        "id": number,
        "label": label,
        "level": level,
        "parent_id": parent,
        "segmentation": rle,
        "asked": asked,
    }


class PartAnnotations(CategorisedScenes):
    """COCO-style JSON whose categories are objects and parts of objects."""

    def category(self, entry: Mapping[str, Any]) -> tuple[str, str]:
        return category_names(entry["name"])

    def labels(self, item: tuple[str, int]) -> Iterable[Label]:
        split, number = item
        annotations = self._sources[split][0].get("annotations", number)
        numbers = {annotation.get("category_id") for annotation in annotations} & self._categories[split].keys()
        return [self.label(split, number) for number in numbers]

    def label(self, split: str, category: int) -> Label:
        owner, part = self._categories[split][category]
        owner = readable(owner).name
        return Label(readable(part).name, owner) if part else Label(owner)

    def read(self, item: tuple[str, int]) -> tuple[Path, dict[str, Any], list[tuple[Mapping[str, Any], Rle, str, str]]]:
        """Path, image, and each usable annotation with its mask and the names of object and part ("" for objects)."""
        split, number = item
        tables, folder = self._sources[split]
        image = tables.one("images", number)
        path = inside(folder, image["file_name"])
        size = int(image["height"]), int(image["width"])
        entries = []
        for annotation in tables.get("annotations", number):
            try:
                owner, part = self._categories[split][annotation["category_id"]]
                entries.append((annotation, rle_of(annotation["segmentation"], *size), owner, part))
            except KeyError as error:
                unknown = error.args == (annotation.get("category_id"),)
                self.skipped["category is not listed" if unknown else reason_of(error)] += 1
            except (TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1
        if not entries:
            raise ValueError("image without a usable annotation")
        known = frozenset(name for label in self.labels(item) for name in label if name)
        return path, {**image, "source": self.SOURCE, "known": known}, entries


def category_names(name: str) -> tuple[str, str]:
    """
    Object and part of a category; what stands in parentheses, which tells apart homonyms, is dropped.

    Example:
        >>> category_names("car_(automobile):wheel"), category_names("trash_can")
        (('car', 'wheel'), ('trash can', ''))
    """
    owner, _, part = (each.replace("_", " ").strip() for each in name.partition(":"))
    return owner.partition(" (")[0], part.partition(" (")[0]


class PacoLvis(PartAnnotations):
    """
    All instances of a label are one mask, where published code asks for one of several with the same words. Of the labels
    that are not annotated exhaustively in an image nothing is asked there, and only verified ones are called absent.
    """

    SOURCE = "paco_lvis"
    LICENSE = "annotations: MIT (PACO), CC-BY-4.0 (LVIS); images: COCO, each under its own Flickr licence"
    SPLITS = {
        split: (
            tuple(
                f"{root}{folder}paco_lvis_v1_{part}.json"
                for root in ("", "vlpart/paco/", "paco/", "Semantic_Segm/paco_lvis/", "paco_lvis/")
                for folder in ("annotations/", "")
            ),
            tuple(
                name
                for part_of_coco in ("train2017", "val2017")
                for name in (*coco_images(part_of_coco), f"Semantic_Segm/coco_2017/{part_of_coco}")
            ),
        )
        for split, part in (("train", "train"), ("validation", "val"), ("test", "test"))
    }

    def items(self) -> dict[str, Sequence[Any]]:
        items = super().items()
        # File names begin with train2017 or val2017: each split has images of both.
        self._sources = {split: (tables, folder.parent) for split, (tables, folder) in self._sources.items()}
        return items

    def deniable(self, image: Mapping[str, Any], scene: Scene) -> Vocabulary:
        verified = image["absent"]
        return {
            source: {label: number for label, number in labels.items() if label in verified}
            for source, labels in self._vocabulary.items()
        }

    def record(self, item: tuple[str, int]) -> Record:
        path, image, entries = self.read(item)
        split = item[0]
        partial = {self._categories[split].get(category) for category in image.get("not_exhaustive_category_ids", ())}
        objects = {each["id"]: (owner, "") in partial for each, _, owner, part in entries if not part}
        annotations = []
        for each, rle, owner, part in entries:
            if not part:
                annotations.append(
                    _annotation(each["id"], owner, "object", None, rle, asked=(owner, "") not in partial)
                )
            elif each.get("obj_ann_id") not in objects:
                self.skipped["part without its object"] += 1
            elif objects[each["obj_ann_id"]] or (owner, part) in partial:
                self.skipped["part of a label that is not annotated exhaustively"] += 1
            else:
                annotations.append(_annotation(each["id"], part, "part", each["obj_ann_id"], rle))
        categories = self._categories[split]
        absent = {self.label(split, number) for number in image.get("neg_category_ids", ()) if number in categories}
        return path, {**image, "absent": absent}, annotations


class PascalPart(PartAnnotations):
    """
    The objects themselves are not annotated: nothing is asked about them, and each description of parts is of the class
    with most of them.
    """

    SOURCE = "pascal_part"
    LICENSE = "annotations: research use (PASCAL-Part); images: Flickr terms of use"
    SPLITS = {
        split: (
            tuple(
                f"{root}{name}.json"
                for root in ("", "vlpart/pascal_part/", "pascal_part/", "Semantic_Segm/pascal_part/")
                for name in (part, f"annotations/{part}")
            ),
            tuple(
                f"{root}VOCdevkit/VOC2010/JPEGImages"
                for root in ("", "vlpart/pascal_part/", "pascal_part/", "Semantic_Segm/pascal_part/")
            ),
        )
        for split, part in (("train", "train"), ("validation", "val"))
    }

    def record(self, item: tuple[str, int]) -> Record:
        path, image, entries = self.read(item)
        by_owner: dict[str, list[Rle]] = defaultdict(list)
        for _, rle, owner, _ in entries:
            by_owner[owner].append(rle)
        annotations = [
            _annotation(owner, owner, "object", None, union(rles), asked=False) for owner, rles in by_owner.items()
        ]
        annotations += [_annotation(each["id"], part, "part", owner, rle) for each, rle, owner, part in entries if part]
        return path, image, annotations

    def labels(self, item: tuple[str, int]) -> Iterable[Label]:
        return [label for label in super().labels(item) if label.owner]

    def turns(
        self, scene: Scene, absent: AbsentLabels, generator: Callable[..., Random]
    ) -> Iterator[tuple[str, list[Turn]]]:
        yield from super().turns(scene, absent, generator)
        if self.config.name == "paraphrases":
            return  # of questions, not of descriptions
        owners = {part.owner: len(scene.parts_of(Target(part.owner))) for part in scene.parts if part.owner}
        if owners:
            whole = Target(max(owners, key=lambda noun: owners[noun]))
            for variant in range(1 if self.config.name == "benchmark" else self.config.variants):
                yield "fine", [describe_parts(generator(variant, "fine"), whole, scene.parts_of(whole))]
