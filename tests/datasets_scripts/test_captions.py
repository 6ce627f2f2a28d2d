import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mglmm.datasets_scripts.builder import UscdfBuilder
from mglmm.datasets_scripts.captions import CocoCaptions, Flickr30kCaptions, LlavaInstruct, NoCaps
from mglmm.datasets_scripts.phrases import clean_caption, clean_lines, unquote

FORMATS = Path(__file__).resolve().parents[3] / "shared" / "data" / "formats"
CAT, DOG = 139, 285


def coco(captions: dict[int, list[Any]], **names: str) -> dict:
    """COCO Caption: images and their captions."""
    pairs = [(image, caption) for image, of_image in captions.items() for caption in of_image]
    return {
        "info": {},
        "licenses": [],
        "images": [
            {"id": image, "file_name": names.get(f"i{image}", f"{image:012d}.jpg"), "height": 40, "width": 60}
            for image in captions
        ],
        "annotations": [
            {"id": number, "image_id": image, "caption": caption} for number, (image, caption) in enumerate(pairs)
        ],
    }


def sentences(*of_images: tuple[str, str]) -> dict:
    """The merged Flickr30k of MDETR: one entry in `images` for each sentence."""
    return {
        "info": [],
        "licenses": [],
        "images": [
            {
                "id": number,
                "file_name": name,
                "height": 40,
                "width": 60,
                "caption": caption,
                "original_img_id": 7,
                "sentence_id": number,
                "tokens_negative": [[0, len(caption)]],
                "dataset_name": "flickr",
            }
            for number, (name, caption) in enumerate(of_images)
        ],
        "annotations": [],
        "categories": [{"supercategory": "object", "id": 1, "name": "object"}],
    }


def conversation(*values: str, first: str = "human") -> list[dict[str, str]]:
    roles = ("human", "gpt") if first == "human" else ("gpt", "human")
    return [{"from": roles[number % 2], "value": value} for number, value in enumerate(values)]


def said(rows: list[dict]) -> list[str]:
    return [row["messages"][1]["content"] for row in rows]


def test_a_training_image_gets_another_caption_in_each_variant(write_family: Callable[..., UscdfBuilder]) -> None:
    content = coco({CAT: ["A cat sits.\n", "  The  cat naps", "Cat on a TV."], DOG: ["A dog"]})
    images = ("coco/train2017/000000000139.jpg", "coco/train2017/000000000285.jpg")
    builder = write_family(CocoCaptions, {"coco/annotations/captions_train2017.json": content}, *images, variants=4)
    assert builder.split_items() == {"train": [("train", CAT), ("train", DOG)]}
    assert builder.skipped == {"split validation without annotations or images": 1}
    rows = builder.usable_rows(("train", CAT))
    assert rows[0] == {
        "image": str(builder.data_dir / "coco/train2017/000000000139.jpg"),
        "image_id": "139",
        "source": "coco_captions",
        "task": "caption",
        "messages": [
            {"role": "user", "content": "<image>\nPlease summarise the picture"},
            {"role": "assistant", "content": "The cat naps"},
        ],
        "masks": [],
        "regions": [],
        "ignore_mask": None,
    }
    assert sorted(said(rows[:3])) == ["A cat sits.", "Cat on a TV.", "The cat naps"]
    assert said(rows)[3] == said(rows)[0]  # one more variant than captions


def test_the_captions_of_a_validation_image_answer_one_question(write_family: Callable[..., UscdfBuilder]) -> None:
    # The published code draws one of them at random, in validation too.
    content = coco({CAT: ["A cat sits.", "The cat naps"]})
    files = {"annotations/captions_val2017.json": content}
    builder = write_family(CocoCaptions, files, "val2017/000000000139.jpg", variants=3)
    builder.split_items()
    rows = builder.usable_rows(("validation", CAT))
    assert [row["messages"] for row in rows] == [
        [
            {"role": "user", "content": "<image>\nDescribe the scene in short."},
            {"role": "assistant", "content": caption},
        ]
        for caption in ("A cat sits.", "The cat naps")
    ]


