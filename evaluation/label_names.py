"""The classes of COCO panoptic and ADE20K, found again in what a model says."""

from __future__ import annotations

from collections.abc import Iterable

from mglmm.datasets_scripts.labels import SYNONYMS, Noun, readable
from mglmm.datasets_scripts.semantic import ADE_NAMES, COCO_STUFF_NAMES, COCO_THINGS
from mglmm.evaluation.text_similarity import DETERMINERS

# Numbers that COCO never gave to an annotated thing.
_UNUSED = frozenset("street sign,hat,shoe,eye glasses,plate,mirror,window,desk,door,blender,hair brush".split(","))
_PANOPTIC_STUFF = (
    "banner blanket bridge cardboard counter curtain door-stuff floor-wood flower fruit gravel house light mirror-stuff "
    "net pillow platform playingfield railroad river road roof sand sea shelf snow stairs tent towel wall-brick "
    "wall-stone wall-tile wall-wood water-other window-blind window-other tree-merged fence-merged ceiling-merged "
    "sky-other-merged cabinet-merged table-merged floor-other-merged pavement-merged mountain-merged grass-merged "
    "dirt-merged paper-merged food-other-merged building-other-merged rock-merged wall-other-merged rug-merged"
).split()
COCO_PANOPTIC_LABELS = (*(name for name in COCO_STUFF_NAMES[:COCO_THINGS] if name not in _UNUSED), *_PANOPTIC_STUFF)
"""The 133 in the order of their numbers."""
ADE20K_LABELS = ADE_NAMES
"""The 150 in the order of their numbers."""


class LabelNames:
    """
    Finds the label that a phrase means: articles, quantities, case and number do not matter, and the other words for a
    thing that `mglmm prepare` uses in questions count, too.

    Args:
        labels: Of a dataset. Of labels that read alike the first counts.

    Example:
        >>> LabelNames(["couch", "wall-brick"]).find("two sofas"), LabelNames(["couch"]).find("a cloud")
        (0, None)
    """

    def __init__(self, labels: Iterable[str]) -> None:
        nouns = [readable(label) for label in labels]
        self._index: dict[str, int] = {}
        for index, noun in enumerate(nouns):
            self._add(noun, index)
        for index, noun in enumerate(nouns):
            for name in SYNONYMS.get(noun.name, ()):
                self._add(Noun(name, noun.kind), index)

    def _add(self, noun: Noun, index: int) -> None:
        for count in (1, 2):
            self._index.setdefault(noun.bare(count), index)

    def find(self, phrase: str) -> int | None:
        """Index of the label; `None` for a phrase that means none of them."""
        words = phrase.casefold().strip(" \t\n.,;:!?").split()
        while len(words) > 1 and words[0] in DETERMINERS:
            words = words[1:]
        return self._index.get(" ".join(words))
