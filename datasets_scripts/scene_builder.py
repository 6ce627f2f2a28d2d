"""Families whose images carry labelled masks: objects, stuff and parts, from which every kind of question can be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from .builder import Row, UscdfBuilder, UscdfConfig, make_row
from .conversations import Turn, ask_for_one, caption, describe_image, describe_parts, refer
from .labels import readable
from .scene import AbsentLabels, Label, Scene, Vocabulary, read_scene
from .sources import check_image_size

Record = tuple[Path, Mapping[str, Any], Sequence[Mapping[str, Any]]]
CAPTION_SHARE = 1 / 6


class SceneBuilder(UscdfBuilder):
    """
    Configurations: "default" (training rows of all splits) and "benchmark" (evaluation rows of the split validation).
    A subclass defines `items`, `record` and `vocabulary`.
    """

    BUILDER_CONFIGS = [UscdfConfig(name="default"), UscdfConfig(name="benchmark")]

    def record(self, item: Any) -> Record:
        """
        Path of the image, the image (`id`, `file_name`, `width`, `height`, `source`, optionally `ignore_mask` and `known`:
        readable names of what is there although no annotation could be read) and its annotations (`id`, `label`, `level`
        object|stuff|part, `parent_id`, `segmentation` as COCO compressed RLE). An annotation with `asked: False` is there,
        so its label is never called absent, but no question is about it unless another annotation of the label may be
        asked for.
        """
        raise NotImplementedError

    def vocabulary(self) -> Vocabulary:
        """Number of images of each label, by source: what may be asked for in vain."""
        raise NotImplementedError

    def deniable(self, image: Mapping[str, Any], scene: Scene) -> Vocabulary:
        """What may be asked for in vain in this image, as far as the labelling goes."""
        return self._vocabulary

    def turns(
        self, scene: Scene, absent: AbsentLabels, generator: Callable[..., Random]
    ) -> Iterator[tuple[str, list[Turn]]]:
        """(task, turns) of all rows of an image."""
        if self.config.name == "benchmark":
            yield from benchmark_turns(scene, absent, generator)
        else:
            yield from training_turns(scene, absent, generator, self.config.variants)

    def split_items(self) -> dict[str, list[Any]]:
        splits = super().split_items()
        self._vocabulary = self.vocabulary()  # once, before the work is handed to several processes
        if self.config.name == "benchmark":
            splits = {split: items for split, items in splits.items() if split == "validation"}
        return splits

    def rows(self, item: Any) -> Iterator[Row]:
        path, image, annotations = self.record(item)
        size = int(image["height"]), int(image["width"])
        check_image_size(path, *size)
        scene = read_scene(image, annotations)
        self.skipped.update(scene.skipped)
        wholes = [each for each in annotations if each["level"] != "part" and each.get("asked", True)]
        asked = {readable(each["label"]).name for each in wholes}
        scene = replace(
            scene,
            names=scene.names | image.get("known", frozenset()),
            objects=tuple(target for target in scene.objects if target.noun.name in asked),
        )
        absent = AbsentLabels(scene, self.deniable(image, scene))
        generator = partial(self.generator, image["source"], image["file_name"])
        for task, turns in self.turns(scene, absent, generator):
            yield make_row(
                path, image["id"], image["source"], task, turns, size=size, ignore_mask=image.get("ignore_mask")
            )


def training_turns(
    scene: Scene, absent: AbsentLabels, generator: Callable[..., Random], variants: int
) -> Iterator[tuple[str, list[Turn]]]:
    """
    (task, turns) of the training rows of one image.

    Each variant words anew: a referring conversation of four to eight turns, a single referring question (30 % of them for
    an absent thing), a panoptic description, a fine-grained description of the object with most parts, and in one of six
    a plain caption. `generator(variant, task)` is the randomness of one row.
    """
    for variant in range(variants):
        yield from _variant(scene, absent, partial(generator, variant))


def benchmark_turns(
    scene: Scene, absent: AbsentLabels, generator: Callable[..., Random]
) -> Iterator[tuple[str, list[Turn]]]:
    """
    (task, turns) of the evaluation rows of one image.

    One question for each object or stuff label (task "object"), for each part label (task "part"), for one absent label
    of the image's own source and one of another (task "absent"), one panoptic and one fine-grained description.
    """
    asked = [("object", target) for target in scene.objects] + [("part", target) for target in scene.parts]
    for index, same_source in enumerate((1.0, 0.0)):
        target = absent.draw(generator(index, "absent label"), same_source)
        if target is not None and ("absent", target) not in asked:
            asked.append(("absent", target))
    for index, (task, target) in enumerate(asked):
        yield task, [ask_for_one(generator(index, "question"), target)]
    yield from _descriptions(scene, partial(generator, 0))


def _variant(
    scene: Scene, absent: AbsentLabels, generator: Callable[[str], Random]
) -> Iterator[tuple[str, list[Turn]]]:
    rng = generator("conversation")
    turns = refer(rng, scene.objects, scene.parts, absent.draw, rng.randint(4, 8))
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


def _descriptions(scene: Scene, generator: Callable[[str], Random]) -> Iterator[tuple[str, list[Turn]]]:
    if scene.objects:
        yield "panoptic", [describe_image(generator("panoptic"), scene.objects)]
    whole = max(scene.objects, key=lambda target: len(scene.parts_of(target)), default=None)
    if whole is not None and scene.parts_of(whole):
        yield "fine", [describe_parts(generator("fine"), whole, scene.parts_of(whole))]


def merge_vocabularies(parts: Iterable[Vocabulary]) -> dict[str, dict[Label, int]]:
    """The sum of vocabularies, sorted, so that it does not depend on their order."""
    total: dict[str, Counter[Label]] = {}
    for part in parts:
        for source, labels in part.items():
            total.setdefault(source, Counter()).update(labels)
    return {source: dict(sorted(total[source].items())) for source in sorted(total)}
