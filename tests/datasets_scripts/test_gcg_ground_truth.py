import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.gcg_ground_truth import AGAIN, UNSAID, marked_turns
from mglmm.datasets_scripts.grandf import GrandfHuman
from mglmm.evaluation.benchmarks import BENCHMARKS, ground_truth, plan
from mglmm.evaluation.scoring import make_scorer
from mglmm.evaluation.text_similarity import ExactSimilarity
from mglmm.processing.uscdf import validate_row
from tests.datasets_scripts.conftest import box_rle, polygon

SIZE = (40, 60)
BOXES = [(5, 5, 15, 38), (30, 10, 50, 30), (6, 4, 14, 9), (0, 0, 3, 3)]
MASKS = [box_rle(SIZE, box) for box in BOXES]
FOLDER = "GranDf/annotations/val_test/"
IMAGE = "GranDf/GranDf_HA_images/val_test/sa_1.jpg"
CAPTION = "A man  walks his dog , happily."


def truth(
    labels: list[str], masks: list[Any], *captions: str, name: str = "val", key: str = "sa_1", **change: Any
) -> dict[str, dict]:
    """Both files of a split with one image."""
    images = [{"id": key, "file_name": "sa_1.jpg", "height": 40, "width": 60}]
    described = [
        {"id": number, "image_id": key, "caption": caption, "labels": labels if number == 1 else []}
        for number, caption in enumerate(captions, 1)
    ]
    segments = [
        {"id": number, "image_id": key, "category_id": 1, "segmentation": mask, "area": 1, "iscrowd": 0}
        for number, mask in enumerate(masks, 1)
    ]
    return {
        f"{FOLDER}{name}_gcg_coco_caption_gt.json": {"images": images, "annotations": described} | change,
        f"{FOLDER}{name}_gcg_coco_mask_gt.json": {"images": images, "annotations": segments},
    }


def test_both_splits(write_family: Callable[..., UscdfBuilder]) -> None:
    files = truth(["his dog", "a cat"], MASKS[:2], CAPTION, "A dog.") | truth(
        ["dog"], MASKS[:1], "A dog.", name="test", key="7"
    )
    builder = write_family(GrandfHuman, files, IMAGE, variants=3)  # of train alone
    assert builder.split_items() == {"validation": [("validation", "sa_1")], "test": [("test", "7")]}
    (row,) = builder.usable_rows(("validation", "sa_1"))
    assert row["messages"][0]["content"].startswith("<image>\n")
    assert [message["content"] for message in row["messages"][1:]] == [
        "A man walks <p> his dog </p> [SEG] , happily.",
        UNSAID,
        "<p> a cat </p> [SEG]",
        AGAIN,
        "A dog.",
    ]
    assert {name: row[name] for name in ("image", "image_id", "source", "task", "masks")} == {
        "image": str(builder.data_dir / IMAGE),
        "image_id": "sa_1",
        "source": "grandf_human",
        "task": "grounded_caption",
        "masks": MASKS[:2],
    }
    (row,) = builder.usable_rows(("test", "7"))
    assert (row["image_id"], row["messages"][1]["content"]) == ("7", "A <p> dog </p> [SEG].")
    assert builder.skipped == {"split train without annotations or images": 1}


@pytest.mark.parametrize(
    ("caption", "labels", "masks", "answers", "order"),
    [
        # masks in the order of the caption, not of the labels
        ("a dog and a cat", ["a cat", "a dog"], [0, 1], ["<p> a dog </p> [SEG] and <p> a cat </p> [SEG]"], [1, 0]),
        # the long label first, and the short one where it stands alone
        (
            "a man in a hat, a man",
            ["a man", "a man in a hat"],
            [0, 1],
            ["<p> a man in a hat </p> [SEG], <p> a man </p> [SEG]"],
            [1, 0],
        ),
        # no place of its own
        ("a man in a hat", ["man", "a man in a hat"], [0, 1], ["<p> a man in a hat </p> [SEG]", "<p> man </p> [SEG]"], [1, 0]),
        # letter by letter and whole words: the labels are compared as they are
        ("A dog, cats", ["a dog", "cat"], [0, 1], ["A dog, cats", "<p> a dog </p> [SEG] and <p> cat </p> [SEG]"], [0, 1]),
        # twice the same
        ("a dog, a dog", ["a dog", "a dog"], [0, 1], ["<p> a dog </p> [SEG], <p> a dog </p> [SEG]"], [0, 1]),
        # the originals take the first of equal masks, so these keep their order
        ("a dog and a pet", ["a pet", "a dog"], [0, 0], ["a dog and <p> a pet </p> [SEG]", "<p> a dog </p> [SEG]"], [0, 1]),
        ("a dog", ["a pet", "a dog"], [0, 0], ["a dog", "<p> a pet </p> [SEG] and <p> a dog </p> [SEG]"], [0, 1]),
        # a tag would part "x" from "dog"
        ("an x,dog here", ["dog"], [0], ["an x,dog here", "<p> dog </p> [SEG]"], [0]),
        # control tokens stay text
        ("a [SEG] dog", ["[SEG] dog"], [0], ["a <p> [ SEG] dog </p> [SEG]"], [0]),
        ("nothing", [], [], ["nothing"], []),
    ],
)  # fmt: skip
def test_where_labels_stand(
    caption: str, labels: list[str], masks: list[int], answers: list[str], order: list[int]
) -> None:
    rles = [MASKS[mask] for mask in masks]
    turns = marked_turns("?", caption, labels, rles)
    assert [turn.answer for turn in turns] == answers
    assert [mask for turn in turns for mask in turn.masks] == [rles[index] for index in order]
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.question), ("assistant", turn.answer))
    ]
    phrases, captions = ground_truth({"messages": messages})
    escaped = [text.replace("[SEG]", "[ SEG]") for text in (caption, *labels)]
    assert captions == escaped[:1]
    assert phrases == [escaped[1 + index] for index in order]


