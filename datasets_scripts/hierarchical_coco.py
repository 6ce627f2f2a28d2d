"""Hierarchical COCO-style JSON -> USCDF rows.

Layout of the data folder: `annotations.json` and `images/`. The JSON holds `images` (`id`, `file_name`, `width`, `height`,
`source`, `split`) and `annotations` (`id`, `image_id`, `label`, `level` object|stuff|part, `parent_id`, `segmentation` as
COCO compressed RLE).
"""

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import PIL.Image

from mglmm.datasets_scripts.conversations import (
    Turn,
    ask_for_one,
    caption,
    describe_image,
    describe_parts,
    refer,
)
from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.scene import AbsentLabels, Scene, Vocabulary, count_labels, read_scene
from mglmm.processing.uscdf import IMAGE_TOKEN

Generator = Callable[[str], random.Random]  # of a task
Record = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]

CAPTION_SHARE = 1 / 6
SPLITS = {"train": datasets.Split.TRAIN, "val": datasets.Split.VALIDATION}


def image_rows(
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    *,
    vocabulary: Vocabulary,
    seed: int = 0,
    variants: int = 1,
) -> list[dict[str, Any]]:
    """The training rows of one image, without the `image` column.

    Each variant words anew: a referring conversation of two to four turns, a single referring question (30 % of them for
    an absent thing), a panoptic description, a fine-grained description of the object with most parts, and in one of six
    a plain caption. A row is a pure function of the source record, the vocabulary, the seed and the number of its variant.

    Raises:
        ValueError: an annotation is broken.
    """
    scene = read_scene(image, annotations)
    absent = AbsentLabels(scene, vocabulary)
    rows = []
    for variant in range(variants):
        for task, turns in _variant(scene, absent, partial(_generator, image, seed, variant)):
            rows.append(_row(image, task, turns))
    return rows


def benchmark_rows(
    image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]], *, vocabulary: Vocabulary, seed: int = 0
) -> list[dict[str, Any]]:
    """The evaluation rows of one image, without the `image` column.

    One question for each object or stuff label (task "object"), for each part label (task "part"), for one absent label
    of the image's own source and one of another (task "absent"), one panoptic and one fine-grained description.

    Raises:
        ValueError: an annotation is broken.
    """
    scene = read_scene(image, annotations)
    absent = AbsentLabels(scene, vocabulary)
    asked = [("object", target) for target in scene.objects] + [("part", target) for target in scene.parts]
    for index, same_source in enumerate((1.0, 0.0)):
        target = absent.draw(_generator(image, seed, index, "absent label"), same_source)
        if target is not None and ("absent", target) not in asked:
            asked.append(("absent", target))
    rows = [
        _row(image, task, [ask_for_one(_generator(image, seed, index, "question"), target)])
        for index, (task, target) in enumerate(asked)
    ]
    rows += [_row(image, task, turns) for task, turns in _descriptions(scene, partial(_generator, image, seed, 0))]
    return rows


def _variant(scene: Scene, absent: AbsentLabels, generator: Generator) -> Iterator[tuple[str, list[Turn]]]:
    rng = generator("conversation")
    turns = refer(rng, scene.objects, scene.parts, absent.draw, rng.randint(2, 4))
    if turns:
        yield "referring", turns
    rng = generator("question")
    target = absent.draw(rng) if rng.random() < 0.3 else None
    if target is not None:
        yield "absent", [ask_for_one(rng, target)]
    else:
        turns = refer(rng, scene.objects, scene.parts, lambda rng: None, 1)
        if turns:
            yield "referring", turns
    yield from _descriptions(scene, generator)
    rng = generator("caption")
    if scene.objects and rng.random() < CAPTION_SHARE:
        yield "caption", [caption(rng, scene.objects, scene.parts)]


def _descriptions(scene: Scene, generator: Generator) -> Iterator[tuple[str, list[Turn]]]:
    if scene.objects:
        yield "panoptic", [describe_image(generator("panoptic"), scene.objects)]
    whole = max(scene.objects, key=lambda target: len(scene.parts_of(target)), default=None)
    if whole is not None and scene.parts_of(whole):
        yield "fine", [describe_parts(generator("fine"), whole, scene.parts_of(whole))]


def _generator(image: Mapping[str, Any], seed: int, variant: int, task: str) -> random.Random:
    # Seeding with a string hashes it with SHA-512, so the stream is the same in every process and on every machine.
    return random.Random(f"{seed}/{image['source']}/{image['file_name']}/{variant}/{task}")


def _row(image: Mapping[str, Any], task: str, turns: Sequence[Turn]) -> dict[str, Any]:
    messages = []
    for index, turn in enumerate(turns):
        question = turn.question if index else f"{IMAGE_TOKEN}\n{turn.question}"
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": turn.answer}]
    return {
        "image_id": str(image["id"]),
        "source": image["source"],
        "task": task,
        "messages": messages,
        "masks": [target.mask for turn in turns for target in turn.targets],
        "regions": [],
    }


