import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.grandf import (
    GrandfFlickr30k,
    GrandfHuman,
    GrandfOpenPsg,
    GrandfRefcocog,
    locate,
    occurrences,
)
from mglmm.datasets_scripts.masks import union
from tests.datasets_scripts.conftest import box_rle, polygon

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
SIZE = (40, 60)
MAN, DOG, HAT = (5, 5, 15, 38), (30, 10, 50, 30), (6, 4, 14, 9)
CAPTION = "A man in a red hat walks his dog."


def grounding(start: int, end: int, *boxes: tuple[int, int, int, int]) -> dict:
    return {"token_positives": [start, end], "rle_masks": [box_rle(SIZE, box) for box in boxes]}


def human(caption: str, groundings: Any, /, **change: Any) -> dict:
    """An entry of the human annotated part and of OpenPSG."""
    entry = {"file_name": "sa_1.jpg", "height": 40, "width": 60, "image_id": "sa_1", "caption": caption}
    return {**entry, "groundings": groundings, **change}


def flickr(caption: str, annotations: list[dict], **change: Any) -> dict:
    image = {"id": 3, "file_name": "36979.jpg", "height": 40, "width": 60, "caption": caption, **change}
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}


def said(number: int, start: int, end: int, box: tuple[int, int, int, int], **change: Any) -> dict:
    """An annotation of the Flickr30k part."""
    left, top, right, bottom = box
    annotation = {
        "id": number,
        "image_id": 3,
        "bbox": [left, top, right - left, bottom - top],
        "area": 1,
        "iscrowd": 0,
        "category_id": 1,
        "tokens_positive": [[start, end]],
        "sam_mask": box_rle(SIZE, box),
    }
    return {**annotation, **change}


def refcocog(caption: str, *references: tuple[str, tuple[int, int, int, int]], **change: Any) -> dict:
    refs = [
        {"ref_id": number, "ann_id": number, "sentence": sentence, "segmentation": [polygon(box)], "bbox": [0, 0, 1, 1]}
        for number, (sentence, box) in enumerate(references)
    ]
    name = "COCO_train2014_000000000009.jpg"
    return {"9": {"img_file_name": name, "caption": caption, "refs": refs, **change}}


def only(builder: UscdfBuilder) -> list[tuple[str, list[dict]]]:
    """Answer and masks of every row."""
    items = [item for of_split in builder.split_items().values() for item in of_split]
    builder.skipped.clear()  # of missing splits
    rows = [row for item in items for row in builder.usable_rows(item)]
    return [(row["messages"][1]["content"], row["masks"]) for row in rows]


HA = "GranDf/annotations/train/GranDf_HA_GCG_train.json"
HA_IMAGE = "GranDf/GranDf_HA_images/train/sa_1.jpg"
FLICKR = "GranDf/annotations/train/flickr_mergedGT_GCG_train.json"
FLICKR_IMAGE = "flickr_30k/images/36979.jpg"
REFCOCOG = "GranDf/annotations/train/RefCOCOg_GCG_train.json"
REFCOCOG_IMAGE = "coco/train2014/COCO_train2014_000000000009.jpg"


def test_a_human_annotated_caption(write_family: Callable[..., UscdfBuilder]) -> None:
    groundings = {"his dog": grounding(25, 32, DOG), "A man in a red hat": grounding(0, 18, MAN, HAT)}
    builder = write_family(GrandfHuman, {HA: [human(CAPTION, groundings)]}, HA_IMAGE, variants=2)
    assert builder.split_items() == {"train": [("train", 0)]}
    assert builder.skipped == {f"split {x} without annotations or images": 1 for x in ("validation", "test")}
    builder.skipped.clear()
    first, second = builder.usable_rows(("train", 0))
    assert first == {
        "image": str(builder.data_dir / HA_IMAGE),
        "image_id": "sa_1",
        "source": "grandf_human",
        "task": "grounded_caption",
        "messages": [
            {"role": "user", "content": "<image>\nCould you describe this scene with a mask for each phrase?"},
            {
                "role": "assistant",
                "content": "<p> A man in a red hat </p> [SEG] walks <p> his dog </p> [SEG].",
            },
        ],
        # Several masks of a phrase are one, whose pixels the published code adds up to 2.
        "masks": [union([box_rle(SIZE, MAN), box_rle(SIZE, HAT)]), box_rle(SIZE, DOG)],
        "regions": [],
        "ignore_mask": None,
    }
    assert second["messages"][1] == first["messages"][1]
    assert second["messages"][0] != first["messages"][0]
    assert builder.skipped == {}


