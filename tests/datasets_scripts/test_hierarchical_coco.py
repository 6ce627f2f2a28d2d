import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from mglmm.datasets_scripts.labels import confusable, readable
from mglmm.datasets_scripts.scene import AbsentLabels, Label, count_labels, read_scene
from mglmm.processing.rle import decode_mask, encode_mask
from mglmm.processing.uscdf import is_well_formed, validate_row
from tests.datasets_scripts.conftest import scene_rows

SIZE = (40, 60)
PERSON, HAIR, COAT, JEANS = (20, 0, 40, 40), (25, 0, 35, 8), (20, 10, 40, 24), (22, 24, 38, 36)
BAG, SKY, GRASS, CAR, HOOD = (42, 15, 52, 30), (0, 0, 60, 15), (0, 15, 60, 40), (5, 10, 55, 35), (5, 12, 20, 20)
DOGS = ((5, 20, 15, 30), (45, 20, 55, 30))
WHEELS = ((10, 28, 17, 35), (40, 28, 47, 35))


def records_of(content: dict) -> dict[int, tuple[dict, list[dict]]]:
    annotations = defaultdict(list)
    for item in content["annotations"]:
        annotations[item["image_id"]].append(item)
    return {image["id"]: (image, annotations[image["id"]]) for image in content["images"]}


def vocabulary_of(content: dict) -> dict:
    return count_labels(record for record in records_of(content).values() if record[0]["split"] == "train")


