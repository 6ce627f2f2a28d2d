"""
COCO panoptic and COCO instances -> USCDF rows.

Layouts, below the data folder or in the sub-folder that published code gives them; images in `{train,val}2017/`:

- Panoptic: `annotations/panoptic_{train,val}2017.json` and the folder of PNGs of the same name. The JSON holds `images` (`id`,
  `file_name`, `height`, `width`), `annotations` (`image_id`, `file_name`, `segments_info` of `id`, `category_id`, `iscrowd`) and
  `categories` (`id`, `name`, `isthing`); a pixel of the PNG is the segment R + 256 G + 65536 B, 0 is unlabelled. Without
  it, `annotations/panoptic_{train,val}2017_detection_format.json` (of panopticapi), whose `annotations` are one for each
  segment, with `segmentation` as RLE.
- Instances: `annotations/instances_{train,val}2017.json` with `images`, `annotations` (`image_id`, `category_id`,
  `segmentation` as polygons or RLE, `iscrowd`) and `categories`.

A crowd is a coarse region with several things of a label. It belongs to the mask of its label, which is then asked for in
the plural, and its pixels are ignored. A label that is there as a crowd only is neither asked for nor called absent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mglmm.processing.rle import decode_mask, encode_mask

from .builder import reason_of
from .labels import readable
from .layouts import SplitPatterns, coco_images
from .masks import Rle, read_index_image, rle_of, rles_of_values, union
from .scene import Label
from .scene_builder import Record
from .semantic import CategorisedScenes
from .sources import first_existing, inside

ROOTS = ("", "coco/", "coco_2017/", "cocopanoptic/")
UNLABELLED = 0
LAST_THING = 91  # categories with larger numbers are stuff; the detection format does not say so itself
DETECTION_FORMAT = "_detection_format"


def _patterns(*names: str) -> SplitPatterns:
    return {
        split: (
            tuple(
                f"{root}{folder}{name.format(part)}.json"
                for name in names
                for root in ROOTS
                for folder in ("annotations/", "")
            ),
            (*coco_images(f"{part}2017"), f"Semantic_Segm/coco_2017/{part}2017"),
        )
        for split, part in (("train", "train"), ("validation", "val"))
    }


class CocoScenes(CategorisedScenes):
    """What both have in common."""

    LICENSE = "annotations: CC-BY-4.0; images: COCO, each under its own Flickr licence"

    def segments(self, item: tuple[str, int]) -> list[Mapping[str, Any]]:
        """What is annotated in an image: `category_id`, `iscrowd` and what `masks` needs."""
        split, number = item
        return self._sources[split][0].get("annotations", number)

    def masks(
        self, item: tuple[str, int], segments: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> Iterator[tuple[Mapping[str, Any], Rle]]:
        """Each segment that can be read, with its mask; the others are counted."""
        for segment in segments:
            try:
                yield segment, rle_of(segment["segmentation"], *size)
            except (KeyError, TypeError, ValueError) as error:
                self.skipped[reason_of(error)] += 1

    def unlabelled(self, item: tuple[str, int], annotations: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        """Pixels (H, W) that nobody labelled, where that differs from showing none of the classes."""
        return None

    def labels(self, item: tuple[str, int]) -> Iterable[Label]:
        categories = self._categories[item[0]]
        numbers = {segment.get("category_id") for segment in self.segments(item)}
        return [Label(readable(each["name"]).name) for number, each in categories.items() if number in numbers]

    def record(self, item: tuple[str, int]) -> Record:
        split, number = item
        tables, folder = self._sources[split]
        image = tables.one("images", number)
        path = inside(folder, image["file_name"])
        size = int(image["height"]), int(image["width"])
        annotations = []
        for index, (segment, rle) in enumerate(self.masks(item, self.segments(item), size)):
            category = self._categories[split].get(segment["category_id"])
            if category is None:
                self.skipped["category is not listed"] += 1
                continue
            crowd = bool(segment.get("iscrowd"))
            annotations.append(
                {
                    "id": index,
                    "label": category["name"],
                    "level": "object" if category.get("isthing", category["id"] <= LAST_THING) else "stuff",
                    "parent_id": None,
                    "segmentation": rle,
                    "iscrowd": crowd,
                    "asked": not crowd,
                }
            )
        known = frozenset(label.name for label in self.labels(item))
        ignored = self._ignored(item, annotations)
        return path, {**image, "source": self.SOURCE, "known": known, "ignore_mask": ignored}, annotations

    def _ignored(self, item: tuple[str, int], annotations: Sequence[Mapping[str, Any]]) -> Rle | None:
        """What is unlabelled, and what belongs to crowds and to nothing else."""
        crowds = [each["segmentation"] for each in annotations if each["iscrowd"]]
        single = [each["segmentation"] for each in annotations if not each["iscrowd"]]
        ignored = self.unlabelled(item, annotations)
        if crowds:
            crowd = _union(crowds)
            if single:
                crowd &= ~_union(single)
            ignored = crowd if ignored is None else crowd | ignored
        return encode_mask(ignored) if ignored is not None and ignored.any() else None


class CocoInstances(CocoScenes):
    """All things of 80 classes are annotated, so that nothing but crowds is ignored."""

    SOURCE = "coco_instances"
    SPLITS = _patterns("instances_{}2017")


class CocoPanoptic(CocoScenes):
    """
    Names keep what follows a hyphen where it has a meaning: "wall-brick" is a brick wall, and not merged with other walls
    as in published code; labels that read alike ("wall-other-merged", "wall") are one mask.
    """

    SOURCE = "coco_panoptic"
    SPLITS = _patterns("panoptic_{}2017", f"panoptic_{{}}2017{DETECTION_FORMAT}")

    def items(self) -> dict[str, Sequence[Any]]:
        items = super().items()
        self._maps: dict[str, Path] = {}  # not for the detection format, which carries its masks
        for split, (tables, _) in self._sources.items():
            name, folder = tables.path.stem, tables.path.parent
            if not name.endswith(DETECTION_FORMAT):
                self._maps[split] = first_existing(folder if (folder / name).is_dir() else folder.parent, name)
        return items

    def segments(self, item: tuple[str, int]) -> list[Mapping[str, Any]]:
        entries = super().segments(item)
        if item[0] not in self._maps:
            return entries
        return [{**segment, "file_name": entry["file_name"]} for entry in entries for segment in entry["segments_info"]]

    def masks(
        self, item: tuple[str, int], segments: Sequence[Mapping[str, Any]], size: tuple[int, int]
    ) -> Iterator[tuple[Mapping[str, Any], Rle]]:
        folder = self._maps.get(item[0])
        if folder is None:
            yield from super().masks(item, segments, size)
            return
        if not segments:
            return
        numbers = read_segment_map(inside(folder, segments[0]["file_name"], "label image"))
        if numbers.shape != size:
            raise ValueError("mask size differs from the image size")
        rles = rles_of_values(numbers, (UNLABELLED,))
        for segment in segments:
            rle = rles.pop(segment["id"], None)
            if rle is None:
                self.skipped["segment without a pixel"] += 1
            else:
                yield segment, rle
        if rles:
            self.skipped["pixels of a segment that is not listed"] += len(rles)

    def unlabelled(self, item: tuple[str, int], annotations: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
        if not annotations:
            raise ValueError("image without a segment")
        return ~_union([each["segmentation"] for each in annotations])


def read_segment_map(path: Path) -> np.ndarray:
    """
    The segment numbers (H, W) of a panoptic PNG.

    Raises:
        ValueError: it cannot be read or is no colour image.
    """
    colours = read_index_image(path)
    if colours.ndim != 3:
        raise ValueError("label image holds no colours")
    return colours.astype(np.int64) @ np.array([1, 256, 65536])


def _union(rles: Sequence[Rle]) -> np.ndarray:
    return decode_mask(union(rles))