@pytest.mark.parametrize(
    ("caption", "start", "end"),
    [
        (CAPTION, 25, 32),
        (f'"{CAPTION}"', 25, 32),  # offsets into the caption without its quote
        (f'"{CAPTION}"', 26, 33),  # and with it
        (f'  "{CAPTION}"\n', 28, 35),
        (f"  {CAPTION} ", 25, 32),
        (CAPTION, 24, 32),  # with the blank before it
        (CAPTION, 3, 9),  # wrong: where the caption says the phrase
        (CAPTION, 90, 99),
        (CAPTION, -1, -1),
    ],
)
def test_offsets_are_checked(write_family: Callable[..., UscdfBuilder], caption: str, start: int, end: int) -> None:
    builder = write_family(GrandfHuman, {HA: [human(caption, {"his dog": grounding(start, end, DOG)})]}, HA_IMAGE)
    assert only(builder) == [("A man in a red hat walks <p> his dog </p> [SEG].", [box_rle(SIZE, DOG)])]
    assert builder.skipped == {}


@pytest.mark.parametrize(
    ("groundings", "answer", "boxes", "skipped"),
    [
        # a tag in a tag: the longest phrase stays, with its mask
        (
            {
                "man": grounding(2, 5, MAN),
                "A man in a red hat": grounding(0, 18, DOG),
                "a red hat": grounding(9, 18, HAT),
            },
            "<p> A man in a red hat </p> [SEG] walks his dog.",
            [DOG],
            {"phrase that overlaps a longer one": 2},
        ),
        # two phrases of one place: one mask
        (
            {"his dog": grounding(25, 32, DOG), "His dog": grounding(25, 32, HAT)},
            "A man in a red hat walks <p> his dog </p> [SEG].",
            [DOG, HAT],
            {},
        ),
        # a phrase that is not in the caption goes with its mask
        (
            {"a cat": grounding(0, 5, MAN), "his dog": grounding(25, 32, DOG)},
            "A man in a red hat walks <p> his dog </p> [SEG].",
            [DOG],
            {"phrase is not in its caption": 1},
        ),
        # the words "his do" are no phrase of this caption: phrases are whole words
        (
            {"his do": grounding(-1, -1, MAN), "dog": grounding(29, 32, DOG)},
            "A man in a red hat walks his <p> dog </p> [SEG].",
            [DOG],
            {"phrase is not in its caption": 1},
        ),
    ],
)
def test_overlaps_and_lost_phrases(
    write_family: Callable[..., UscdfBuilder], groundings: dict, answer: str, boxes: list, skipped: dict[str, int]
) -> None:
    builder = write_family(GrandfHuman, {HA: [human(CAPTION, groundings)]}, HA_IMAGE)
    assert only(builder) == [(answer, [union(box_rle(SIZE, box) for box in boxes)])]
    assert builder.skipped == skipped


DOG_SAID = {"his dog": grounding(25, 32, DOG)}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"token_positives": [2, 5], "rle_masks": []}, "empty segmentation"),
        ({"token_positives": [2, 5], "rle_masks": [{"size": [40, 60], "counts": [2400]}]}, "empty mask"),
        ({"token_positives": [2, 5], "rle_masks": [box_rle((60, 40), MAN)]}, "mask size differs from the image size"),
        ({"token_positives": [2, 5]}, "missing field 'rle_masks'"),
        ({"rle_masks": [box_rle(SIZE, MAN)]}, "missing field 'token_positives'"),
        ({"token_positives": [2], "rle_masks": []}, "malformed annotation (IndexError: list index out of range)"),
    ],
)
def test_a_broken_grounding_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], bad: dict, reason: str
) -> None:
    builder = write_family(GrandfHuman, {HA: [human(CAPTION, {"man": bad, **DOG_SAID})]}, HA_IMAGE)
    assert only(builder) == [("A man in a red hat walks <p> his dog </p> [SEG].", [box_rle(SIZE, DOG)])]
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("change", "size", "reason"),
    [
        ({"groundings": {}}, SIZE, "caption without a grounded phrase"),
        ({"groundings": []}, SIZE, "malformed annotation (AttributeError: 'list' object has no attribute 'items')"),
        ({"height": 41}, SIZE, "image size differs from its annotation"),
        (
            {"height": 60, "width": 40},
            SIZE,
            "image is EXIF-rotated and its annotation is not: apply the rotation to one of them",
        ),
        ({"file_name": "sa_2.jpg"}, SIZE, "image file is missing"),
        ({"file_name": "../../../../sa_2.jpg"}, SIZE, "image file name leads out of the data folder"),
        ({"caption": None}, SIZE, "malformed annotation (AttributeError: 'NoneType' object has no attribute 'strip')"),
    ],
)
def test_a_broken_entry_is_counted(
    write_family: Callable[..., UscdfBuilder], change: dict[str, Any], size: tuple[int, int], reason: str
) -> None:
    builder = write_family(GrandfHuman, {HA: [human(CAPTION, DOG_SAID, **change)]}, HA_IMAGE, size=size)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


