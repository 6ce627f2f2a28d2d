import base64
import io
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import PIL.Image
import pytest

from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.fine_grained import Dci, Osprey, converse
from tests.datasets_scripts.conftest import box_rle, polygon

SIZE = (40, 60)
MAN, DOG, HAT, BAND = (5, 5, 15, 38), (30, 10, 50, 30), (6, 4, 14, 9), (6, 8, 14, 9)


def osprey(*segmentations: Any, **content: Any) -> dict:
    return {
        "file_name": "000000000009.jpg",
        "height": 40,
        "width": 60,
        "annotation": [{"segmentation": segmentation, "bbox": [0, 0, 1, 1]} for segmentation in segmentations],
        **content,
    }


def talk(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(values)]


def only(builder: UscdfBuilder) -> list[dict]:
    """Every row."""
    items = [item for of_split in builder.split_items().values() for item in of_split]
    builder.skipped.clear()  # of missing files
    return [row for item in items for row in builder.usable_rows(item)]


# Osprey

COCO_IMAGE = "coco/train2017/000000000009.jpg"
CONVERSATION = "osprey/osprey_conversation.json"
DETAIL = "osprey/osprey_detail_description.json"


def test_a_conversation_says_where_its_regions_are(write_family: Callable[..., UscdfBuilder]) -> None:
    messages = talk(
        "What does region1 do with <region2>?",
        "The man in <region1> walks the dog in <region2>.",
        "Is region2 big?",
        "region2 is small.",
    )
    entry = osprey([polygon(MAN)], [polygon(DOG)], conversations=messages)
    builder = write_family(Osprey, {CONVERSATION: [entry]}, COCO_IMAGE, variants=2)
    assert builder.split_items() == {"train": [("conversation", 0)]}
    assert builder.skipped == {
        f"no file osprey_{kind}.json": 1
        for kind in ("detail_description", "part_level", "short_form", "lvis_positive_negative")
    }
    (row,) = builder.usable_rows(("conversation", 0))  # its questions are given: one row, whatever the variants
    assert row == {
        "image": str(builder.data_dir / COCO_IMAGE),
        "image_id": "000000000009",
        "source": "osprey_conversation",
        "task": "region",
        "messages": [
            {
                "role": "user",
                "content": "<image>\nThe picture has region1 at <region>. What does region1 do with region2 <region>?",
            },
            {"role": "assistant", "content": "The man in region1 walks the dog in region2."},
            {"role": "user", "content": "Is region2 big?"},
            {"role": "assistant", "content": "region2 is small."},
        ],
        "masks": [],
        "regions": [[5.0, 5.0, 15.0, 38.0], [30.0, 10.0, 50.0, 30.0]],
        "ignore_mask": None,
    }


BOXES = [(0.0, 0.0, 9.0, 9.0), (1.0, 1.0, 9.0, 9.0), (2.0, 2.0, 9.0, 9.0)]


@pytest.mark.parametrize(
    ("messages", "boxes", "questions", "regions"),
    [
        # no question says where: the first one does
        (
            talk("What is it?", "A.", "Why?", "B."),
            3,
            [
                "The picture has region1 at <region>, region2 at <region> and region3 at <region>. What is it?",
                "Why?",
            ],
            [(0, 1, 2), ()],
        ),
        # positive and negative questions of LVIS: in brackets, in any order
        (
            talk("Is <region2> a cat?", "No.", "Is <region1> a cat? Or <region2>?", "Yes."),
            2,
            ["Is region2 <region> a cat?", "Is region1 <region> a cat? Or region2?"],
            [(1,), (0,)],
        ),
        # placeholders, as the published code writes them
        (
            talk("There are region1<mask><pos>, region2<mask><pos>. What are they?", "A.", "Is <region1> big?", "B."),
            2,
            ["There are region1 <region>, region2 <region>. What are they?", "Is region1 big?"],
            [(0, 1), ()],
        ),
        (talk("What is in <mask><pos>?", "A."), 1, ["What is in <region>?"], [(0,)]),
        (
            talk("What is <region1><mask><pos>?", "A.", "And <mask><pos>?", "B."),
            2,
            ["What is region1 <region>?", "And <region>?"],
            [(0,), (1,)],
        ),
        # tokens of ours that an annotator typed
        (talk("What is <region>?", "A <p>."), 1, ["The picture has region1 at <region>. What is < region>?"], [(0,)]),
    ],
)
def test_places_of_regions(messages: list, boxes: int, questions: list[str], regions: list[tuple[int, ...]]) -> None:
    turns = converse(random.Random(0), messages, BOXES[:boxes])
    assert [turn.question for turn in turns] == questions
    assert [turn.regions for turn in turns] == [tuple(BOXES[index] for index in of_turn) for of_turn in regions]