@dataclass
class HierarchicalCocoConfig(datasets.BuilderConfig):
    """Options of [`HierarchicalCoco`].

    Args:
        seed (`int`, *optional*, defaults to 0): Seed of all choices of wording and target.
        variants (`int`, *optional*, defaults to 1): How often each image is worded anew.
        images (`str`, *optional*, defaults to `"embed"`): `"embed"` stores the encoded image in every row, `"path"` its
            absolute path.
        limit (`int`, *optional*): Use only the first images of each split.
    """

    seed: int = 0
    variants: int = 1
    images: Literal["embed", "path"] = "embed"
    limit: int | None = None


class HierarchicalCoco(datasets.GeneratorBasedBuilder):
    """Builder with the configurations "default" (training rows of the splits train and validation) and "benchmark"
    (evaluation rows of the split validation). After `download_and_prepare`, `skipped` counts what was left out, by reason.
    """

    BUILDER_CONFIG_CLASS = HierarchicalCocoConfig
    BUILDER_CONFIGS = [HierarchicalCocoConfig(name="default"), HierarchicalCocoConfig(name="benchmark")]
    DEFAULT_CONFIG_NAME = "default"
    DEFAULT_WRITER_BATCH_SIZE = 1000

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        records, self.skipped = read_records(Path(self.config.data_dir), self.config.limit)
        vocabulary = count_labels(records["train"])
        if not any(records.values()):
            raise ValueError(f"no usable image in {self.config.data_dir}: {dict(self.skipped)}")
        names = ("val",) if self.config.name == "benchmark" else ("train", "val")
        return [
            datasets.SplitGenerator(SPLITS[name], {"records": records[name], "vocabulary": vocabulary})
            for name in names
            if records[name]
        ]

    def _generate_examples(self, records: list[Record], vocabulary: Vocabulary) -> Iterator[tuple[str, dict[str, Any]]]:
        for image, annotations in records:
            if self.config.name == "benchmark":
                rows = benchmark_rows(image, annotations, vocabulary=vocabulary, seed=self.config.seed)
            else:
                rows = image_rows(
                    image,
                    annotations,
                    vocabulary=vocabulary,
                    seed=self.config.seed,
                    variants=self.config.variants,
                )
            path = image_path(Path(self.config.data_dir), image["file_name"])
            embed = self.config.images == "embed"
            column = {"bytes": path.read_bytes(), "path": path.name} if embed else {"bytes": None, "path": str(path)}
            for index, row in enumerate(rows):
                yield f"{image['id']}-{index}", {"image": column, **row}


def image_path(data_dir: Path, file_name: str) -> Path:
    """The absolute path of an image file.

    Raises:
        ValueError: the name leads out of the `images` folder, or there is no such file.
    """
    folder = (data_dir / "images").resolve()
    path = (folder / file_name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError("file name leads out of the data folder")
    if not path.is_file():
        raise ValueError("image file is missing")
    return path


def read_records(data_dir: Path, limit: int | None = None) -> tuple[dict[str, list[Record]], Counter[str]]:
    """Read and check `annotations.json`.

    Returns:
        The usable (image, annotations) records of "train" and "val", and the number of images and targets left out, by
        reason. `limit` keeps the first images of each split.
    """
    content = json.loads((data_dir / "annotations.json").read_bytes())
    annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        annotations[annotation.get("image_id")].append(annotation)
    records: dict[str, list[Record]] = {name: [] for name in SPLITS}
    skipped: Counter[str] = Counter()
    known = {image.get("id") for image in content["images"]}
    for orphan in annotations.keys() - known:
        skipped[f"annotations of image {orphan!r}: no such image"] += len(annotations[orphan])
    for image in content["images"]:
        try:
            if image["split"] not in records:
                raise ValueError(f"split {image['split']!r} is none of {', '.join(SPLITS)}")
            split = records[image["split"]]
            if limit is not None and len(split) >= limit:
                continue
            with PIL.Image.open(image_path(data_dir, image["file_name"])) as picture:
                size = picture.size
            if size != (image["width"], image["height"]):
                raise ValueError("image size differs from its annotation")
            scene = read_scene(image, annotations[image["id"]])
        except (KeyError, TypeError, ValueError, OSError, PIL.Image.DecompressionBombError) as error:
            skipped[f"image {image.get('id')!r}: {_reason(error)}"] += 1
            continue
        skipped.update(scene.skipped)
        split.append((image, annotations[image["id"]]))
    return records, skipped


def _reason(error: Exception) -> str:
    return f"missing field {error}" if isinstance(error, KeyError) else str(error)
