"""Siblings of one label become one object, once and for all."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.config import GeometryConfig, MergingConfig
from mglmm.datasets_scripts.annotation.label_merge import (
    IRREGULAR,
    UNCHANGED,
    merge_siblings,
    merge_tree,
    normalize_label,
)
from mglmm.datasets_scripts.annotation.mask_tree import build_geometry
from mglmm.datasets_scripts.annotation.records import ROOT, Geometry, InputMask, Labels, Tree
from mglmm.processing.rle import decode_mask
from tests.datasets_scripts.conftest import box_rle

SIDE = 100
CONFIG = MergingConfig()
CAPLESS = GeometryConfig(min_area_share=0, max_level1=99, max_below_level1=99, max_nodes=99)
Thing = tuple[tuple[int, int, int, int], str]  # a box (xyxy, exclusive) and its label


def labelled(*things: Thing, geometry_config: GeometryConfig = CAPLESS) -> tuple[Geometry, Labels]:
    """Boxes and their labels: "?" is unlabelled, "!" failed, "~x" a weak x."""
    image = {"image_id": "sa_1", "file_name": "sa_1.jpg", "width": SIDE, "height": SIDE}
    masks = [InputMask(k, box_rle((SIDE, SIDE), box)) for k, (box, _) in enumerate(things)]
    objects: dict[str, Any] = {}
    for k, (_, text) in enumerate(things, 1):
        status = {"?": "unlabelled", "!": "failed", "~": "weak"}.get(text[0], "ok")
        label = text.lstrip("?!~")
        objects[f"m{k:04d}"] = {"label": label, "caption": f"Caption {k}.", "status": status, "flags": []}
    return build_geometry(image, masks, geometry_config), {"objects": objects, "exchanges": []}


def merged(*things: Thing, config: MergingConfig = CONFIG) -> Tree:
    return merge_tree(*labelled(*things), config)


def outline_of(tree: Tree) -> list[tuple[str, str, str, list[str]]]:
    return [(node["id"], node["label"], node["parent"], node["members"]) for node in tree["nodes"]]


HOUSE = ((0, 0, 60, 60), "house")
WINDOWS = [((5, 5, 15, 15), "window"), ((20, 5, 32, 15), "Windows"), ((40, 5, 50, 14), "the window")]
PANES = [((6, 6, 9, 9), "pane"), ((21, 6, 25, 9), "pane"), ((41, 6, 44, 8), "handle")]


def test_windows_of_a_house() -> None:
    tree = merged(HOUSE, *WINDOWS, *PANES, ((70, 0, 99, 20), "cloud"))
    house, cloud, windows, panes, handle = tree["nodes"]
    assert outline_of(tree) == [
        ("obj_1", "house", "root", ["m0001"]),
        ("obj_2", "cloud", "root", ["m0008"]),
        ("obj_3", "Windows", "obj_1", ["m0003", "m0002", "m0004"]),  # named by the largest, 120 pixels
        ("obj_4", "pane", "obj_3", ["m0006", "m0005"]),  # of two windows
        ("obj_5", "handle", "obj_3", ["m0007"]),
    ]
    assert (windows["count"], windows["caption"], windows["weak"]) == (3, "Caption 3.", False)
    assert (windows["bbox"], windows["area"]) == ([5, 5, 45, 10], 100 + 120 + 90)
    assert [node["children"] for node in tree["nodes"]] == [["obj_3"], [], ["obj_4", "obj_5"], [], []]
    united = np.zeros((SIDE, SIDE), dtype=bool)
    for (left, top, right, bottom), _ in WINDOWS:
        united[top:bottom, left:right] = True
    assert (decode_mask(windows["segmentation"]) == united).all()
    assert house["segmentation"] == box_rle((SIDE, SIDE), HOUSE[0]) and house["count"] == 1
    assert json.loads(json.dumps(tree)) == tree


def test_overlapping_members_are_counted_once() -> None:
    tree = merged(((0, 0, 10, 10), "leaf"), ((5, 0, 15, 10), "leaves"))
    assert [(node["area"], node["bbox"]) for node in tree["nodes"]] == [(150, [0, 0, 15, 10])]


@pytest.mark.parametrize(
    ("labels", "weak"),
    [
        (("~cat", "cat"), True),  # of the largest, whose caption is taken
        (("cat", "~cat"), False),
    ],
)
def test_weak_is_what_the_largest_member_is(labels: tuple[str, str], weak: bool) -> None:
    (node,) = merged(((0, 0, 20, 20), labels[0]), ((50, 50, 60, 60), labels[1]))["nodes"]
    assert (node["weak"], node["caption"], node["label"]) == (weak, "Caption 1.", "cat")


@pytest.mark.parametrize(
    ("things", "outline"),
    [
        # A leaf without a label is dropped.
        ([HOUSE, (WINDOWS[0][0], "?")], [("obj_1", "house", "root", ["m0001"])]),
        # One that failed, too.
        ([HOUSE, (WINDOWS[0][0], "!")], [("obj_1", "house", "root", ["m0001"])]),
        # What lies in an unlabelled one moves up.
        (
            [HOUSE, (WINDOWS[0][0], "?"), PANES[0]],
            [("obj_1", "house", "root", ["m0001"]), ("obj_2", "pane", "obj_1", ["m0003"])],
        ),
        # Through two levels, to the root.
        ([(HOUSE[0], "!"), (WINDOWS[0][0], "?"), PANES[0]], [("obj_1", "pane", "root", ["m0003"])]),
        # It is merged with its new siblings.
        (
            [(HOUSE[0], "?"), WINDOWS[0], ((70, 70, 95, 95), "window")],
            [("obj_1", "window", "root", ["m0003", "m0002"])],
        ),
        # Nothing is left.
        ([(HOUSE[0], "?"), WINDOWS[0][:1] + ("!",)], []),
    ],
)
def test_unlabelled_masks(things: list[Thing], outline: Any) -> None:
    assert outline_of(merged(*things)) == outline


PEOPLE = [((0, 0, 20, 40), "person"), ((30, 0, 50, 30), "man"), ((60, 0, 80, 35), "person"), ((2, 2, 9, 9), "hat")]


@pytest.mark.parametrize(
    ("config", "members"),
    [
        (MergingConfig(), [["m0001", "m0003"], ["m0002"], ["m0004"]]),
        (MergingConfig(no_merge_labels=("person",)), [["m0001"], ["m0003"], ["m0002"], ["m0004"]]),
        (MergingConfig(no_merge_labels=("People",)), [["m0001"], ["m0003"], ["m0002"], ["m0004"]]),  # in any form
        (MergingConfig(no_merge_labels=("hat",)), [["m0001", "m0003"], ["m0002"], ["m0004"]]),
        (MergingConfig(merge_level1=False), [["m0001"], ["m0003"], ["m0002"], ["m0004"]]),
    ],
)
def test_what_stays_apart(config: MergingConfig, members: list[list[str]]) -> None:
    assert [node["members"] for node in merged(*PEOPLE, config=config)["nodes"]] == members


def test_below_level_1_siblings_are_merged_all_the_same() -> None:
    tree = merged(HOUSE, *WINDOWS, config=MergingConfig(merge_level1=False))
    assert [node["count"] for node in tree["nodes"]] == [1, 3]


def test_things_of_one_label_under_different_parents_stay_apart() -> None:
    tree = merged(HOUSE, ((60, 60, 99, 99), "barn"), WINDOWS[0], ((70, 70, 80, 80), "window"))
    assert [(node["parent"], node["members"]) for node in tree["nodes"]][2:] == [
        ("obj_1", ["m0003"]),
        ("obj_2", ["m0004"]),
    ]


OUTER, PART = ((0, 0, 50, 20), "cake"), ((2, 2, 5, 5), "cherry")


@pytest.mark.parametrize(
    ("child", "config", "members"),
    [
        (((0, 0, 30, 20), "cakes"), CONFIG, [["m0001"], ["m0003"]]),  # 0.6 of its parent, the same label
        (((0, 0, 29, 20), "cake"), CONFIG, [["m0001"], ["m0002"], ["m0003"]]),  # smaller
        (((0, 0, 40, 20), "pie"), CONFIG, [["m0001"], ["m0002"], ["m0003"]]),  # another label
        (((0, 0, 40, 20), "cake"), replace(CONFIG, collapse_same_as_parent=False), [["m0001"], ["m0002"], ["m0003"]]),
    ],
)
def test_an_only_child_like_its_parent(child: Thing, config: MergingConfig, members: list[list[str]]) -> None:
    tree = merged(OUTER, child, PART, config=config)
    assert [node["members"] for node in tree["nodes"]] == members
    assert tree["nodes"][0]["area"] == 1000 and tree["nodes"][0]["count"] == 1  # of the parent alone


def test_a_child_with_siblings_is_not_collapsed() -> None:
    assert len(merged(OUTER, ((0, 0, 40, 20), "cake"), ((44, 5, 48, 9), "cherry"))["nodes"]) == 3


def test_a_chain_is_collapsed_as_far_as_its_top_goes() -> None:
    # 1000, 800, 640 and 500 pixels: the last has less than 0.6 of the first, if more of those between.
    chain = [((0, 0, 50, 20), "cake"), ((0, 0, 40, 20), "cake"), ((0, 0, 32, 20), "cake"), ((0, 0, 25, 20), "cake")]
    tree = merged(*chain)
    assert [node["members"] for node in tree["nodes"]] == [["m0001"], ["m0004"]]
    assert merge_siblings(tree, CONFIG) == tree


def test_what_moves_up_is_merged() -> None:
    tree = merged(OUTER, ((0, 0, 40, 20), "cake"), PART, ((9, 2, 12, 5), "cherry"))
    assert [node["members"] for node in tree["nodes"]] == [["m0001"], ["m0003", "m0004"]]


def test_members_that_merge_may_be_collapsed() -> None:
    tree = merged(OUTER, ((0, 0, 20, 20), "cake"), ((25, 0, 45, 20), "cake"))  # together 0.8 of their parent
    assert [node["members"] for node in tree["nodes"]] == [["m0001"]]


def test_more_than_nine_objects_are_numbered_in_order() -> None:
    things = [((10 * k, 0, 10 * k + 9, 90 - k), f"thing {chr(97 + k)}") for k in range(10)]
    inside = [((10 * k + 1, 1, 10 * k + 5, 20 - k), "knob") for k in range(10)]
    tree = merged(*things, *inside)
    assert [node["id"] for node in tree["nodes"]] == [f"obj_{k}" for k in range(1, 21)]
    assert [node["members"] for node in tree["nodes"]] == [[f"m{k:04d}"] for k in range(1, 21)]
    assert merge_siblings(tree, CONFIG) == tree


def test_merging_again_with_another_configuration() -> None:
    apart = merged(*PEOPLE, config=MergingConfig(merge_level1=False))
    assert merge_siblings(apart, CONFIG) == merged(*PEOPLE)


def test_no_masks() -> None:
    assert merged() == {"nodes": []} == merge_siblings({"nodes": []}, CONFIG)


# -- properties ----------------------------------------------------------------------------------------------------

BOXES = st.tuples(*[st.integers(0, 79)] * 2, *[st.integers(4, 60)] * 2).map(
    lambda b: (b[0], b[1], min(b[0] + b[2], SIDE), min(b[1] + b[3], SIDE))
)
THINGS = st.lists(
    st.tuples(BOXES, st.sampled_from(["cat", "Cats", "a dog", "box", "boxes", "~cat", "?", "!"])), max_size=16
)
CONFIGS = st.builds(
    MergingConfig,
    no_merge_labels=st.sampled_from([(), ("cat",), ("dog", "box")]),
    merge_level1=st.booleans(),
    collapse_same_as_parent=st.booleans(),
)


@settings(max_examples=150)
@given(THINGS, CONFIGS)
def test_merged_trees(things: list[Thing], config: MergingConfig) -> None:
    geometry, labels = labelled(*things)
    before = json.dumps([geometry, labels])
    tree = merge_tree(geometry, labels, config)
    assert json.dumps([geometry, labels]) == before  # the input is not changed
    text = json.dumps(tree)
    again = merge_siblings(tree, config)
    assert json.dumps(again) == text == json.dumps(tree)

    nodes = {node["id"]: node for node in tree["nodes"]}
    masks = {node["id"]: node for node in geometry["nodes"]}
    assert list(nodes) == [f"obj_{k}" for k in range(1, len(nodes) + 1)]
    for node in tree["nodes"]:
        largest = masks[node["members"][0]]
        assert node["members"] == sorted(node["members"], key=lambda name: (-masks[name]["area"], name))
        assert node["count"] == len(node["members"])
        label = labels["objects"][largest["id"]]
        assert (node["label"], node["caption"], node["weak"]) == (
            label["label"],
            label["caption"],
            label["status"] == "weak",
        )
        united = np.any([decode_mask(masks[name]["segmentation"]) for name in node["members"]], axis=0)
        assert (decode_mask(node["segmentation"]) == united).all() and node["area"] == united.sum()
        rows, columns = united.any(axis=1).nonzero()[0], united.any(axis=0).nonzero()[0]
        assert node["bbox"] == [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]

    # By levels, each parent before its children, who know it.
    order, level = [], [node for node in tree["nodes"] if node["parent"] == ROOT]
    while level:
        order += level
        level = [nodes[child] for node in level for child in node["children"]]
    assert order == tree["nodes"]
    assert all(nodes[child]["parent"] == node["id"] for node in order for child in node["children"])

    # No siblings of one label are left, but where they are to stay apart.
    for parent in [ROOT, *nodes]:
        named = [normalize_label(node["label"]) for node in tree["nodes"] if node["parent"] == parent]
        named = [label for label in named if label not in config.no_merge_labels]
        assert len(set(named)) == len(named) or (parent == ROOT and not config.merge_level1)

    # Every labelled mask is a member of one object, or was collapsed into one of its label.
    members = [member for node in tree["nodes"] for member in node["members"]]
    assert len(set(members)) == len(members)
    usable = {name for name in masks if labels["objects"][name]["status"] in ("ok", "weak")}
    gone = usable - set(members)
    assert set(members) <= usable and (config.collapse_same_as_parent or not gone)
    assert {normalize_label(labels["objects"][name]["label"]) for name in gone} <= {
        normalize_label(node["label"]) for node in tree["nodes"]
    }


@pytest.mark.parametrize(
    ("label", "normal"),
    [
        ("dog", "dog"),
        ("  Dog\tcollar ", "dog collar"),  # case and blanks
        ("the dogs", "dog"),  # article and plural
        ("A the cat", "cat"),  # more than one
        ("the", "the"),  # nothing else
        ("theatre", "theatre"),  # only begins like an article
        ("his hat", "hat"),  # possessive pronoun
        ("dog's collar", "dog collar"),  # possessive
        ("dogs' collars", "dog collar"),  # of several
        ("boss' chair", "boss chair"),
        ("cat\u2019s eye", "cat eye"),  # typographic apostrophe
        ("\uff24\uff4f\uff47", "dog"),  # full-width letters (NFKC)
        ("\ufb02owers", "flower"),  # a ligature
        ("parking meters", "parking meter"),  # the last word only
        ("glasses case", "glasses case"),
        ("t-shirts", "t-shirt"),
        ("people", "person"),  # irregular, of labels.py
        ("knives", "knife"),  # idem
        ("men", "man"),
        ("women", "woman"),
        ("children", "child"),
        ("feet", "foot"),
        ("teeth", "tooth"),
        ("leaves", "leaf"),
        ("olives", "olive"),  # not all of -ves
        ("berries", "berry"),
        ("ties", "tie"),  # short words in -ies
        ("cookies", "cookie"),  # and some long ones
        ("glass", "glass"),  # -ss
        ("glasses", "glasses"),  # not a glass
        ("sunglasses", "sunglass"),  # harmless: nothing else has that name
        ("dresses", "dress"),  # -sses
        ("houses", "house"),  # -ses of -se
        ("vases", "vase"),
        ("buses", "bus"),  # -ses of -s
        ("boxes", "box"),  # -xes
        ("benches", "bench"),  # -ches
        ("moustaches", "moustache"),
        ("dishes", "dish"),  # -shes
        ("cactus", "cactus"),  # -us
        ("tennis", "tennis"),  # -is
        ("skis", "ski"),
        ("tomatoes", "tomato"),
        ("shoes", "shoe"),
        ("lens", "lens"),  # no plural
        ("mens", "man"),  # a plural with an s too many
        ("tvs", "tv"),
        ("as", "as"),  # too short for a plural
        ("sheep", "sheep"),
        ("", ""),
        ("'s", ""),
    ],
)
def test_normalised_labels(label: str, normal: str) -> None:
    assert normalize_label(label) == normal
    assert normalize_label(normal) == normal


def test_the_lists_agree_with_themselves() -> None:
    for singular in {*IRREGULAR.values(), *UNCHANGED}:
        assert normalize_label(singular) == singular


WORDS = st.text("abhiexy's \u2019", max_size=12) | st.lists(st.sampled_from([*IRREGULAR, "a", "the", "s", "'s"])).map(
    " ".join
)


@settings(max_examples=400)
@given(WORDS)
def test_normalising_again_changes_nothing(label: str) -> None:
    once = normalize_label(label)
    assert normalize_label(once) == once
    assert normalize_label(f" THE {label} ") == once or once in ("", "the")


@given(st.text())
def test_any_text_is_normalised(label: str) -> None:
    assert normalize_label(label) == normalize_label(label).strip()
