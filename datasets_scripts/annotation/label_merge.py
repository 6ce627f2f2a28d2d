"""
Siblings of one label as one object: the windows of a house, the legs of a chair.

Merging is the only step of the tree that needs labels, so it comes after them (reference C.4).
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from mglmm.datasets_scripts import labels as dataset_labels
from mglmm.datasets_scripts.masks import union

from .config import MergingConfig
from .mask_tree import extent
from .records import ROOT, Geometry, Labels, Tree, TreeNode

COLLAPSED_AREA_RATIO = 0.6  # of an only child to its parent, from which on the two are one

DETERMINERS = frozenset("a an the this that these those some my your his her its our their".split())
# Plurals that the rules of `_singular` would get wrong.
IRREGULAR = {plural: singular for singular, plural in dataset_labels.IRREGULAR.items()} | {
    plural: singular
    for singular, plural in (
        pair.split("/")
        for pair in (
            "man/men woman/women child/children foot/feet tooth/teeth goose/geese ox/oxen cactus/cacti fungus/fungi "
            "leaf/leaves wolf/wolves loaf/loaves half/halves calf/calves scarf/scarves hoof/hooves thief/thieves "
            "wife/wives bus/buses gas/gases lens/lenses canvas/canvases atlas/atlases octopus/octopuses walrus/walruses "
            "cactus/cactuses iris/irises crocus/crocuses potato/potatoes tomato/tomatoes mango/mangoes hero/heroes "
            "buffalo/buffaloes volcano/volcanoes cookie/cookies brownie/brownies movie/movies hoodie/hoodies "
            "smoothie/smoothies beanie/beanies magpie/magpies necktie/neckties bowtie/bowties "
            "walkie-talkie/walkie-talkies mustache/mustaches moustache/moustaches niche/niches axe/axes "
            "ski/skis taxi/taxis bikini/bikinis kiwi/kiwis menu/menus emu/emus"
        ).split()
    )
}
# End in s and are no plural, or are another thing without it.
UNCHANGED = frozenset(
    "gas lens canvas atlas series species glasses eyeglasses spectacles goggles clothes shorts".split()
)


def normalize_label(label: str) -> str:
    """
    The form by which labels are compared: "The Dog's collars" -> "dog collar". Normalising it again changes nothing.

    NFKC, lower case, single blanks, no article or possessive, the last word in the singular.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", label).lower()).replace("\u2019", "'")
    words = [word for word in map(_without_possessive, text.split()) if word]
    while len(words) > 1 and words[0] in DETERMINERS:
        del words[0]
    return " ".join([*words[:-1], *map(_singular, words[-1:])])


def merge_tree(geometry: Geometry, labels: Labels, config: MergingConfig) -> Tree:
    """
    The objects of an image: its labelled masks, each in the next labelled one that contains it, merged by `merge_siblings`.

    Args:
        labels: Of every node of `geometry`. One that is `unlabelled` or `failed` is left out; what lies in it moves up.
    """
    top: list[_Object] = []
    parts_of = {ROOT: top}  # of each node: where the objects go that lie in it
    for node in geometry["nodes"]:  # parents come first
        label = labels["objects"][node["id"]]
        siblings = parts_of[node["parent"]]
        if label["status"] in ("unlabelled", "failed"):
            parts_of[node["id"]] = siblings
            continue
        found = _Object(
            {
                "id": node["id"],
                "members": [node["id"]],
                "count": 1,
                "label": label["label"],
                "caption": label["caption"],
                "weak": label["status"] == "weak",
                "parent": node["parent"],
                "children": [],
                "bbox": node["bbox"],
                "area": node["area"],
                "segmentation": node["segmentation"],
            }
        )
        siblings.append(found)
        parts_of[node["id"]] = found.children
    return _merged(top, config)