def test_control_tokens_in_a_caption_are_broken_up(write_family: Callable[..., UscdfBuilder]) -> None:
    caption = "A [SEG] and a <p> dog."
    groundings = {"A [SEG]": grounding(0, 7, MAN), "dog": grounding(18, 21, DOG)}
    builder = write_family(GrandfHuman, {HA: [human(caption, groundings)]}, HA_IMAGE)
    ((answer, _),) = only(builder)
    assert answer == "<p> A [ SEG] </p> [SEG] and a < p> <p> dog </p> [SEG]."


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("val2017/000000000139.jpg", "coco/val2017/000000000139.jpg"),  # published: with its folder
        ("train2017/000000000139.jpg", "coco_2017/train2017/000000000139.jpg"),  # which GLaMM joins twice
        ("000000000139.jpg", "train2017/000000000139.jpg"),
    ],
)
def test_openpsg_names_the_folder_of_its_images(
    write_family: Callable[..., UscdfBuilder], name: str, image: str
) -> None:
    file = "GranDf/annotations/train/OpenPsgGCG_val.json"
    builder = write_family(GrandfOpenPsg, {file: [human(CAPTION, DOG_SAID, file_name=name)]}, image)
    assert builder.split_items() == {"validation": [("validation", 0)]}
    (row,) = builder.usable_rows(("validation", 0))
    assert (row["image"], row["image_id"]) == (str(builder.data_dir / image), "000000000139")
    assert (row["source"], row["masks"]) == ("grandf_openpsg", [box_rle(SIZE, DOG)])


@pytest.mark.parametrize(
    ("kind", "content", "name", "image"),
    [
        (GrandfHuman, [human(CAPTION, DOG_SAID)], "GranDf_HA_GCG_train.json", "GranDf_HA_images/train/sa_1.jpg"),
        (GrandfHuman, [human(CAPTION, DOG_SAID)], "train/GranDf_HA_GCG_train.json", HA_IMAGE),  # as on the Hub
        (GrandfFlickr30k, flickr(CAPTION, [said(1, 25, 32, DOG)]), FLICKR, "flikcr_30k/train/36979.jpg"),  # GLaMM
        (GrandfFlickr30k, flickr(CAPTION, [said(1, 25, 32, DOG)]), FLICKR, FLICKR_IMAGE),
        (GrandfRefcocog, [refcocog(CAPTION, ("his dog", DOG))], REFCOCOG, REFCOCOG_IMAGE),
        (
            GrandfRefcocog,
            [refcocog(CAPTION, ("his dog", DOG))],
            REFCOCOG,
            "coco_2014/train2014/COCO_train2014_000000000009.jpg",
        ),
    ],
)
def test_layouts(
    write_family: Callable[..., UscdfBuilder], kind: type[UscdfBuilder], content: Any, name: str, image: str
) -> None:
    builder = write_family(kind, {name: content}, image)
    assert only(builder) == [("A man in a red hat walks <p> his dog </p> [SEG].", [box_rle(SIZE, DOG)])]


# Flickr30k