def union(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    return mask


def rows_of(content: dict, image: int, *, benchmark: bool = False) -> list[dict]:
    image, annotations = records_of(content)[image]
    vocabulary = vocabulary_of(content)
    return scene_rows(image, annotations, vocabulary=vocabulary, seed=0, variants=3, benchmark=benchmark)


@pytest.mark.parametrize(
    ("image", "benchmark", "index", "task", "turns", "masks"),
    [
        (
            2,  # a conversation: absent, one, several instances in one mask, a noun without an article, partly absent
            False,
            0,
            "referring",
            [
                (
                    "try to capture the whole shape of the car in a mask.",
                    "Sorry, I cannot find the car in this picture.",
                ),
                ("Assist me in masking the sky for a collage.", "Sure, <p> the sky </p> [SEG]."),
                ("Only all the dogs, nothing else.", "Sure, <p> all the dogs </p> [SEG]."),
                ("where: bag", "I looked for a bag, but without success."),
                (
                    "draw a mask over each of these: the grass and the trunk of the car.",
                    "Of course, <p> the grass </p> [SEG]. I do not see the trunk of the car, though.",
                ),
            ],
            [(SKY,), DOGS, (GRASS,)],
        ),
        (
            1,  # a conversation with a relation
            False,
            0,
            "referring",
            [
                ("Having the bag outlined would help me a lot.", "Done: <p> the bag </p> [SEG]."),
                ("What do you see above the jeans? Show me with a mask.", "Sure, <p> the coat </p> [SEG]."),
                (
                    "Highlight the person, the person's hair and the jeans of the person, one by one.",
                    "Sure, <p> the person </p> [SEG], <p> the person's hair </p> [SEG], and "
                    "<p> the jeans of the person </p> [SEG].",
                ),
                (
                    "Can you show me the coat of the person in the image?",
                    "Sure, <p> the coat of the person </p> [SEG].",
                ),
            ],
            [(BAG,), (COAT,), (PERSON,), (HAIR,), (JEANS,), (COAT,)],
        ),
        (
            1,  # one single question
            False,
            1,
            "referring",
            [("Pinpoint the coat with a pixel mask.", "Done: <p> the coat </p> [SEG].")],
            [(COAT,)],
        ),
        (
            1,  # one for an object as a whole
            False,
            2,
            "referring",
            [
                (
                    "Where in the image can the person be seen? Reply with a mask",
                    "The mask shows <p> the person </p> [SEG].",
                )
            ],
            [(PERSON,)],
        ),
        (
            3,  # one for one of two instances
            False,
            11,
            "referring",
            [
                (
                    "Create a mask for the wheel on the right.",
                    "Sure, <p> the wheel on the right </p> [SEG].",
                )
            ],
            [(WHEELS[1],)],
        ),
        (
            3,  # a question without an article, refused with one
            False,
            1,
            "absent",
            [("show trunk", "Sorry, I cannot find a trunk in this picture.")],
            [],
        ),
        (
            1,  # what is carried goes with the person
            False,
            4,
            "panoptic",
            [
                (
                    "Hey, what's in this picture? Show me a mask for each thing!",
                    "The picture shows <p> a person </p> [SEG] with <p> a bag </p> [SEG].",
                )
            ],
            [(PERSON,), (BAG,)],
        ),
        (
            2,  # stuff and merged instances, the largest first
            False,
            4,
            "panoptic",
            [
                (
                    "Describe the image and mark everything you mention.",
                    "This photo shows <p> grass </p> [SEG], <p> the sky </p> [SEG], and <p> two dogs </p> [SEG].",
                )
            ],
            [(GRASS,), (SKY,), DOGS],
        ),
        (
            1,  # worn things first, then the body; the ring is too small
            False,
            5,
            "fine",
            [
                (
                    "Take a closer look at the person and segment what you name.",
                    "Looking closely at the person, I see <p> a coat </p> [SEG] and <p> jeans </p> [SEG]. "
                    "One can also see <p> the hair </p> [SEG].",
                )
            ],
            [(COAT,), (JEANS,), (HAIR,)],
        ),
        (
            3,  # parts of a thing, both wheels in one mask
            False,
            9,
            "fine",
            [
                (
                    "List the parts of the car in full sentences, each with a segmentation mask.",
                    "The car shows <p> the hood </p> [SEG] and <p> the wheels </p> [SEG].",
                )
            ],
            [(HOOD,), WHEELS],
        ),
        (
            3,  # plain text
            False,
            16,
            "caption",
            [("Caption this image", "The picture shows a car.")],
            [],
        ),
        (
            3,  # the benchmark asks for each object ...
            True,
            0,
            "object",
            [("Does the photo contain a car? Mark what you find.", "Done: <p> a car </p> [SEG].")],
            [(CAR,)],
        ),
        (
            3,  # ... and for each part
            True,
            2,
            "part",
            [("Would you mark the wheels of the car for me", "Sure, <p> the wheels of the car </p> [SEG].")],
            [WHEELS],
        ),
    ],
)
def test_rows_are_as_written_here(
    tiny_content: dict, image: int, benchmark: bool, index: int, task: str, turns: list, masks: list
) -> None:
    row = rows_of(tiny_content, image, benchmark=benchmark)[index]
    contents = [content for turn in turns for content in turn]
    contents[0] = f"<image>\n{contents[0]}"
    assert {key: value for key, value in row.items() if key != "masks"} == {
        "image_id": str(image),
        "source": {1: "fashion", 2: "scenes", 3: "cars"}[image],
        "task": task,
        "messages": [
            {"role": "assistant" if number % 2 else "user", "content": content}
            for number, content in enumerate(contents)
        ],
        "regions": [],
    }
    assert len(row["masks"]) == len(masks)
    for mask, boxes in zip(row["masks"], masks, strict=True):
        np.testing.assert_array_equal(decode_mask(mask), union(*boxes))


def test_a_row_depends_on_its_own_record_and_variant_only(tiny_content: dict) -> None:
    image, annotations = records_of(tiny_content)[1]
    vocabulary = vocabulary_of(tiny_content)
    one = scene_rows(image, annotations, vocabulary=vocabulary, seed=5, variants=1)
    three = scene_rows(image, annotations, vocabulary=vocabulary, seed=5, variants=3)
    assert three[: len(one)] == one
    assert scene_rows(image, annotations, vocabulary=vocabulary, seed=6, variants=1) != one


def test_the_benchmark_asks_for_everything_once(tiny_content: dict) -> None:
    tasks = [row["task"] for row in rows_of(tiny_content, 1, benchmark=True)]
    # No absent row: nothing else of this source, and nothing that could not hide in the background of a portrait.
    assert tasks == ["object", "object", "part", "part", "part", "panoptic", "fine"]
    tasks = [row["task"] for row in rows_of(tiny_content, 2, benchmark=True)]
    assert tasks == ["object", "object", "object", "absent", "absent", "panoptic"]


def test_small_targets_are_skipped_and_counted(tiny_content: dict) -> None:
    scene = read_scene(*records_of(tiny_content)[1])
    assert [part.noun.name for part in scene.parts] == ["coat", "jeans", "hair"]
    assert scene.skipped == {"part smaller than 30 pixels": 1}
    assert "ring" in scene.names  # so it is never called absent


@pytest.mark.parametrize(
    ("image", "same_source", "other_source"),
    [
        (1, [], []),  # only the person is labelled: dog or grass may be in the background
        (2, [], ["bag", "car", "coat", "front glass", "hair", "jeans", "person", "ring", "trunk"]),  # all is labelled
        (3, ["front glass", "trunk"], []),
    ],
)
def test_absent_labels(tiny_content: dict, image: int, same_source: list, other_source: list) -> None:
    absent = AbsentLabels(read_scene(*records_of(tiny_content)[image]), vocabulary_of(tiny_content))
    assert [label.name for label in absent.same_source] == same_source
    assert sorted(label.name for label in absent.other_source) == other_source


def test_parts_of_others_are_not_denied_where_their_owner_is(tiny_content: dict) -> None:
    # Another dataset's annotators did not look for the hair of this dataset's people.
    image, annotations = records_of(tiny_content)[2]
    person = {**annotations[2], "id": 99, "label": "person"}
    absent = AbsentLabels(read_scene(image, [*annotations, person]), vocabulary_of(tiny_content))
    assert Label("hair", "person") not in absent.other_source
    assert Label("trunk", "car") in absent.other_source


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"level": "thing"}, "level 'thing' is none of object, stuff, part"),
        ({"parent_id": 12345}, "parent 12345 is not in the same image"),  # of a part
        ({"segmentation": {"size": [60, 40], "counts": "PP1"}}, "mask size [60, 40], image size [40, 60]"),
        ({"segmentation": {"size": [40, 60], "counts": "PP"}}, "no complete COCO string"),
        ({"segmentation": encode_mask(union())}, "empty mask"),
        ({"segmentation": [[0, 0, 5, 5]]}, "a mask must be"),  # a polygon is another layout
        ({"label": "-stuff"}, "no readable name"),
    ],
)
def test_a_broken_annotation_skips_its_image_only(
    tiny_dataset: Path, tiny_content: dict, hierarchical, change: dict, reason: str
) -> None:
    tiny_content["annotations"][1].update(change)
    (tiny_dataset / "annotations.json").write_text(json.dumps(tiny_content))
    builder = hierarchical(tiny_dataset)
    splits = builder.split_items()
    assert splits == {"train": [1, 2, 4], "validation": [3]}
    assert not builder.skipped and not builder.usable_rows(1)
    (message,) = builder.skipped
    assert reason in message
    assert {row["image_id"] for item in (2, 4, 3) for row in builder.usable_rows(item)} == {"2", "4", "3"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"file_name": "../../secret.jpg"}, "image file name leads out of the data folder"),
        ({"file_name": "/etc/hostname"}, "image file name leads out of the data folder"),
        ({"file_name": "gone.jpg"}, "image file is missing"),
        ({"width": 61}, "image size differs from its annotation"),
        (
            {"width": 40, "height": 60},
            "image is EXIF-rotated and its annotation is not: apply the rotation to one of them",
        ),
        ({"split": "test"}, "split 'test' is none of train, val"),
    ],
)
def test_a_broken_image_is_skipped(
    tiny_dataset: Path, tiny_content: dict, hierarchical, change: dict, reason: str
) -> None:
    (tiny_dataset.parent / "secret.jpg").write_bytes(b"secret")
    tiny_content["images"][1].update(change)
    (tiny_dataset / "annotations.json").write_text(json.dumps(tiny_content))
    builder = hierarchical(tiny_dataset)
    rows = [row for item in builder.split_items()["train"] for row in builder.usable_rows(item)]
    assert {row["image_id"] for row in rows} == {"1", "4"}
    assert builder.skipped[reason] == 1


