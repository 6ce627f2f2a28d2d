"""
Maps of one class index per pixel -> USCDF rows: ADE20K (150 classes), COCO-Stuff and Mapillary Vistas 2.0.

Layouts, below the data folder or in the sub-folder that published code gives them; a map and its image share the stem:

- ADE20K (ADEChallengeData2016): `annotations/{training,validation}/*.png`, `images/{training,validation}/*.jpg`. 0 is
  other, 1 to 150 are the classes.
- COCO-Stuff (stuffthingmaps_trainval2017): `cocostuff/{train,val}2017/*.png` or, for train, `cocostuff/*.png`; the images
  of COCO 2017; optionally `labels.txt` with lines `number: name`. The pixel is the number less one, 255 is void.
- Mapillary Vistas 2.0: `config_v2.0.json` (`labels`: `name`, `readable`, `instances`), `{training,validation}/v2.0/labels/`
  and `{training,validation}/images/`. The pixel is the index into `labels`.

All pixels of a class are one mask: how many things it covers is not known, so it is asked for in the singular.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .labels import readable
from .layouts import SplitPatterns, SplitTables, coco_images, split_sources
from .masks import Rle, read_index_image, rles_of_values, union
from .scene import Label, Vocabulary
from .scene_builder import Record, SceneBuilder
from .sources import first_existing, inside, read_json

Classes = dict[int, tuple[str, str]]
"""Pixel value -> label and level (object or stuff)."""

VOCABULARY_IMAGES = 2000  # enough for the proportions of labels; all maps of COCO-Stuff would take half an hour

# The first word of each class of objectInfo150.txt, or the usual one where that is rare. Index + 1 is the pixel value.
ADE_NAMES = tuple(
    "wall, building, sky, floor, tree, ceiling, road, bed, window, grass, cabinet, sidewalk, person, ground, door, table, "
    "mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea, mirror, rug, field, armchair, seat, "
    "fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, pedestal, box, column, signboard, chest of drawers, "
    "counter, sand, sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, display case, pool table, "
    "pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench, "
    "countertop, stove, palm tree, kitchen island, computer, swivel chair, boat, bar, arcade machine, hut, bus, towel, "
    "light, truck, tower, chandelier, awning, streetlight, booth, tv, airplane, dirt track, clothes, pole, land, bannister, "
    "escalator, ottoman, bottle, sideboard, poster, stage, van, ship, fountain, conveyor belt, canopy, washing machine, toy, "
    "swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, storage tank, "
    "trade name, microwave, flowerpot, animal, bicycle, lake, dishwasher, projection screen, blanket, sculpture, "
    "exhaust hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, "
    "shower, radiator, drinking glass, clock, flag".split(", ")
)
# Those with a 1 in the column Stuff of objectInfo150.
ADE_STUFF = frozenset(
    (1, 2, 3, 4, 6, 7, 10, 12, 14, 17, 22, 26, 27, 29, 30, 47, 49, 52, 53, 55, 60, 61, 62, 69, 80, 85, 92, 95, 97, 102)
    + (106, 110, 114, 129, 141)
)

COCO_THINGS = 91  # numbers 1 to 91 are things, 92 to 182 stuff
COCO_STUFF_NAMES = tuple(
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, street sign, "
    "stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, hat, backpack, "
    "umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, "
    "baseball glove, skateboard, surfboard, tennis racket, bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, "
    "apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, "
    "dining table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, "
    "sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier, toothbrush, hair brush, banner, "
    "blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other, ceiling-tile, cloth, "
    "clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence, floor-marble, floor-other, "
    "floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, "
    "hill, house, leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, "
    "plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand, sea, "
    "shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, "
    "towel, tree, vegetable, wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, "
    "water-other, waterdrops, window-blind, window-other, wood".split(", ")
)
COCO_STUFF_RENAMED = {
    "wall-concrete": "concrete wall",
    "wall-panel": "panelled wall",
    "floor-marble": "marble floor",
    "floor-stone": "stone floor",
    "floor-tile": "tiled floor",
    "ceiling-tile": "tiled ceiling",
    "waterdrops": "water drops",
}
COCO_STUFF_REST = ("solid-other", "structural-other")  # nothing one could ask for

VISTAS_RENAMED = {
    "on rails": "rail vehicle",
    "wheeled slow": "slow wheeled vehicle",
    "person group": "group of people",
    "pole group": "group of poles",
    "vehicle group": "group of vehicles",
    "pedestrians traffic light": "pedestrian traffic light",
    "cyclists traffic light": "cyclist traffic light",
}


class LabelledScenes(SceneBuilder):
    """What scene families of one source and of any size share. A subclass keeps its splits in `_splits` when it lists its items."""

    _splits: Mapping[str, Sequence[Any]]

    def labels(self, item: Any) -> Iterable[Label]:
        """The labels of an item, without reading its image."""
        raise NotImplementedError

    def vocabulary(self) -> Vocabulary:
        items = self._splits.get("train") or [item for of_split in self._splits.values() for item in of_split]
        counts: Counter[Label] = Counter()
        for item in items[:: -(-len(items) // VOCABULARY_IMAGES) or 1]:
            try:
                counts.update(set(self.labels(item)))
            except (KeyError, TypeError, AttributeError, IndexError, ValueError, OSError):
                continue  # `rows` says what is wrong with it
        return {self.SOURCE: dict(sorted(counts.items()))}


class CategorisedScenes(SplitTables, LabelledScenes):
    """Families in COCO's JSON with categories."""

    TABLES = {**SplitTables.TABLES, "categories": ("categories.item", "id")}

    def category(self, entry: Mapping[str, Any]) -> Any:
        """What to keep of an entry of `categories`."""
        return entry

    def items(self) -> dict[str, Sequence[Any]]:
        self._splits = super().items()
        self._categories: dict[str, dict[int, Any]] = {
            split: {number: self.category(entry) for number, entry in tables.all("categories")}
            for split, (tables, _) in self._sources.items()
        }
        return self._splits