def test_a_flickr_caption(write_family: Callable[..., UscdfBuilder]) -> None:
    annotations = [
        said(1, 25, 32, DOG),
        said(2, 0, 5, MAN),
        said(3, 0, 5, HAT),  # the same phrase: two boxes, one mask
        said(4, 9, 18, HAT, tokens_positive=[[9, 18], [0, 5]]),  # the first span counts
        said(5, 0, 33, DOG, ignore=True),
    ]
    builder = write_family(GrandfFlickr30k, {FLICKR: flickr(CAPTION, annotations)}, FLICKR_IMAGE)
    assert builder.split_items() == {"train": [("train", 3)]}
    builder.skipped.clear()
    (row,) = builder.usable_rows(("train", 3))
    assert row["messages"] == [
        {"role": "user", "content": "<image>\nWrite about this picture and segment the things you write about."},
        {
            "role": "assistant",
            "content": "<p> A man </p> [SEG] in <p> a red hat </p> [SEG] walks <p> his dog </p> [SEG].",
        },
    ]
    assert row["masks"] == [
        union([box_rle(SIZE, MAN), box_rle(SIZE, HAT)]),
        box_rle(SIZE, HAT),
        box_rle(SIZE, DOG),
    ]
    assert (row["image_id"], row["source"]) == ("36979", "grandf_flickr30k")
    assert builder.skipped == {"phrase marked as ignored": 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (said(2, 0, 5, MAN, tokens_positive=[]), "malformed annotation (IndexError: list index out of range)"),
        (said(2, 30, 90, MAN), "phrase outside its caption"),
        (said(2, 5, 5, MAN), "phrase outside its caption"),
        (said(2, -3, 5, MAN), "phrase outside its caption"),
        (said(2, 32, 33, MAN), "phrase outside its caption"),  # a full stop
        (said(2, 0, 5, MAN, sam_mask=None), "segmentation is neither polygons nor RLE but NoneType"),
        (said(2, 0, 5, MAN, sam_mask=box_rle((4, 6), (1, 1, 2, 2))), "mask size differs from the image size"),
        ({"id": 2, "image_id": 3, "tokens_positive": [[0, 5]]}, "missing field 'sam_mask'"),
    ],
)
def test_a_broken_flickr_phrase_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], bad: dict, reason: str
) -> None:
    content = flickr(CAPTION, [said(1, 25, 32, DOG), bad])
    builder = write_family(GrandfFlickr30k, {FLICKR: content}, FLICKR_IMAGE)
    assert only(builder) == [("A man in a red hat walks <p> his dog </p> [SEG].", [box_rle(SIZE, DOG)])]
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("caption", "size", "reason"),
    [
        ("A man", SIZE, "caption of fewer than 3 words"),
        (CAPTION, (31, 60), "image side below 32 pixels"),
    ],
)
def test_short_captions_and_tiny_images_are_left_out(
    write_family: Callable[..., UscdfBuilder], caption: str, size: tuple[int, int], reason: str
) -> None:
    annotation = said(1, 0, 5, MAN, sam_mask=box_rle(size, (1, 1, 9, 9)))
    content = flickr(caption, [annotation], height=size[0], width=size[1])
    builder = write_family(GrandfFlickr30k, {FLICKR: content}, FLICKR_IMAGE, size=size)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


# RefCOCOg


def test_a_refcocog_caption(write_family: Callable[..., UscdfBuilder]) -> None:
    # The published search is case sensitive, so that "A man" has no place, and its mask stays without a phrase.
    entry = refcocog(CAPTION.lower(), ("his dog.", DOG), ("A man", MAN), ("Red  Hat", HAT))
    builder = write_family(GrandfRefcocog, {REFCOCOG: [entry]}, REFCOCOG_IMAGE)
    assert builder.split_items() == {"train": [("train", 0)]}
    builder.skipped.clear()
    (row,) = builder.usable_rows(("train", 0))
    assert row["messages"] == [
        {"role": "user", "content": "<image>\nwhat can you see? answer with masks in the text."},
        {
            "role": "assistant",
            "content": "<p> a man </p> [SEG] in a <p> red hat </p> [SEG] walks <p> his dog </p> [SEG].",
        },
    ]
    assert row["masks"] == [box_rle(SIZE, MAN), box_rle(SIZE, HAT), box_rle(SIZE, DOG)]
    assert (row["image_id"], row["source"]) == ("COCO_train2014_000000000009", "grandf_refcocog")
    assert builder.skipped == {}


