"""Hierarchical COCO-style JSON -> USCDF rows.

Layout of the data folder: `annotations.json` and `images/`. The JSON holds `images` (`id`, `file_name`, `width`, `height`,
`source`, `split` train|val) and `annotations` (`id`, `image_id`, `label`, `level` object|stuff|part, `parent_id`,
`segmentation` as COCO compressed RLE).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .scene import Vocabulary, count_labels
from .scene_builder import Record, SceneBuilder, merge_vocabularies
from .sources import JsonTables, first_existing, inside

SPLITS = {"train": "train", "val": "validation"}


class HierarchicalCoco(SceneBuilder):
    LICENSE = "those of the sources named in the column source"
    READS_PICTURES = True
    ASKS_REGIONS = True

    def items(self) -> dict[str, Sequence[Any]]:
        self._tables: JsonTables = self.tables(
            first_existing(self.data_dir, "annotations.json"),
            images=("images.item", "id"),
            annotations=("annotations.item", "image_id"),
        )
        splits: dict[str, list[Any]] = {name: [] for name in SPLITS.values()}
        for key, image in self._tables.all("images"):
            split = image.get("split")
            if split not in SPLITS:
                self.skipped[f"split {split!r} is none of {', '.join(SPLITS)}"] += 1
                continue
            splits[SPLITS[split]].append(key)
        orphans = set(self._tables.keys("annotations")) - set(self._tables.keys("images"))
        for orphan in sorted(orphans, key=str):
            self.skipped["annotation of an image that is not listed"] += len(self._tables.get("annotations", orphan))
        return dict(splits)

    def record(self, item: Any) -> Record:
        image = self._tables.one("images", item)
        path = inside(self.data_dir / "images", image["file_name"])
        return path, image, self._tables.get("annotations", item)

    def vocabulary(self) -> Vocabulary:
        return merge_vocabularies(self._label_counts())

    def _label_counts(self) -> Iterator[Mapping[str, Mapping[Any, int]]]:
        for key, image in self._tables.all("images"):
            if image.get("split") == "train":
                try:
                    yield count_labels([(image, self._tables.get("annotations", key))])
                except (KeyError, TypeError, ValueError):
                    continue  # `rows` says what is wrong with it