@pytest.mark.parametrize(
    ("kind", "file", "image"),
    [
        (CocoCaptions, "coco/annotations/captions_val2017.json", "coco/val2017"),  # LISA and MGLMM
        (CocoCaptions, "coco_2017/annotations/captions_val2017.json", "coco_2017/val2017"),  # GLaMM
        (CocoCaptions, "annotations/captions_val2017.json", "images/val2017"),
        (NoCaps, "nocaps/annotations/nocaps_val_4500_captions.json", "nocaps/images"),
        (NoCaps, "annotations/nocaps_val_4500_captions.json", "images"),
        (NoCaps, "nocaps_val_4500_captions.json", "images"),
    ],
)
def test_layouts_of_coco_captions(
    write_family: Callable[..., UscdfBuilder], kind: type[UscdfBuilder], file: str, image: str
) -> None:
    builder = write_family(kind, {file: coco({CAT: ["A cat."]})}, f"{image}/000000000139.jpg")
    assert builder.split_items() == {"validation": [("validation", CAT)]}
    (row,) = builder.usable_rows(("validation", CAT))
    assert (row["image"], row["source"]) == (str(builder.data_dir / image / "000000000139.jpg"), kind.SOURCE)


@pytest.mark.parametrize("root", ["flickr_30k", "flikcr_30k", "."])  # MGLMM, GLaMM, the folder itself
def test_flickr30k_has_an_entry_for_each_sentence(write_family: Callable[..., UscdfBuilder], root: str) -> None:
    files = {
        f"{root}/mdetr_annotations/final_flickr_mergedGT_train.json": sentences(("36979.jpg", "Two men in a garden .")),
        f"{root}/mdetr_annotations/final_flickr_mergedGT_val.json": sentences(
            ("65567.jpg", "A dog ."), ("65567.jpg", "A wet dog")
        ),
        f"{root}/mdetr_annotations/final_flickr_mergedGT_test_caption.json": coco({5: ["A", "B"]}, i5="1007129816.jpg"),
    }
    images = tuple(f"{root}/images/{name}.jpg" for name in (36979, 65567, 1007129816))
    # Another data set in the same folder does not hide the photographs.
    builder = write_family(Flickr30kCaptions, files, *images, "images/other.jpg")
    items = builder.split_items()
    assert items == {
        "train": [("train", 0)],
        "validation": [("validation", 0), ("validation", 1)],
        "test": [("test", 5)],
    }
    rows = [row for key in items["validation"] for row in builder.usable_rows(key)]
    assert [row["image_id"] for row in rows] == ["65567", "65567"]  # of the photograph: what is the same to a model
    assert rows[0]["messages"][0] == rows[1]["messages"][0]
    assert said(rows) == ["A dog .", "A wet dog"]
    assert said(builder.usable_rows(("test", 5))) == ["A", "B"]
    assert said(builder.usable_rows(("train", 0))) == ["Two men in a garden ."]


@pytest.mark.parametrize(
    ("captions", "name", "reasons", "left"),  # reasons by their beginning
    [
        # the other captions of the image stay
        (["A cat.", " "], "", {"empty caption": 1}, 1),
        (["A cat.", '""'], "", {"empty caption": 1}, 1),
        (["A cat.", None], "", {"malformed annotation (TypeError: ": 1}, 1),
        # the image is lost
        ([], "", {"image without a caption": 1}, 0),
        ([""], "", {"empty caption": 1, "image without a caption": 1}, 0),
        (["A cat."], "gone.jpg", {"image file is missing": 1}, 0),
        (["A cat."], "../../../etc/passwd", {"image file name leads out of the data folder": 1}, 0),
    ],
)
def test_broken_captions_are_counted(
    write_family: Callable[..., UscdfBuilder], captions: list, name: str, reasons: dict[str, int], left: int
) -> None:
    content = coco({CAT: captions}, **({"i139": name} if name else {}))
    builder = write_family(CocoCaptions, {"annotations/captions_val2017.json": content}, "val2017/000000000139.jpg")
    builder.split_items()
    builder.skipped.clear()
    assert len(builder.usable_rows(("validation", CAT))) == left
    assert len(builder.skipped) == len(reasons)
    for reason, (found, count) in zip(reasons, sorted(builder.skipped.items()), strict=True):
        assert found.startswith(reason)
        assert count == reasons[reason]


def test_a_missing_image_field_and_a_broken_image_are_counted(write_family: Callable[..., UscdfBuilder]) -> None:
    content = coco({CAT: ["A cat."], DOG: ["A dog."]})
    del content["images"][0]["file_name"]
    builder = write_family(CocoCaptions, {"annotations/captions_val2017.json": content}, "val2017/000000000285.jpg")
    builder.split_items()
    (builder.data_dir / "val2017/000000000285.jpg").write_bytes(b"no image")
    builder.skipped.clear()
    assert [builder.usable_rows(("validation", key)) for key in (CAT, DOG)] == [[], []]
    assert builder.skipped == {
        "missing field 'file_name'": 1,
        "image cannot be read (UnidentifiedImageError)": 1,
    }