def merge_siblings(tree: Tree, config: MergingConfig) -> Tree:
    """
    One object for all children of a parent that have the same label (see `normalize_label`), from the root downwards: the
    union of their masks, with the label and caption of the largest and the children of all. Then, if the configuration says
    so, an only child that has its parent's label and most of its area is left out, and its children move up.

    Objects are numbered `obj_1`... by levels, siblings by (area descending, id of the first member). Merging again with the
    same configuration changes nothing.
    """
    objects = {node["id"]: _Object(node) for node in tree["nodes"]}
    for each in objects.values():
        each.children = [objects[child] for child in each.node["children"]]
    return _merged([each for each in objects.values() if each.node["parent"] == ROOT], config)


@dataclass
class _Object:
    """A node while the tree changes. What `node` says of its id, parent and children is what was before."""

    node: TreeNode
    children: list[_Object] = field(default_factory=list)

    @property
    def largest_first(self) -> tuple[int, str]:
        return -self.node["area"], self.node["members"][0]


def _merged(top: list[_Object], config: MergingConfig) -> Tree:
    kept_apart = frozenset(map(normalize_label, config.no_merge_labels))
    top = _grouped(top, kept_apart) if config.merge_level1 else _sorted(top)
    queue = deque(top)
    while queue:
        parent = queue.popleft()
        parent.children = _grouped(parent.children, kept_apart)
        while config.collapse_same_as_parent and len(parent.children) == 1 and _same(parent, parent.children[0]):
            parent.children = _grouped(parent.children[0].children, kept_apart)
        queue.extend(parent.children)
    return _numbered(top)


def _grouped(siblings: list[_Object], kept_apart: frozenset[str]) -> list[_Object]:
    """The siblings with one object for each label, but for labels that are kept apart."""
    groups: defaultdict[tuple[str, int], list[_Object]] = defaultdict(list)
    for position, sibling in enumerate(_sorted(siblings)):
        label = normalize_label(sibling.node["label"])
        groups[label, position if label in kept_apart else -1].append(sibling)
    return _sorted(map(_united, groups.values()))


def _united(group: list[_Object]) -> _Object:
    """One object for several, the largest of which comes first."""
    if len(group) == 1:
        return group[0]
    segmentation = union(each.node["segmentation"] for each in group)
    bbox, area = extent(segmentation)
    members = [member for each in group for member in each.node["members"]]
    count = sum(each.node["count"] for each in group)
    node: TreeNode = {
        **group[0].node,
        "members": members,
        "count": count,
        "bbox": bbox,
        "area": area,
        "segmentation": segmentation,
    }
    return _Object(node, [child for each in group for child in each.children])


def _same(parent: _Object, child: _Object) -> bool:
    labels = {normalize_label(each.node["label"]) for each in (parent, child)}
    return len(labels) == 1 and child.node["area"] >= COLLAPSED_AREA_RATIO * parent.node["area"]


def _numbered(top: list[_Object]) -> Tree:
    """The tree by levels, with its final ids."""
    nodes: list[TreeNode] = []
    order = [(ROOT, each) for each in top]
    for number, (parent, each) in enumerate(order, 1):
        first_child = len(order) + 1
        order += [(f"obj_{number}", child) for child in each.children]  # the loop goes on with them
        children = [f"obj_{k}" for k in range(first_child, len(order) + 1)]
        nodes.append({**each.node, "id": f"obj_{number}", "parent": parent, "children": children})
    return {"nodes": nodes}


def _sorted(objects: Iterable[_Object]) -> list[_Object]:
    return sorted(objects, key=lambda each: each.largest_first)


def _without_possessive(word: str) -> str:
    """The owner alone: of "dog's" as of "dogs'" it is "dog"."""
    owner = re.sub(r"('s?)+$", "", word)
    return _singular(owner) if word.endswith("s'") else owner


def _singular(word: str) -> str:
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) < 3 or not word.endswith("s") or word.endswith(("ss", "us", "is")) or word in UNCHANGED:
        return word
    if word.endswith("ies") and len(word) > 4:  # not "pies" and "ties"
        return f"{word[:-3]}y"
    # Of "-ses" only the s goes, unlike in the reference: most come from "-se", as houses, horses and vases do.
    stem = word[: -2 if word.endswith(("sses", "xes", "ches", "shes")) else -1]
    return IRREGULAR.get(stem, stem)  # "mens" is as wrong as it is frequent