@pytest.mark.parametrize("kind", ["part_level", "short_form"])
def test_short_answers_are_asked_for(write_family: Callable[..., UscdfBuilder], kind: str) -> None:
    entry = osprey([polygon(MAN)], conversations=talk("What part is region1?", "Arm.", "Its colour?", "Red."))
    (row,) = only(write_family(Osprey, {f"osprey/osprey_{kind}.json": [entry]}, COCO_IMAGE))
    assert row["source"] == f"osprey_{kind}"
    assert row["messages"] == [
        {
            "role": "user",
            "content": f"<image>\nThe picture has region1 at <region>. What part is region1? {TAILS[kind]}",
        },
        {"role": "assistant", "content": "Arm."},
        {"role": "user", "content": f"Its colour? {TAILS[kind]}"},
        {"role": "assistant", "content": "Red."},
    ]


TAILS = {"part_level": "Keep the answer very short.", "short_form": "A word or two will do."}


def test_descriptions_are_questions_about_each_region(write_family: Callable[..., UscdfBuilder]) -> None:
    entry = osprey(
        [polygon(MAN)],
        {"size": [40, 60], "counts": [0, 2400]},  # uncompressed RLE
        box_rle(SIZE, HAT),
        description=["<region1>: A man.\n\nHe walks.", "<region2>: All of it.", "<region3>: A hat: red."],
    )
    rows = only(write_family(Osprey, {DETAIL: [entry]}, COCO_IMAGE, variants=2))
    assert len(rows) == 2
    assert rows[0]["messages"] == [
        {"role": "user", "content": "<image>\nDescribe <region> in detail"},
        {"role": "assistant", "content": "A man.\n\nHe walks."},
        {"role": "user", "content": "How does <region> look? Go into detail."},
        {"role": "assistant", "content": "All of it."},
        {"role": "user", "content": "What can you say about <region>? Be thorough"},
        {"role": "assistant", "content": "A hat: red."},
    ]
    assert rows[0]["regions"] == [[5.0, 5.0, 15.0, 38.0], [0.0, 0.0, 60.0, 40.0], [6.0, 4.0, 14.0, 9.0]]
    assert rows[1]["messages"] != rows[0]["messages"]