@pytest.mark.parametrize(
    ("caption", "references", "answer", "boxes", "skipped"),
    [
        # the shorter phrase moves to a place of its own
        (
            "the man in a hat sees a man",
            [("man", MAN), ("man in a hat", HAT)],
            "the <p> man in a hat </p> [SEG] sees a <p> man </p> [SEG]",
            [[HAT], [MAN]],
            {},
        ),
        # and is dropped where there is none; the published code trims the longer one with the mask of another
        (
            "the man in a hat",
            [("man", MAN), ("man in a hat", HAT)],
            "the <p> man in a hat </p> [SEG]",
            [[HAT]],
            {"phrase that overlaps a longer one": 1},
        ),
        # two of the same name and two places
        (
            "a dog and a dog",
            [("a dog", DOG), ("a dog", HAT)],
            "<p> a dog </p> [SEG] and <p> a dog </p> [SEG]",
            [[DOG], [HAT]],
            {},
        ),
        # two of the same name and one place: both
        ("two dogs", [("dogs", DOG), ("dogs", HAT)], "two <p> dogs </p> [SEG]", [[DOG, HAT]], {}),
        # a part of a word is no place
        (
            "a manly dog",
            [("man", MAN), ("dog", DOG)],
            "a manly <p> dog </p> [SEG]",
            [[DOG]],
            {"phrase is not in its caption": 1},
        ),
        ("a dog", [(" . ", MAN), ("dog", DOG)], "a <p> dog </p> [SEG]", [[DOG]], {"empty phrase": 1}),
    ],
)
def test_places_of_refcocog_phrases(
    write_family: Callable[..., UscdfBuilder],
    caption: str,
    references: list,
    answer: str,
    boxes: list,
    skipped: dict[str, int],
) -> None:
    builder = write_family(GrandfRefcocog, {REFCOCOG: [refcocog(caption, *references)]}, REFCOCOG_IMAGE)
    assert only(builder) == [(answer, [union(box_rle(SIZE, box) for box in of_mask) for of_mask in boxes])]
    assert builder.skipped == skipped


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (refcocog("a dog", img_file_name="gone.jpg"), "image file is missing"),
        (refcocog("a dog"), "caption without a grounded phrase"),
        ({"9": {}, "10": {}}, "entry is no object with a single name"),
        ({"9": {"caption": "a dog", "refs": []}}, "missing field 'img_file_name'"),
    ],
)
def test_a_broken_refcocog_entry_is_counted(
    write_family: Callable[..., UscdfBuilder], entry: dict, reason: str
) -> None:
    builder = write_family(GrandfRefcocog, {REFCOCOG: [entry]}, REFCOCOG_IMAGE)
    assert only(builder) == []
    assert builder.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"segmentation": [polygon(MAN)]}, "missing field 'sentence'"),
        ({"sentence": "a dog", "segmentation": [[1, 2, 3, 4]]}, "polygon of fewer than three points"),
        ({"sentence": "a dog", "segmentation": []}, "empty segmentation"),
    ],
)
def test_a_broken_reference_leaves_the_others(
    write_family: Callable[..., UscdfBuilder], bad: dict, reason: str
) -> None:
    entry = refcocog("a man and a dog", ("a man", MAN))
    entry["9"]["refs"].append(bad)
    builder = write_family(GrandfRefcocog, {REFCOCOG: [entry]}, REFCOCOG_IMAGE)
    assert only(builder) == [("<p> a man </p> [SEG] and a dog", [box_rle(SIZE, MAN)])]
    assert builder.skipped == {reason: 1}


def test_places() -> None:
    assert occurrences("A dog, the DOG and dogs", "dog") == [(2, 5), (11, 14)]
    assert locate("a dog and a dog", "dog", [(12, 14)]) == (12, 15)  # the nearest
    with pytest.raises(ValueError, match="phrase is not in its caption"):
        locate("a dog", "cat", [(2, 5)])


def test_sentences_of_flickr30k_entities(write_family: Callable[..., UscdfBuilder], tmp_path: Path) -> None:
    """Published sentences, their phrases as offsets and a photograph of the set, in the layout of GranD-f."""
    source = FORMATS / "flickr30k_entities/test_fixtures/vision"
    if not source.is_dir():
        pytest.skip("the published samples are not at ../shared/data/formats")
    height, width = 421, 500
    images, annotations = [], []
    for number, line in enumerate((source / "flickr30k/sentences/6338542128.txt").read_text().splitlines()):
        caption, position = "", 0
        for match in re.finditer(r"\[/EN#(\d+)/\S+ ([^\]]+)\]", line):
            caption += line[position : match.start()]
            span = [len(caption), len(caption) + len(match[2])]
            caption, position = caption + match[2], match.end()
            if match[1] != "0":  # something that can be seen
                mask = box_rle((height, width), (10, 10, 20 + len(annotations), 40))
                annotations.append(
                    {"id": len(annotations), "image_id": number, "tokens_positive": [span], "sam_mask": mask}
                )
        caption += line[position:]
        images.append(
            {"id": number, "file_name": "6338542128.jpg", "height": height, "width": width, "caption": caption}
        )
    builder = write_family(GrandfFlickr30k, {FLICKR: {"images": images, "annotations": annotations}})
    (tmp_path / "data/flickr_30k/images").mkdir(parents=True)
    shutil.copyfile(source / "images/flickr30k/6338542128.jpg", tmp_path / "data/flickr_30k/images/6338542128.jpg")
    answers = only(builder)
    assert len(answers) == 5
    assert answers[3] == (
        "<p> The Iowa State football player blocks </p> [SEG] <p> a Texas A&M defenseman </p> [SEG] while running with "
        "<p> the ball </p> [SEG] .",
        [box_rle((height, width), (10, 10, 20 + number, 40)) for number in (15, 16, 17)],
    )
    assert builder.skipped == {}
