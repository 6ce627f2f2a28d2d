"""Families whose images carry labelled masks: objects, stuff and parts, from which every kind of question can be asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from mglmm.processing.images import load_image

from .attributes import describe_colours
from .augmentation import augment, save_picture
from .builder import Row, UscdfBuilder, UscdfConfig, make_row
from .conversations import Turn, ask_for_one, caption, describe_image, describe_parts, paraphrase, refer
from .labels import readable
from .questions import ask_about_region, ask_for_absent, ask_for_whole, ask_with_attribute, ask_with_relation
from .scene import AbsentLabels, Label, Scene, Vocabulary, read_scene
from .sources import check_image_size
from .targets import Target

Record = tuple[Path, Mapping[str, Any], Sequence[Mapping[str, Any]]]
CAPTION_SHARE = 1 / 6
WHOLE_SHARE = 1 / 2  # of the variants that ask for an object in a question of its own
REFUSED_SHARE, REFUSED_WHOLE_SHARE = 0.36, 0.28  # of the single questions, and of those for an object: a third in all
ATTRIBUTE_SHARE, RELATION_SHARE = 0.42, 0.28  # of the other single questions
COLOURED_SHARE, PLACED_SHARE = 0.25, 0.15  # of the descriptions


class SceneBuilder(UscdfBuilder):
    """
    Configurations: "default" (training rows of all splits), "benchmark" (evaluation rows of the split validation) and
    "paraphrases" (its questions for objects and parts, in words that are never used in training).
    A subclass defines `items`, `record` and `vocabulary`.
    """

    AUGMENTS = True
    BUILDER_CONFIGS = [UscdfConfig(name=name) for name in ("default", "benchmark", "paraphrases")]
    READS_PICTURES: bool = False  # training rows say colours, which takes some milliseconds for each picture
    ASKS_REGIONS: bool = False  # training rows of the task "region", which only models with a region encoder read

    def record(self, item: Any) -> Record:
        """
        Path of the image, the image (`id`, `file_name`, `width`, `height`, `source`, optionally `ignore_mask` and `known`:
        readable names of what is there although no annotation could be read) and its annotations (`id`, `label`, `level`
        object|stuff|part, `parent_id`, `segmentation` as COCO compressed RLE). An annotation with `asked: False` is there,
        so its label is never called absent, but no question is about it unless another annotation of the label (and of
        the same owner's label) may be asked for.
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
        elif self.config.name == "paraphrases":
            yield from paraphrase_turns(scene, generator)
        else:
            yield from training_turns(scene, absent, generator, self.config.variants, regions=self.ASKS_REGIONS)

    def split_items(self) -> dict[str, list[Any]]:
        splits = super().split_items()
        self._vocabulary = self.vocabulary()  # once, before the work is handed to several processes
        if self.config.name != "default":
            splits = {split: items for split, items in splits.items() if split == "validation"}
        training = splits.get("train", []) if self.config.augment and self.config.name == "default" else []
        self._augmented = set(training)
        return splits

    def rows(self, item: Any) -> Iterator[Row]:
        for view, record in enumerate(self.views(item)):
            yield from self._rows_of_view(view, *record)

    def _rows_of_view(
        self, view: int, path: Path, image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]
    ) -> Iterator[Row]:
        size = int(image["height"]), int(image["width"])
        scene = read_scene(image, annotations)
        if view == 0:
            self.skipped.update(scene.skipped)
        names = {each["id"]: readable(each["label"]).name for each in annotations}
        asked: dict[bool, set[Label]] = {True: set(), False: set()}
        for each in annotations:
            owner = names[each["parent_id"]] if each["level"] == "part" else ""
            asked[bool(each.get("asked", True))].add(Label(names[each["id"]], owner))

        def usable(targets: Iterable[Target]) -> Iterator[Target]:
            for target in targets:
                label = Label(target.noun.name, target.owner.name if target.owner else "")
                if label in asked[True]:
                    # Where an instance is not asked for, the others are not told apart.
                    yield replace(target, instances=()) if label in asked[False] else target

        scene = replace(
            scene,
            names=scene.names | image.get("known", frozenset()),
            objects=tuple(usable(scene.objects)),
            parts=tuple(usable(scene.parts)),
        )
        if self.READS_PICTURES and self.config.name == "default" and not image.get("grey"):
            scene = describe_colours(scene, path)
        absent = AbsentLabels(scene, self.deniable(image, scene))
        key = (image["source"], image["file_name"], *([f"view{view}"] if view else []))
        for task, turns in self.turns(scene, absent, partial(self.generator, *key)):
            yield make_row(
                path, image["id"], image["source"], task, turns, size=size, ignore_mask=image.get("ignore_mask")
            )

    def views(self, item: Any) -> Iterator[Record]:
        """The record of an item, and after it those of its augmented views."""
        path, image, annotations = self.record(item)
        check_image_size(path, int(image["height"]), int(image["width"]))
        yield path, image, annotations
        if item not in self._augmented:
            return
        try:
            picture = load_image(path)
        except ValueError:
            self.skipped["augmented views of an image that cannot be read"] += 1
            return
        folder = Path(self.config.augmented_dir or Path(self._cache_dir_root) / "augmented")
        for view in range(1, self.config.augment + 1):
            rng = self.generator(image["source"], image["file_name"], f"view{view}", "augment")
            changed, described, kept = augment(picture, image, annotations, rng)
            yield save_picture(changed, folder), {**described, "id": f"{image['id']}/view{view}"}, kept