def test_ten_descriptions_make_a_row(write_family: Callable[..., UscdfBuilder]) -> None:
    names = [f"<region{number}>: thing {number}" for number in range(1, 13)]
    entry = osprey(*[[polygon(MAN)]] * 12, description=names)
    rows = only(write_family(Osprey, {DETAIL: [entry]}, COCO_IMAGE))
    assert [len(row["regions"]) for row in rows] == [10, 2]


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("COCO_train2014_000000000009.jpg", "coco/train2014/COCO_train2014_000000000009.jpg"),
        ("000000000009.jpg", "coco/train2014/COCO_train2014_000000000009.jpg"),
        ("COCO_train2014_000000000009.jpg", "train2017/000000000009.jpg"),
        ("COCO_train2014_000000000009.jpg", "coco_2017/val2017/000000000009.jpg"),
        ("000000000009.jpg", "coco_2017/val2017/000000000009.jpg"),
    ],
)
@pytest.mark.parametrize("file", [CONVERSATION, "osprey/less/osprey_conversation_100.json", "osprey_conversation.json"])
def test_layouts_of_osprey(write_family: Callable[..., UscdfBuilder], name: str, image: str, file: str) -> None:
    entry = osprey([polygon(MAN)], file_name=name, conversations=talk("What is region1?", "A man."))
    (row,) = only(write_family(Osprey, {file: [entry]}, image))
    assert row["image"].endswith(image)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (osprey([polygon(MAN)], conversations=talk("What?")), "conversation without an answer"),
        (osprey([polygon(MAN)], conversations=[]), "conversation without a question"),
        (
            osprey([polygon(MAN)], conversations=talk("<mask><pos> or <mask><pos>?", "A.")),
            "number of placeholders differs from the number of regions",
        ),
        (
            osprey([polygon(MAN)], conversations=talk("What is <region2>?", "A.")),
            "question about a region that is not there",
        ),
        (osprey([[1, 2, 3, 4]], conversations=talk("What?", "A.")), "polygon of fewer than three points"),
        (osprey([], conversations=talk("What?", "A.")), "empty segmentation"),
        (
            osprey([polygon(MAN)], conversations=talk("What?", "A."), height=41),
            "image size differs from its annotation",
        ),
        (osprey([polygon(MAN)], conversations=talk("What?", "A."), file_name="1.jpg"), "image file is missing"),
        (osprey([polygon(MAN)], conversations=talk("What?", "A."), file_name="../../1.jpg"), "image file is missing"),
        (osprey([polygon(MAN)]), "missing field 'conversations'"),
    ],
)
def test_a_broken_conversation_is_counted(write_family: Callable[..., UscdfBuilder], entry: dict, reason: str) -> None:
    builder = write_family(Osprey, {CONVERSATION: [entry]}, COCO_IMAGE, "1.jpg")
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("segmentation", "description", "reason"),
    [
        ([polygon(MAN)], "A man.", "description of no region"),
        ([polygon(MAN)], "<region3>: A man.", "description of no region"),
        ([polygon(MAN)], "<region0>: A man.", "description of no region"),
        ([polygon(MAN)], "<region1>: ", "description of no region"),
        ([[1, 2, 3, 4]], "<region1>: A man.", "polygon of fewer than three points"),
        ([polygon((0, 0, 0, 9))], "<region1>: A man.", "empty mask"),
    ],
)
def test_a_broken_description_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], segmentation: Any, description: str, reason: str
) -> None:
    entry = osprey(segmentation, [polygon(DOG)], description=[description, "<region2>: A dog."])
    builder = write_family(Osprey, {DETAIL: [entry]}, COCO_IMAGE)
    (row,) = only(builder)
    assert (row["messages"][1]["content"], row["regions"]) == ("A dog.", [[30.0, 10.0, 50.0, 30.0]])
    assert builder.skipped == {reason: 1}


def test_osprey_needs_images_of_coco(write_family: Callable[..., UscdfBuilder]) -> None:
    builder = write_family(Osprey, {CONVERSATION: []})
    with pytest.raises(FileNotFoundError, match="coco/train2014"):
        builder.split_items()


# DCI


def png(box: tuple[int, int, int, int], mode: str = "1", size: tuple[int, int] = SIZE) -> str:
    mask = np.zeros(size, dtype=np.uint8)
    mask[box[1] : box[3], box[0] : box[2]] = 1
    image = PIL.Image.fromarray(mask * 255).convert("1") if mode == "1" else PIL.Image.fromarray(mask)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def node(number: int, label: str, caption: str, parent: int, box: Any, /, **change: Any) -> dict:
    return {
        "idx": number,
        "label": label,
        "caption": caption,
        "parent": parent,
        "outer_mask": png(box),
        "area": 1,
        "bounds": {"topLeft": {"x": 0, "y": 0}, "bottomRight": {"x": 1, "y": 1}},
        "requirements": [],
        "mask_quality": 0,
        **change,
    }


def dci(*nodes: dict, **change: Any) -> dict:
    return {
        "image": "sa_1.jpg",
        "width": 60,
        "height": 40,
        "short_caption": "A man and a dog.",
        "extra_caption": "A man walks his dog at night.",
        "mask_data": {str(mask["idx"]): mask for mask in nodes},
        "mask_keys": [str(mask["idx"]) for mask in nodes],
        **change,
    }