class ClassMaps(LabelledScenes):
    """Families whose annotation is one index image for each image."""

    SPLITS: SplitPatterns = {}  # folders of maps and of images

    def classes(self) -> Classes:
        """The classes that can be asked for; all other pixels are void."""
        raise NotImplementedError

    def void(self) -> frozenset[int]:
        """Values that are void by design; any other value that is no class is counted as an error."""
        raise NotImplementedError

    def items(self) -> dict[str, Sequence[Any]]:
        self._classes, self._void = self.classes(), self.void()
        self._folders: dict[str, tuple[Path, Path]] = split_sources(self, self.SPLITS)
        self._splits = {
            split: [(split, path.stem) for path in sorted(maps.glob("*.png"))]
            for split, (maps, _) in self._folders.items()
        }
        return dict(self._splits)

    def record(self, item: tuple[str, str]) -> Record:
        split, name = item
        path = inside(self._folders[split][1], f"{name}.jpg")
        values = self._values(item)
        levels: dict[str, str] = {}
        masks: dict[str, list[Rle]] = {}
        ignored = []
        for value, rle in rles_of_values(values).items():
            if value not in self._classes:
                ignored.append(rle)
                if value not in self._void:
                    self.skipped["pixel value that is no class"] += 1
                continue
            label, level = self._classes[value]
            levels.setdefault(label, level)
            masks.setdefault(label, []).append(rle)
        annotations = [
            {"id": label, "label": label, "level": levels[label], "parent_id": None, "segmentation": union(rles)}
            for label, rles in masks.items()
        ]
        if not annotations:
            raise ValueError("label image without a labelled pixel")
        height, width = values.shape
        image = {"id": name, "file_name": path.name, "height": height, "width": width, "source": self.SOURCE}
        return path, {**image, "ignore_mask": union(ignored) if ignored else None}, annotations

    def labels(self, item: tuple[str, str]) -> Iterable[Label]:
        values = map(int, np.unique(self._values(item)))
        return [Label(readable(self._classes[value][0]).name) for value in values if value in self._classes]

    def _values(self, item: tuple[str, str]) -> np.ndarray:
        split, name = item
        values = read_index_image(inside(self._folders[split][0], f"{name}.png", "label image"))
        if values.ndim != 2:
            raise ValueError("label image holds colours instead of one index per pixel")
        return values


def _below(roots: Sequence[str], *folders: str) -> tuple[str, ...]:
    return tuple(f"{root}{folder}" for root in roots for folder in folders)


ADE_ROOTS = ("", "ade20k/", "ADEChallengeData2016/", "ade20k/ADEChallengeData2016/", "Semantic_Segm/ade20k/")
STUFF_FOLDERS = ("cocostuff/", "coco_stuff/", "stuffthingmaps/", "stuffthingmaps_trainval2017/")
STUFF_ROOTS = (*STUFF_FOLDERS, *(f"Semantic_Segm/{folder}" for folder in STUFF_FOLDERS))
VISTAS_ROOTS = ("", "mapillary/", "mapillary_vistas/", "Semantic_Segm/mapillary/")


