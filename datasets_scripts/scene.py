"""From the annotations of one image to what can be asked about it: targets that are there, and labels that are not."""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils
from scipy import ndimage

from mglmm.datasets_scripts.labels import CARRIED, ELSEWHERE, PARTS, Noun, confusable, readable
from mglmm.datasets_scripts.targets import Target
from mglmm.processing.rle import check_size, decode_mask

MIN_OBJECT_AREA = 60  # pixels of the union of all instances
MIN_PART_AREA = 30
MAX_INSTANCES = 4  # that are told apart
MIN_CONNECTED = 0.9  # of the pixels of an instance of a part; the rest is another part in the same mask
DENSE_COVERAGE = 0.9  # share of the image below labels from which on everything in it is taken as labelled


class Label(NamedTuple):
    """A readable label of a dataset; `owner` is what it is a part of ("" for objects and stuff)."""

    name: str
    owner: str = ""


Vocabulary = Mapping[str, Mapping[Label, int]]
"""Number of images of each label, by source."""


@dataclass(frozen=True)
class Scene:
    """What is known about one image.

    Attributes:
        source: The dataset it comes from.
        names: Readable names of everything annotated in it, whatever its size.
        dense: Whether all of the image is labelled, and not only its main subject.
        objects: Objects and stuff, the largest first.
        parts: Parts, the largest first.
        skipped: Number of targets left out, by reason.
    """

    source: str
    names: frozenset[str]
    dense: bool
    objects: tuple[Target, ...]
    parts: tuple[Target, ...]
    skipped: Mapping[str, int]

    def parts_of(self, target: Target) -> list[Target]:
        return [part for part in self.parts if part.owner == target.noun]

    @property
    def most_divided(self) -> Target | None:
        """The object with most parts; `None` if none has any."""
        whole = max(self.objects, key=lambda target: len(self.parts_of(target)), default=None)
        return whole if whole is not None and self.parts_of(whole) else None

    def owner_of(self, part: Target) -> Target | None:
        """What the part belongs to, where it can be asked for."""
        return next((target for target in self.objects if target.noun == part.owner), None)


def read_scene(image: Mapping[str, Any], annotations: Sequence[Mapping[str, Any]]) -> Scene:
    """Group the annotations of one image into targets.

    All objects and stuff of one label make one target, whose mask is the union of the instances; so do all parts of one
    label whose owners have one label ("the wheels of the car"). Crowds count as several instances.

    Args:
        image: `width`, `height` in pixels and `source`.
        annotations: `id`, `label`, `level` (object, stuff or part), `parent_id`, `segmentation` (COCO compressed RLE).

    Raises:
        ValueError: an annotation is broken: the message says which and why.
    """
    size = [image["height"], image["width"]]
    by_id = {annotation["id"]: annotation for annotation in annotations}
    groups: dict[Label, list[Mapping[str, Any]]] = defaultdict(list)
    nouns: dict[str, Noun] = {}
    for annotation in annotations:
        _check(annotation, by_id, size)
        noun = readable(annotation["label"])
        owner = readable(by_id[annotation["parent_id"]]["label"]).name if annotation["level"] == "part" else ""
        nouns[noun.name] = noun
        groups[Label(noun.name, owner)].append(annotation)

    homonyms = Counter(label.name for label in groups)
    counts = {
        label: len(members) + sum(bool(member.get("iscrowd")) for member in members) * 2
        for label, members in groups.items()
    }
    targets: dict[bool, list[Target]] = {False: [], True: []}
    skipped: Counter[str] = Counter()
    for label, members in groups.items():
        is_part = bool(label.owner)
        mask = _union(member["segmentation"] for member in members)
        area = int(mask_utils.area(mask))
        if area < (MIN_PART_AREA if is_part else MIN_OBJECT_AREA):
            kind, limit = ("part", MIN_PART_AREA) if is_part else ("object", MIN_OBJECT_AREA)
            skipped[f"{kind} smaller than {limit} pixels"] += 1
            continue
        owners = {member["parent_id"] for member in members}
        targets[is_part].append(
            Target(
                noun=nouns[label.name],
                count=counts[label],
                owner=nouns[label.owner] if is_part else None,
                owner_count=len(owners),
                shared=homonyms[label.name] > 1,
                mask={"size": size, "counts": mask["counts"].decode("ascii")},
                area=area,
                box=tuple(mask_utils.toBbox(mask).tolist()),
                instances=_instances(nouns[label.name], members, nouns[label.owner] if is_part else None),
            )
        )
    tops = [annotation["segmentation"] for annotation in annotations if annotation["level"] != "part"]
    covered = int(mask_utils.area(_union(tops))) if tops else 0
    return Scene(
        source=image["source"],
        names=frozenset(nouns),
        dense=any(annotation["level"] == "stuff" for annotation in annotations)
        or covered >= DENSE_COVERAGE * size[0] * size[1],
        objects=tuple(sorted(targets[False], key=lambda target: -target.area)),
        parts=tuple(sorted(targets[True], key=lambda target: -target.area)),
        skipped=skipped,
    )


def count_labels(
    records: Iterable[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]],
) -> dict[str, dict[Label, int]]:
    """The vocabulary of checked (image, annotations) records, sorted, so that it does not depend on their order."""
    counts: dict[str, Counter[Label]] = defaultdict(Counter)
    for image, annotations in records:
        labels = {annotation["id"]: annotation["label"] for annotation in annotations}
        counts[image["source"]].update(
            {
                Label(
                    readable(annotation["label"]).name,
                    readable(labels[annotation["parent_id"]]).name if annotation["level"] == "part" else "",
                )
                for annotation in annotations
            }
        )
    return {source: dict(sorted(counts[source].items())) for source in sorted(counts)}