def test_missing_fields_and_orphans_are_reported(tiny_dataset: Path, tiny_content: dict, hierarchical) -> None:
    del tiny_content["images"][1]["width"]
    tiny_content["annotations"][-1]["image_id"] = 77
    (tiny_dataset / "annotations.json").write_text(json.dumps(tiny_content))
    builder = hierarchical(tiny_dataset)
    for item in builder.split_items()["train"]:
        builder.usable_rows(item)
    assert builder.skipped["missing field 'width'"] == 1
    assert builder.skipped["annotation of an image that is not listed"] == 1


def test_all_real_photographs(photos: Path) -> None:
    content = json.loads((photos / "annotations.json").read_bytes())
    everything = list(records_of(content).values())
    vocabulary = vocabulary_of(content)
    assert len(everything) == 1507
    rng = random.Random(0)
    for image, annotations in everything:
        size = (image["height"], image["width"])
        labels = {annotation["id"]: readable(annotation["label"]).name for annotation in annotations}
        unions: dict[tuple[str, str], np.ndarray] = defaultdict(lambda size=size: np.zeros(size, dtype=bool))
        for annotation in annotations:
            owner = labels[annotation["parent_id"]] if annotation["level"] == "part" else ""
            unions[labels[annotation["id"]], owner] |= decode_mask(annotation["segmentation"])
        expected = {mask.tobytes() for mask in unions.values()}
        expected |= {decode_mask(each["segmentation"]).tobytes() for each in annotations}  # one of several

        for row in scene_rows(image, annotations, vocabulary=vocabulary, seed=0, variants=1):
            validate_row(row, size)
            answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            assert all(map(is_well_formed, answers))
            assert {decode_mask(mask).tobytes() for mask in row["masks"]} <= expected

        absent = AbsentLabels(read_scene(image, annotations), vocabulary)
        for _ in range(4):
            target = absent.draw(rng)
            assert target is not None and not confusable(target.noun.name) & set(labels.values())