TREE = dci(
    node(0, "Man", "He wears a hat.", -1, MAN),
    node(1, "A dog.", "It is brown", -1, DOG),
    node(2, "Hat", "It is red.", 0, HAT),
    node(3, "Band of the hat", "", 0, BAND, outer_mask=png(BAND, "L")),
)
DCI_TRAIN, SAM_IMAGE = "DCI/train/sa_1.json", "SegmentAnything/imgs/sa_1.jpg"


def test_a_tree_of_masks_is_a_conversation(write_family: Callable[..., UscdfBuilder]) -> None:
    builder = write_family(Dci, {DCI_TRAIN: TREE}, SAM_IMAGE)
    assert builder.split_items() == {"train": [("train", "sa_1.json")]}
    assert builder.skipped == {"split validation without annotations": 1}
    (row,) = builder.usable_rows(("train", "sa_1.json"))
    assert row == {
        "image": str(builder.data_dir / SAM_IMAGE),
        "image_id": "sa_1",
        "source": "dci",
        "task": "fine",
        "messages": [
            {"role": "user", "content": "<image>\nWalk me through this scene and outline what you name."},
            {
                "role": "assistant",
                "content": "A man walks his dog at night. More about what is there: <p> man </p> [SEG]: He wears a hat. "
                "<p> a dog </p> [SEG]: It is brown.",
            },
            {"role": "user", "content": "Please segment the man part by part."},
            {
                "role": "assistant",
                "content": "He wears a hat. Here is what can be seen: <p> hat </p> [SEG]: It is red. "
                "<p> band of the hat </p> [SEG].",
            },
        ],
        "masks": [box_rle(SIZE, box) for box in (MAN, DOG, HAT, BAND)],
        "regions": [],
        "ignore_mask": None,
    }


def test_a_validation_row_has_one_question(write_family: Callable[..., UscdfBuilder]) -> None:
    builder = write_family(Dci, {"val/sa_1.json": TREE}, SAM_IMAGE, variants=2)
    assert builder.split_items() == {"validation": [("validation", "sa_1.json")]}
    rows = only(builder)
    assert [(row["task"], len(row["messages"]), len(row["masks"])) for row in rows] == [
        ("panoptic", 2, 2),
        ("fine", 2, 2),
    ]


def test_two_masks_are_asked_about(write_family: Callable[..., UscdfBuilder]) -> None:
    nodes = [node(number, f"thing {number}", "", -1, MAN) for number in range(3)]
    nodes += [node(10 + number, f"part {number}", "", number % 3, HAT) for number in range(6)]
    rows = only(write_family(Dci, {DCI_TRAIN: dci(*nodes)}, SAM_IMAGE, variants=4))
    assert [len(row["messages"]) for row in rows] == [6] * 4
    assert len({row["messages"][2]["content"] + row["messages"][4]["content"] for row in rows}) > 1


def test_the_largest_masks_are_named_in_their_order(write_family: Callable[..., UscdfBuilder]) -> None:
    nodes = [node(number, f"thing {number}", "", -1, (0, 0, 5 + number, 20)) for number in range(12)]
    (row,) = only(write_family(Dci, {DCI_TRAIN: dci(*nodes)}, SAM_IMAGE))
    assert row["masks"] == [box_rle(SIZE, (0, 0, 5 + number, 20)) for number in range(2, 12)]


def lies_in(builder: UscdfBuilder) -> dict[str, list[str]]:
    """Labels in each answer: of the image and of every mask that is asked about, by its question."""
    answers = [row["messages"][1]["content"] for row in only(builder)]
    return {answer.split(".")[0]: [part.split(" </p>")[0] for part in answer.split("<p> ")[1:]] for answer in answers}