class AbsentLabels:
    """Labels that may be called absent from a scene: nothing in it could be meant by them.

    Of the scene's own source every other label qualifies, because its annotators looked for it (parts only below an
    owner that is there, or where the whole image is labelled). Labels of other sources qualify where the whole image is
    labelled, else only if they are known to be unlikely in the background (`ELSEWHERE`). Labels of a source are drawn in
    proportion to the images that show them, so that a word by itself does not tell whether the thing is there.
    """

    def __init__(self, scene: Scene, vocabulary: Vocabulary) -> None:
        self._scene = scene
        self._taken = frozenset().union(*map(confusable, scene.names))
        own = vocabulary.get(scene.source, {})
        own_names = {label.name for label in own}
        self.same_source: dict[Label, float] = {
            label: count for label, count in own.items() if self._may_lack(label, own=True)
        }
        self.other_source: dict[Label, float] = {}
        for source in sorted(vocabulary.keys() - {scene.source}):
            labels = {
                label: count
                for label, count in vocabulary[source].items()
                if label.name not in own_names and self._may_lack(label, own=False)
            }
            # Each source gets the same share, however many images it has.
            for label, count in labels.items():
                self.other_source[label] = self.other_source.get(label, 0.0) + count / sum(labels.values())

    def draw(self, rng: random.Random, same_source: float = 0.35) -> Target | None:
        """A target without a mask, from the scene's own source with the given probability; `None` if there is none."""
        first, second = self.same_source, self.other_source
        if rng.random() >= same_source:
            first, second = second, first
        labels = first or second
        if not labels:
            return None
        label = rng.choices(list(labels), weights=list(labels.values()))[0]
        noun = readable(label.name)
        # Asking for several now and then keeps a plural from giving away that the thing is there.
        count = 2 if noun.kind == "count" and not label.owner and rng.random() < 0.15 else 1
        return Target(noun=noun, count=count, owner=readable(label.owner) if label.owner else None)

    def draw_part(self, rng: random.Random) -> Target | None:
        """A part of a thing that is absent itself: "the wing of the airplane"; `None` if there is none in `PARTS`."""
        labels = {**self.other_source, **self.same_source}
        owners = [label.name for label in labels if not label.owner and label.name in PARTS]
        if not owners:
            return None
        owner = rng.choice(owners)
        # Shared, so that the owner is named: another thing's wing may be there.
        return Target(noun=readable(rng.choice(PARTS[owner])), owner=readable(owner), shared=True)

    def _may_lack(self, label: Label, *, own: bool) -> bool:
        if label.name in self._taken:
            return False
        if not own and not self._scene.dense:
            return label.name in ELSEWHERE
        if not own and label.name in CARRIED and "person" in self._scene.names:
            return False
        if not label.owner:
            return True
        # Parts are missing for certain if they were looked for, or if there is nothing that could have them.
        return own and label.owner in self._scene.names or self._scene.dense and label.owner not in self._taken


def _check(annotation: Mapping[str, Any], by_id: Mapping[int, Mapping[str, Any]], size: list[int]) -> None:
    name = f"annotation {annotation['id']!r}"
    if annotation["level"] not in ("object", "stuff", "part"):
        raise ValueError(f"{name}: level {annotation['level']!r} is none of object, stuff, part")
    if annotation["level"] == "part" and annotation["parent_id"] not in by_id:
        raise ValueError(f"{name}: parent {annotation['parent_id']!r} is not in the same image")
    if list(check_size(annotation["segmentation"])) != size:
        raise ValueError(f"{name}: mask size {annotation['segmentation']['size']}, image size {size} (height, width)")
    if not decode_mask(annotation["segmentation"]).any():
        raise ValueError(f"{name}: empty mask")


def _instances(noun: Noun, members: Sequence[Mapping[str, Any]], owner: Noun | None) -> tuple[Target, ...]:
    """The instances of a label, from left to right; none if they are too many, too small, or not one thing each."""
    if noun.kind != "count" or not 2 <= len(members) <= MAX_INSTANCES:
        return ()
    if any(member.get("iscrowd") for member in members) or len({member["parent_id"] for member in members}) > 1:
        return ()
    targets = []
    limit = MIN_PART_AREA if owner else MIN_OBJECT_AREA
    for member in members:
        segmentation = member["segmentation"]
        if owner and _largest_share(decode_mask(segmentation)) < MIN_CONNECTED:
            return ()
        rle = _union([segmentation])
        area = int(mask_utils.area(rle))
        if area < limit:
            return ()
        targets.append(
            Target(
                noun=noun,
                owner=owner,
                mask={"size": list(segmentation["size"]), "counts": segmentation["counts"]},
                area=area,
                box=tuple(mask_utils.toBbox(rle).tolist()),
            )
        )
    return tuple(sorted(targets, key=lambda target: target.centre))


def _largest_share(mask: np.ndarray) -> float:
    """Share of the pixels of a mask that its largest connected piece has."""
    pieces, _ = ndimage.label(mask)
    return float(np.bincount(pieces[mask]).max() / mask.sum())


def _union(rles: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    return mask_utils.merge([{"size": rle["size"], "counts": rle["counts"].encode("ascii")} for rle in rles])