def test_an_empty_mask_counts(write_family: Callable[..., UscdfBuilder]) -> None:
    empty = {"size": list(SIZE), "counts": [2400]}
    builder = write_family(GrandfHuman, truth(["A man", "dog"], [[polygon(BOXES[0])], empty], CAPTION), IMAGE)
    ((_, (item,)),) = builder.split_items().items()
    (row,) = builder.usable_rows(item)
    assert row["masks"] == [MASKS[0], box_rle(SIZE, (0, 0, 0, 0))]
    validate_row(row, SIZE)


@pytest.mark.parametrize(
    ("files", "size", "reason"),
    [
        (truth(["dog"], MASKS[:2], CAPTION), SIZE, "image with another number of labels than of masks"),
        (truth(["dog"], MASKS[:1]), SIZE, "image without a caption"),
        (truth(["dog"], MASKS[:1], CAPTION), (41, 60), "mask size differs from the image size"),
        (truth([" "], MASKS[:1], CAPTION), SIZE, "a phrase that carries a mask must not be empty."),
        (truth(["dog"], [None], CAPTION), SIZE, "segmentation is neither polygons nor RLE but NoneType"),
        (truth([], [], CAPTION, images=[{"id": "sa_1", "file_name": "../x.jpg"}]), SIZE, "image file name leads out of the data folder"),
        (truth([], [], CAPTION, annotations=[{"image_id": "sa_1", "caption": "a"}]), SIZE, "missing field 'labels'"),
    ],
)  # fmt: skip
def test_a_broken_image_is_counted(
    write_family: Callable[..., UscdfBuilder], files: dict, size: tuple[int, int], reason: str
) -> None:
    builder = write_family(GrandfHuman, files, IMAGE, size=size)
    ((_, (item,)),) = builder.split_items().items()
    builder.skipped.clear()  # of missing splits
    assert builder.usable_rows(item) == []
    assert builder.skipped == {reason: 1}


def test_captions_without_their_masks_are_refused(write_family: Callable[..., UscdfBuilder]) -> None:
    file = f"{FOLDER}val_gcg_coco_caption_gt.json"
    builder = write_family(GrandfHuman, {file: truth([], [], CAPTION)[file]}, IMAGE)
    with pytest.raises(FileNotFoundError, match="holds none of val_gcg_coco_mask_gt.json"):
        builder.split_items()


def test_the_published_format_gives_the_originals_numbers(
    write_family: Callable[..., UscdfBuilder], tmp_path: Path, shared_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the ground truth of the originals' format to prepared rows, and to what their script prints."""
    golden = shared_dir / "golden/evaluation"
    if not golden.is_dir():
        pytest.skip("needs the folder `shared/golden/evaluation`")
    monkeypatch.setenv("PATH", str(tmp_path))  # no Java: of these captions the tokenisers make the same

    def read(path: str) -> Any:
        return json.loads((golden / path).read_text(encoding="utf-8"))

    files = {f"{name}_gcg_coco_{kind}_gt.json" for name in ("val", "test") for kind in ("caption", "mask")}
    builder = write_family(GrandfHuman, {name: read(f"data/gt/{name}") for name in files})
    (tmp_path / "data/images").mkdir()
    for image in read("data/gt/val_gcg_coco_caption_gt.json")["images"]:
        picture = PIL.Image.new("RGB", (image["width"], image["height"]))
        picture.save(tmp_path / "data/images" / image["file_name"])
    builder.download_and_prepare()
    benchmark, data = BENCHMARKS["gcg"], builder.as_dataset(split="validation")
    questions, rows = plan(benchmark, data), data.remove_columns("image")
    assert (len(questions), len(builder.as_dataset(split="test"))) == (30, 30)
    scorer = make_scorer("gcg", benchmark, ExactSimilarity(normalize=False))
    for question in questions:
        answer = read(f"data/pred/{question.image_id}.json")
        # The scorer takes phrases from the text, by number.
        listed = " ".join(f"<p> {phrase} </p>" for phrase in answer["phrases"])
        parts = [{"phrase": "", "span": None, "score": 1.0, "mask": mask} for mask in answer["pred_masks"]]
        scorer.update(question, [rows[question.row]], {"text": listed, "segments": parts})
    expected, parity = read("results/glamm_gcg_exact.json")["val"], scorer.compute().parity
    assert (parity["AP50"], parity["mIoU"]) == pytest.approx((expected["ap_stats"][1], expected["miou"]), abs=1e-6)
    # GLaMM's 67 matches; MGLMM drops the 5 labels of the images where the script fails.
    assert parity["mask_recall"] == pytest.approx(67 / (109 - 5))

    scorer = make_scorer("gcg", benchmark, ExactSimilarity(normalize=False))
    for question in questions:
        caption = read(f"data/pred/{question.image_id}.json")["caption"]
        scorer.update(question, [rows[question.row]], {"text": caption, "segments": []})
    assert scorer.compute().parity["CIDEr"] == pytest.approx(expected["caption"]["CIDEr"], abs=1e-6)