@pytest.mark.parametrize(
    ("nodes", "tree"),
    [
        # below a poor mask: in the next good one above it
        (
            [
                node(0, "man", "man", -1, MAN),
                node(1, "coat", "coat", 0, MAN, mask_quality=1),
                node(2, "sleeve", "sleeve", 1, MAN, mask_quality=2),
                node(3, "button", "button", 2, HAT),
                node(4, "hat", "hat", 0, HAT),
            ],
            {"image": ["man"], "man": ["button", "hat"]},
        ),
        # and below none: in the image
        (
            [node(0, "man", "man", -1, MAN, mask_quality=1), node(1, "hat", "hat", 0, HAT)],
            {"image": ["hat"]},
        ),
        # a parent that is not listed, a mask in itself, and two in each other
        (
            [
                node(0, "man", "man", 77, MAN),
                node(1, "hat", "hat", 1, HAT),
                node(2, "dog", "dog", 3, DOG, mask_quality=1),
                node(3, "leg", "leg", 2, DOG, mask_quality=1),
                node(4, "paw", "paw", 3, DOG),
            ],
            {"image": ["man", "hat", "paw"]},
        ),
        # a mask with one part is not asked about
        ([node(0, "man", "man", -1, MAN), node(1, "hat", "hat", 0, HAT)], {"image": ["man"]}),
    ],
)
def test_trees(write_family: Callable[..., UscdfBuilder], nodes: list[dict], tree: dict[str, list[str]]) -> None:
    builder = write_family(Dci, {"DCI/val/sa_1.json": dci(*nodes, extra_caption="image")}, SAM_IMAGE)
    assert lies_in(builder) == tree
    poor = sum(mask["mask_quality"] > 0 for mask in nodes)
    assert builder.skipped == ({"mask of poor quality": poor} if poor else {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"outer_mask": "AAAA"}, "mask is no PNG as base64 (UnidentifiedImageError)"),
        ({"outer_mask": "AAAAA"}, "mask is no PNG as base64 (Error)"),
        ({"outer_mask": png(HAT)[:80]}, "mask is no PNG as base64 (OSError)"),
        ({"outer_mask": png(HAT, size=(60, 40))}, "mask size differs from the image size"),
        ({"outer_mask": png((0, 0, 0, 0))}, "empty mask"),
        ({"label": " "}, "empty phrase"),
        ({"mask_quality": 2}, "mask of poor quality"),
    ],
)
def test_a_broken_mask_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], change: dict[str, Any], reason: str
) -> None:
    content = dci(node(0, "man", "", -1, MAN), node(1, "hat", "", -1, HAT, **change))
    builder = write_family(Dci, {DCI_TRAIN: content}, SAM_IMAGE)
    (row,) = only(builder)
    assert row["masks"] == [box_rle(SIZE, MAN)]
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("content", "reasons"),
    [
        (dci(), {"image without a usable mask": 1}),
        (dci(node(0, "man", "", -1, MAN), image="sa_2.jpg"), {"image file is missing": 1}),
        (dci(node(0, "man", "", -1, MAN), image="../../../s.jpg"), {"image file name leads out of the data folder": 1}),
        (dci(node(0, "man", "", -1, MAN), extra_caption=" ", short_caption=""), {"empty caption": 1}),
        ({"image": "sa_1.jpg"}, {"missing field 'mask_data'": 1}),
    ],
)
def test_a_broken_file_is_counted(
    write_family: Callable[..., UscdfBuilder], content: dict, reasons: dict[str, int]
) -> None:
    builder = write_family(Dci, {DCI_TRAIN: content}, SAM_IMAGE)
    assert only(builder) == []
    assert builder.skipped == reasons


def test_the_short_caption_stands_in(write_family: Callable[..., UscdfBuilder]) -> None:
    (row,) = only(write_family(Dci, {DCI_TRAIN: dci(node(0, "man", "", -1, MAN), extra_caption="")}, SAM_IMAGE))
    assert row["messages"][1]["content"].startswith("A man and a dog. ")


def test_dci_needs_annotations(write_family: Callable[..., UscdfBuilder]) -> None:
    builder = write_family(Dci, {}, SAM_IMAGE)
    with pytest.raises(ValueError, match="no usable item"):
        builder.split_items()