def training_turns(
    scene: Scene, absent: AbsentLabels, generator: Callable[..., Random], variants: int, *, regions: bool
) -> Iterator[tuple[str, list[Turn]]]:
    """
    (task, turns) of the training rows of one image.

    Each variant words anew: a referring conversation of four to eight turns; a single question, and in half of the variants
    another one for an object as a whole (a third of both for what is not there, see `questions`); with `regions` the box of
    a thing; a panoptic description, a fine-grained description of the object with most parts, and in one of six a plain
    caption. `generator(variant, task)` is the randomness of one row.
    """
    for variant in range(variants):
        yield from _variant(scene, absent, partial(generator, variant), regions)


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
    if scene.objects:
        yield "panoptic", [describe_image(generator(0, "panoptic"), scene.objects)]
    whole = scene.most_divided
    if whole is not None:
        yield "fine", [describe_parts(generator(0, "fine"), whole, scene.parts_of(whole))]


def paraphrase_turns(scene: Scene, generator: Callable[..., Random]) -> Iterator[tuple[str, list[Turn]]]:
    """(task, turns) of the questions of `benchmark_turns` for what is there, in the same order, in other words."""
    asked = [("object", target) for target in scene.objects] + [("part", target) for target in scene.parts]
    for index, (task, target) in enumerate(asked):
        yield task, [paraphrase(generator(index, "question"), target)]


def _variant(
    scene: Scene, absent: AbsentLabels, generator: Callable[[str], Random], regions: bool
) -> Iterator[tuple[str, list[Turn]]]:
    def special(rng: Random) -> Turn | None:
        return (ask_with_attribute if rng.random() < 0.6 else ask_with_relation)(rng, scene)

    rng = generator("conversation")
    turns = refer(rng, scene.objects, scene.parts, absent.draw, rng.randint(4, 8), special)
    if turns:
        yield "referring", turns
    rng = generator("question")
    turn = _single(rng, scene, absent)
    if turn is not None:
        yield _task(turn), [turn]
    rng = generator("whole")
    turn = ask_for_whole(rng, scene, absent, REFUSED_WHOLE_SHARE) if rng.random() < WHOLE_SHARE else None
    if turn is not None:
        yield _task(turn), [turn]
    turn = ask_about_region(generator("region"), scene) if regions else None
    if turn is not None:
        yield "region", [turn]
    rng = generator("style")
    coloured, placed = rng.random() < COLOURED_SHARE, rng.random() < PLACED_SHARE
    if scene.objects:
        turn = describe_image(generator("panoptic"), scene.objects, coloured=coloured, placed=placed, varied=True)
        yield "panoptic", [turn]
    whole = scene.most_divided
    if whole is not None:
        coloured = rng.random() < COLOURED_SHARE
        yield "fine", [describe_parts(generator("fine"), whole, scene.parts_of(whole), coloured=coloured, varied=True)]
    rng = generator("caption")
    if scene.objects and rng.random() < CAPTION_SHARE:
        yield "caption", [caption(rng, scene.objects, scene.parts, coloured=rng.random() < COLOURED_SHARE)]


def _single(rng: Random, scene: Scene, absent: AbsentLabels) -> Turn | None:
    turn = ask_for_absent(rng, scene, absent) if rng.random() < REFUSED_SHARE else None
    if turn is not None:
        return turn
    draw = rng.random()
    if draw < ATTRIBUTE_SHARE:
        turn = ask_with_attribute(rng, scene)
    elif draw < ATTRIBUTE_SHARE + RELATION_SHARE:
        turn = ask_with_relation(rng, scene)
    if turn is not None:
        return turn
    return next(iter(refer(rng, scene.objects, scene.parts, lambda rng: None, 1, lambda rng: None)), None)


def _task(turn: Turn) -> str:
    return "referring" if turn.masks else "absent"


def merge_vocabularies(parts: Iterable[Vocabulary]) -> dict[str, dict[Label, int]]:
    """The sum of vocabularies, sorted, so that it does not depend on their order."""
    total: dict[str, Counter[Label]] = {}
    for part in parts:
        for source, labels in part.items():
            total.setdefault(source, Counter()).update(labels)
    return {source: dict(sorted(total[source].items())) for source in sorted(total)}