@pytest.mark.parametrize("kind", [CocoCaptions, Flickr30kCaptions, NoCaps, LlavaInstruct])
def test_an_empty_folder_is_refused(write_family: Callable[..., UscdfBuilder], kind: type[UscdfBuilder]) -> None:
    builder = write_family(kind, {"other.json": []})
    with pytest.raises(FileNotFoundError, match="is it the folder of this dataset"):
        builder.split_items()


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (' "A cat on a mat." ', "A cat on a mat."),
        ("A  cat\ton\na mat", "A cat on a mat"),
        ('A sign that says "stop"', 'A sign that says "stop"'),  # a quotation at the end keeps its quotes
        ('"Go" and "stop"', '"Go" and "stop"'),
        ('"A lost quote', "A lost quote"),
        ("An <image> of a [SEG] in <region>", "An < image> of a [ SEG] in < region>"),
    ],
)
def test_clean_caption(text: str, cleaned: str) -> None:
    assert clean_caption(text) == cleaned
    assert unquote(cleaned) == cleaned


# LLaVA-Instruct


def test_a_llava_conversation_keeps_its_turns(write_family: Callable[..., UscdfBuilder]) -> None:
    entry = {
        "id": "000000033471",
        "image": "000000033471.jpg",
        "conversations": conversation(
            "What are the colors of the bus?\n<image>",
            "The bus is white and red.",
            "Is it moving? ",
            "It is parked:\n\n\n\n- at a stop,  \n- near a <p> sign </p> [SEG].",
        ),
    }
    builder = write_family(
        LlavaInstruct,
        {"llava_dataset/llava_instruct_150k.json": [entry]},
        "coco/train2017/000000033471.jpg",
        "coco/val2017/000000033471.jpg",
    )
    assert builder.split_items() == {"train": [0]}  # the published validation looks for train ids in val2017
    (row,) = builder.usable_rows(0)
    assert row == {
        "image": str(builder.data_dir / "coco/train2017/000000033471.jpg"),
        "image_id": "000000033471",
        "source": "llava_instruct",
        "task": "conversation",
        "messages": [
            {"role": "user", "content": "<image>\nWhat are the colors of the bus?"},
            {"role": "assistant", "content": "The bus is white and red."},
            {"role": "user", "content": "Is it moving?"},
            {
                "role": "assistant",
                "content": "It is parked:\n\n- at a stop,\n- near a < p> sign < /p> [ SEG].",
            },
        ],
        "masks": [],
        "regions": [],
        "ignore_mask": None,
    }
    assert builder.skipped == {}


@pytest.mark.parametrize("root", ["", "llava_dataset/", "LLaVA-Instruct-150K/"])
@pytest.mark.parametrize("images", ["coco/train2017", "coco_2017/train2017", "train2017"])
def test_layouts_of_llava(write_family: Callable[..., UscdfBuilder], root: str, images: str) -> None:
    entry = {"id": "1", "image": "1.jpg", "conversations": conversation("<image>\nWhat?", "A bus.")}
    builder = write_family(LlavaInstruct, {f"{root}llava_instruct_150k.json": [entry]}, f"{images}/1.jpg")
    builder.split_items()
    assert said(builder.usable_rows(0)) == ["A bus."]


@pytest.mark.parametrize(
    ("messages", "reason", "left"),
    [
        (conversation("Hello.", "What is it?<image>", "A bus.", first="gpt"), "", ["What is it?", "A bus."]),
        (
            conversation("<image>What is it?", "A bus.", "Why?"),
            "last question without an answer",
            ["What is it?", "A bus."],
        ),
        (conversation("<image>\nWhat is it?"), "conversation without an answer", []),
        ([], "conversation without a question", []),
        (conversation("Hello.", first="gpt"), "conversation without a question", []),
        (conversation("<image>", "A bus."), "conversation with an empty text", []),
        (conversation("<image>What?", " "), "conversation with an empty text", []),
        (conversation("<image>What?", "A.", "<image>Why?", "B."), "conversation about several images", []),
        (
            [*conversation("<image>What?", "A."), {"from": "gpt", "value": "B."}],
            "conversation whose roles do not alternate",
            [],
        ),
        ([{"from": "system", "value": "Be good."}], "conversation whose roles do not alternate", []),
        ([{"from": "human"}, {"from": "gpt", "value": "A."}], "missing field 'value'", []),
    ],
)
def test_conversations(write_family: Callable[..., UscdfBuilder], messages: list, reason: str, left: list[str]) -> None:
    entry = {"id": "1", "image": "1.jpg", "conversations": messages}
    builder = write_family(LlavaInstruct, {"llava_instruct_150k.json": [entry]}, "train2017/1.jpg")
    builder.split_items()
    rows = builder.usable_rows(0)
    texts = [message["content"].removeprefix("<image>\n") for row in rows for message in row["messages"]]
    assert texts == left
    assert builder.skipped == ({reason: 1} if reason else {})