class Ade20k(ClassMaps):
    """Pixels of none of the 150 classes are ignored: they may show anything else."""

    SOURCE = "ade20k"
    LICENSE = "annotations: BSD-3-Clause; images: non-commercial research and education only"
    SPLITS: SplitPatterns = {
        split: (_below(ADE_ROOTS, f"annotations/{folder}"), _below(ADE_ROOTS, f"images/{folder}"))
        for split, folder in (("train", "training"), ("validation", "validation"))
    }

    def classes(self) -> Classes:
        return {
            value: (name, "stuff" if value in ADE_STUFF else "object") for value, name in enumerate(ADE_NAMES, start=1)
        }

    def void(self) -> frozenset[int]:
        return frozenset({0})


class CocoStuff(ClassMaps):
    """
    The names with a hyphen, such as wall-brick, are classes like all others (published training code drops them); only
    rest classes without a common meaning are void.
    """

    SOURCE = "cocostuff"
    LICENSE = "annotations: CC-BY-4.0; images: COCO, each under its own Flickr licence"
    SPLITS: SplitPatterns = {
        "train": (
            (*_below(STUFF_ROOTS, "train2017", "annotations/train2017"), "annotations/train2017", "cocostuff"),
            (*coco_images("train2017"), "Semantic_Segm/coco_2017/train2017"),
        ),
        "validation": (
            (*_below(STUFF_ROOTS, "val2017", "annotations/val2017"), "annotations/val2017"),
            (*coco_images("val2017"), "Semantic_Segm/coco_2017/val2017"),
        ),
    }

    def classes(self) -> Classes:
        return {
            number - 1: (COCO_STUFF_RENAMED.get(name, name), "object" if number <= COCO_THINGS else "stuff")
            for number, name in self._names().items()
            if name not in COCO_STUFF_REST
        }

    def void(self) -> frozenset[int]:
        return frozenset({255} | {number - 1 for number, name in self._names().items() if name in COCO_STUFF_REST})

    def _names(self) -> dict[int, str]:
        """Number -> name, from `labels.txt` where it was downloaded too."""
        try:
            path = first_existing(self.data_dir, *_below(("", *STUFF_ROOTS), "labels.txt"))
        except FileNotFoundError:
            return dict(enumerate(COCO_STUFF_NAMES, start=1))
        names = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            number, colon, name = line.partition(":")
            if not colon or not number.strip().isdigit():
                raise ValueError(f"{path}: a line is not 'number: name': {line!r:.80}")
            names[int(number)] = name.strip()
        return {number: name for number, name in names.items() if number > 0}  # 0 is "unlabeled"


class MapillaryVistas(ClassMaps):
    """
    Labels of void things (ego vehicle, unlabeled ...), which published training code keeps as classes, and rest classes
    ("Other Rider") are ignored. Labels that read alike, such as the front and the back of traffic signs, are one mask.
    """

    SOURCE = "mapillary_vistas"
    LICENSE = "CC-BY-NC-SA-4.0 (Mapillary Vistas research edition)"
    SPLITS: SplitPatterns = {
        split: (_below(VISTAS_ROOTS, f"{folder}/v2.0/labels"), _below(VISTAS_ROOTS, f"{folder}/images"))
        for split, folder in (("train", "training"), ("validation", "validation"))
    }

    def classes(self) -> Classes:
        classes = {}
        for value, label in enumerate(self._labels()):
            name = vistas_name(label["readable"])
            if name is not None and not label["name"].startswith("void--"):
                classes[value] = name, "object" if label["instances"] else "stuff"
        return classes

    def void(self) -> frozenset[int]:
        return frozenset(range(len(self._labels()))) | {255}

    def _labels(self) -> list[Mapping[str, Any]]:
        path = first_existing(self.data_dir, *_below(VISTAS_ROOTS, "config_v2.0.json"))
        try:
            return [
                {"name": str(label["name"]), "readable": str(label["readable"]), "instances": bool(label["instances"])}
                for label in read_json(path)["labels"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is no configuration of Mapillary Vistas: {error!r}") from error


def vistas_name(name: str) -> str | None:
    """
    A readable name of Mapillary Vistas as one would say it; `None` for a rest class.

    Example:
        >>> vistas_name("Lane Marking (only) - Dashed Line"), vistas_name("Traffic Sign (Front)"), vistas_name("Other Rider")
        ('dashed line lane marking', 'traffic sign', None)
    """
    name = re.sub(r"\s*\([^)]*\)", "", name).strip().lower()
    if name.startswith(("other ", "ambiguous ")):
        return None
    head, _, kind = name.partition(" - ")
    if kind not in ("", "other", "general", "ambiguous"):
        head = f"{kind} {head}"
    return VISTAS_RENAMED.get(head, head)