def test_a_llava_image_must_be_there(write_family: Callable[..., UscdfBuilder]) -> None:
    entries = [
        {"id": "1", "image": "../1.jpg", "conversations": conversation("<image>What?", "A.")},
        {"id": "2", "image": "2.jpg", "conversations": conversation("<image>What?", "A.")},
        {"id": "3", "conversations": conversation("What?", "A.")},  # of the mixtures with text alone
    ]
    builder = write_family(LlavaInstruct, {"llava_instruct_150k.json": entries}, "train2017/1.jpg", "1.jpg")
    assert builder.split_items() == {"train": [0, 1, 2]}
    assert [builder.usable_rows(key) for key in (0, 1, 2)] == [[], [], []]
    assert builder.skipped == {
        "image file name leads out of the data folder": 1,
        "image file is missing": 1,
        "missing field 'image'": 1,
    }


def test_clean_lines_keeps_paragraphs() -> None:
    assert clean_lines(" One. \n\n\n\nTwo.\n- <image>\n") == "One.\n\nTwo.\n- < image>"


# Real files


def test_the_captions_of_datumaro(tmp_path: Path) -> None:
    source = FORMATS / "datumaro/tests/assets/coco_dataset/coco_captions"
    if not source.is_dir():
        pytest.skip("the published samples are not at ../shared/data/formats")
    data = tmp_path / "data"
    (data / "annotations").mkdir(parents=True)
    for name in ("train", "val"):
        file = f"annotations/captions_{name}"
        shutil.copyfile(source / f"{file}.json", data / f"{file}2017.json")
        (data / f"{name}2017").mkdir()
        for image in (source / "images" / name).iterdir():
            shutil.copyfile(image, data / f"{name}2017" / image.name)
    builder = CocoCaptions(cache_dir=str(tmp_path / "cache"), data_dir=str(data))
    assert builder.split_items() == {"train": [("train", 5)], "validation": [("validation", 40)]}
    assert said(builder.usable_rows(("train", 5))) == ["hello"]
    assert said(builder.usable_rows(("validation", 40))) == ["world", "text"]
    assert builder.skipped == {}


def test_the_captions_and_questions_of_llava(write_family: Callable[..., UscdfBuilder]) -> None:
    captions = FORMATS / "llava/llava/eval/table/caps_boxes_coco2014_val_80.jsonl"
    questions = FORMATS / "llava/playground/data/coco2014_val_gpt4_qa_30x3.jsonl"
    if not captions.is_file() or not questions.is_file():
        pytest.skip("the published samples are not at ../shared/data/formats")
    entries = [json.loads(line) for line in captions.read_text().splitlines()]
    content = coco({int(entry["id"]): entry["captions"] for entry in entries})
    images = tuple(f"val2017/{image['file_name']}" for image in content["images"])
    builder = write_family(CocoCaptions, {"annotations/captions_val2017.json": content}, *images)
    rows = [row for item in builder.split_items()["validation"] for row in builder.usable_rows(item)]
    assert said(rows)[:2] == [
        "A donut shop is full of different flavors of donuts.",
        "Fruit flavored donuts lined up in a glass fronted cabinet",
    ]
    assert len(rows) == sum(len(entry["captions"]) for entry in entries)
    answered = [json.loads(line) for line in questions.read_text().splitlines()]
    entries = [
        {
            "id": entry["id"],
            "image": entry["image"],
            "conversations": conversation(f"<image>\n{entry['instruction']}", entry["output"]),
        }
        for entry in answered
    ]
    images = tuple(f"train2017/{entry['image']}" for entry in entries)
    builder = write_family(LlavaInstruct, {"llava_instruct_150k.json": entries}, *images)
    rows = [row for item in builder.split_items()["train"] for row in builder.usable_rows(item)]
    assert len(rows) == len(entries) == 90
    assert rows[0]["messages"] == [
        {"role": "user", "content": "<image>\nWhat is the position of the skateboard in the image?"},
        {
            "role": "assistant",
            "content": "The skateboard in the image is in an upside-down position, with its wheels pointing up and "
            "laying on the ground.",
        },
    ]
    assert builder.skipped == {}
