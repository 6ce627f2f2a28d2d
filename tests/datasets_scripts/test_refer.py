import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from mglmm.datasets_scripts.masks import union
from mglmm.datasets_scripts.refer import GRefCoco, RefClef, RefCoco, RefCocoG, RefCocoPlus, Refer, splits_of
from mglmm.datasets_scripts.sources import load_pickle
from tests.datasets_scripts.conftest import box_rle, polygon

REAL = Path(__file__).resolve().parents[3] / "shared/data/formats/refer/test/sample_expressions_testA.json"
SIZE = (40, 60)
HAT, DOG, BALL = (5, 5, 15, 15), (30, 10, 50, 30), (2, 30, 8, 36)


def reference(image: int, objects: Any, split: str, *sentences: str) -> dict:
    return {
        "ref_id": 1,
        "ann_id": objects,
        "category_id": 1,
        "image_id": image,
        "split": split,
        "file_name": f"COCO_train2014_{image:012d}_7.jpg",  # with the object's number: not the name of the image
        "sent_ids": list(range(len(sentences))),
        "sentences": [
            {"sent_id": number, "sent": sentence, "raw": sentence.upper(), "tokens": sentence.split()}
            for number, sentence in enumerate(sentences)
        ],
    }


def annotation(number: int, image: int, segmentation: Any) -> dict:
    return {
        "id": number,
        "image_id": image,
        "category_id": 1,
        "segmentation": segmentation,
        "bbox": [0, 0, 1, 1],
        "area": 1.0,
        "iscrowd": 0,
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Refer]:
    """Writes the original layout of one set with images 1 and 2, height 40 and width 60, and returns its builder."""

    def build(
        kind: type[Refer],
        references: Any,
        annotations: list[dict],
        *,
        file: str = "",
        root: str = "refer_seg",
        images: str = "images/mscoco/images/train2014",
        listed: tuple[int, ...] = (1, 2),
        size: tuple[int, int] = SIZE,
        **options: Any,
    ) -> Refer:
        folder = tmp_path / "data" / root
        (folder / kind.FOLDER).mkdir(parents=True)
        names = {1: "COCO_train2014_000000000001.jpg", 2: "COCO_train2014_000000000002.jpg"}
        if kind is RefClef:
            images, names = "images/saiapr_tc-12", {1: "00/images/1.jpg", 2: "01/images/2.jpg"}
        for name in names.values():
            path = folder / images / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.new("RGB", (60, 40)).save(path)
        path = folder / kind.FOLDER / (file or kind.REFERENCES[0])
        if path.suffix == ".p":
            path.write_bytes(pickle.dumps(references, protocol=0))  # what Python 2 wrote
        else:
            path.write_text(json.dumps(references))
        content = {
            "images": [
                {"id": number, "file_name": names.get(number, "gone.jpg"), "height": size[0], "width": size[1]}
                for number in listed
            ],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "hat", "supercategory": "accessory"}],
        }
        (folder / kind.FOLDER / "instances.json").write_text(json.dumps(content))
        return kind(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"), **options)

    return build


def asked(rows: list[dict]) -> dict[str, list[dict]]:
    """Phrase -> masks, over rows with one phrase each."""
    result = {}
    for row in rows:
        answer = row["messages"][-1]["content"]
        phrase = answer.split("<p> ")[1].split(" </p>")[0] if "<p>" in answer else answer.split('"')[1]
        result[phrase] = row["masks"]
    return result


def test_a_training_image_is_a_conversation_about_all_its_sentences(write: Callable[..., Refer]) -> None:
    references = [reference(1, 10, "train", "Left  hat.", "hat of the man"), reference(1, 11, "train", "dog")]
    builder = write(RefCoco, references, [annotation(10, 1, [polygon(HAT)]), annotation(11, 1, [polygon(DOG)])])
    assert builder.split_items() == {"train": [("train", 1)]}
    (row,) = builder.usable_rows(("train", 1))
    assert row == {
        "image": str(builder.data_dir / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000001.jpg"),
        "image_id": "1",
        "source": "refcoco",
        "task": "referring",
        "messages": [
            {"role": "user", "content": "<image>\nCut this out: hat of the man."},
            {"role": "assistant", "content": "I found <p> hat of the man </p> [SEG]."},
            {"role": "user", "content": 'Please segment "dog" in this image.'},
            {"role": "assistant", "content": "Sure, <p> dog </p> [SEG]."},
            {"role": "user", "content": "Select the following: left hat."},
            {"role": "assistant", "content": "Sure, <p> left hat </p> [SEG]."},
        ],
        "masks": [box_rle(SIZE, HAT), box_rle(SIZE, DOG), box_rle(SIZE, HAT)],
        "regions": [],
        "ignore_mask": None,
    }
    assert builder.skipped == {}


def test_the_same_words_for_the_same_thing_are_asked_once_in_training_only(write: Callable[..., Refer]) -> None:
    references = [
        *(reference(1, 10, split, "hat", "Hat.", "cap") for split in ("train", "val")),
        reference(1, 11, "train", "hat"),  # another object by the same words stays, as in the originals
    ]
    builder = write(RefCoco, references, [annotation(10, 1, [polygon(HAT)]), annotation(11, 1, [polygon(DOG)])])
    builder.split_items()
    train = [mask for row in builder.usable_rows(("train", 1)) for mask in row["masks"]]
    assert sorted(mask["counts"] for mask in train) == sorted(box_rle(SIZE, box)["counts"] for box in (HAT, HAT, DOG))
    assert [row["masks"] for row in builder.usable_rows(("validation", 1))] == [[box_rle(SIZE, HAT)]] * 3


def test_real_expressions_come_through(write: Callable[..., Refer]) -> None:
    if not REAL.is_file():
        pytest.skip(f"the real expressions of RefCOCO testA are not at {REAL}")
    sentences = [entry["sent"] for entry in json.loads(REAL.read_text())["predictions"][:200]]
    builder = write(RefCoco, [reference(1, 10, "testA", *sentences)], [annotation(10, 1, [polygon(HAT)])])
    builder.split_items()
    assert asked(builder.usable_rows(("testA", 1))) == {sentence: [box_rle(SIZE, HAT)] for sentence in sentences}
    assert builder.skipped == {}


def test_variants_word_the_training_images_anew(write: Callable[..., Refer]) -> None:
    references = [reference(1, 10, "train", *(f"hat {n}" for n in range(4))), reference(2, 11, "val", "dog")]
    annotations = [annotation(10, 1, [polygon(HAT)]), annotation(11, 2, [polygon(DOG)])]
    builder = write(RefCoco, references, annotations, variants=2)
    builder.split_items()
    rows = builder.usable_rows(("train", 1))
    assert [len(row["masks"]) for row in rows] == [3, 1, 3, 1]
    assert rows[0]["messages"] != rows[2]["messages"]
    assert len(builder.usable_rows(("validation", 2))) == 1  # a benchmark is asked once


def test_a_benchmark_asks_for_one_expression_a_row(write: Callable[..., Refer]) -> None:
    references = [reference(2, 10, "testA", "hat", "red hat", "big hat", "cap")]
    builder = write(RefCocoPlus, references, [annotation(10, 2, [polygon(HAT)])])
    assert builder.split_items() == {"testA": [("testA", 2)]}
    rows = builder.usable_rows(("testA", 2))
    assert asked(rows) == {name: [box_rle(SIZE, HAT)] for name in ("hat", "red hat", "big hat", "cap")}


@pytest.mark.parametrize(
    ("kind", "file", "root", "images"),
    [
        (RefCoco, "refs(unc).p", "refer_seg", "images/mscoco/images/train2014"),  # LISA and MGLMM
        (RefCocoG, "refs(umd).p", "Refer_Segm", "coco_2014/train2014"),  # GLaMM
        (RefCoco, "refs(unc).p", ".", "images/mscoco/images/train2014"),  # the folder itself
        (RefClef, "refs(unc).p", "refer_seg", ""),
        (GRefCoco, "grefs(unc).json", "refer_seg", "images/mscoco/images/train2014"),
        (GRefCoco, "grefs(unc).p", "refer_seg", "coco/train2014"),
    ],
)
def test_published_layouts(write: Callable[..., Refer], kind: type[Refer], file: str, root: str, images: str) -> None:
    objects = [10] if kind is GRefCoco else 10
    references = [reference(1, objects, "train", "hat")]
    builder = write(kind, references, [annotation(10, 1, [polygon(HAT)])], file=file, root=root, images=images)
    builder.split_items()
    (row,) = builder.usable_rows(("train", 1))
    assert (row["masks"], row["source"]) == ([box_rle(SIZE, HAT)], kind.SOURCE)


@pytest.mark.parametrize(
    ("segmentation", "boxes"),
    [
        ([polygon(HAT), polygon(DOG)], [HAT, DOG]),  # parts of one object
        ([polygon(HAT), polygon(HAT)], [HAT]),  # the original sums parts up to values above 1
        ([box_rle(SIZE, HAT)], [HAT]),  # a list of RLE, as in RefCLEF
        ({"size": [40, 60], "counts": [0, 40, 2360]}, [(0, 0, 1, 40)]),  # crowd: uncompressed RLE
    ],
)
def test_forms_of_segmentation(write: Callable[..., Refer], segmentation: Any, boxes: list) -> None:
    builder = write(RefClef, [reference(1, 10, "val", "thing")], [annotation(10, 1, segmentation)])
    builder.split_items()
    (row,) = builder.usable_rows(("validation", 1))
    assert row["masks"] == [union_of(boxes)]


def union_of(boxes: list[tuple[int, int, int, int]]) -> dict:
    return union(box_rle(SIZE, box) for box in boxes)


def test_grefcoco_means_one_several_or_nothing(write: Callable[..., Refer]) -> None:
    references = [
        reference(1, [10], "testB", "hat"),
        reference(1, [10, 11], "testB", "hat and dog"),
        reference(1, [-1], "testB", "the cat"),
        reference(1, [12, 11], "testB", "ball and dog"),  # the ball has no pixels
    ]
    annotations = [annotation(10, 1, [polygon(HAT)]), annotation(11, 1, [polygon(DOG)]), annotation(12, 1, [])]
    builder = write(GRefCoco, references, annotations)
    builder.split_items()
    rows = builder.usable_rows(("testB", 1))
    assert asked(rows) == {
        "hat": [box_rle(SIZE, HAT)],
        "hat and dog": [union_of([HAT, DOG])],
        "the cat": [],
        "ball and dog": [box_rle(SIZE, DOG)],
    }
    assert {row["task"] for row in rows if not row["masks"]} == {"absent"}
    assert {row["task"] for row in rows if row["masks"]} == {"referring"}


@pytest.mark.parametrize(
    "segmentation",
    [
        [],  # MGLMM's case
        [{"size": [40, 60], "counts": [2400]}],  # RefCLEF's form of it
    ],
)
def test_an_object_without_pixels_is_refused(write: Callable[..., Refer], segmentation: list) -> None:
    builder = write(RefCoco, [reference(1, 10, "val", "Hat")], [annotation(10, 1, segmentation)])
    builder.split_items()
    (row,) = builder.usable_rows(("validation", 1))
    assert (row["task"], row["masks"]) == ("absent", [])
    assert row["messages"] == [
        {"role": "user", "content": '<image>\nTrace the outline of "hat"'},
        {"role": "assistant", "content": 'Sorry, I cannot find "hat" in this picture.'},
    ]


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ("train",)),
        ("val", ("validation",)),
        ("test", ("test",)),  # RefCOCOg
        ("testA", ("testA",)),
        ("testBC", ("testB", "testC")),  # RefCLEF: in both
        ("testXY", ()),
        ("unknown", ()),
        (None, ()),
    ],
)
def test_splits(split: Any, names: tuple[str, ...]) -> None:
    assert splits_of({"split": split}) == names


def test_an_image_may_have_references_in_several_splits(write: Callable[..., Refer]) -> None:
    references = [reference(1, 10, "testA", "hat"), reference(1, 11, "testAB", "dog"), "nonsense"]
    annotations = [annotation(10, 1, [polygon(HAT)]), annotation(11, 1, [polygon(DOG)])]
    builder = write(RefClef, references, annotations)
    assert builder.split_items() == {"testA": [("testA", 1)], "testB": [("testB", 1)]}
    assert builder.skipped == {"reference of an unknown split": 1}
    assert asked(builder.usable_rows(("testB", 1))) == {"dog": [box_rle(SIZE, DOG)]}
    assert set(asked(builder.usable_rows(("testA", 1)))) == {"hat", "dog"}


@pytest.mark.parametrize(
    ("references", "change", "reason"),
    [
        # the good expression of the image stays
        ([reference(1, 99, "val", "cup")], {}, "annotation of a reference is missing"),
        ([reference(1, 20, "val", "cup")], {}, "annotation of a reference lies in another image"),
        ([reference(1, [], "val", "cup")], {}, "reference without annotation"),
        ([reference(1, 21, "val", "cup")], {}, "polygon of fewer than three points"),
        ([reference(1, 22, "val", "cup")], {}, "missing field 'segmentation'"),
        ([reference(1, 10, "val", " . ")], {}, "empty phrase"),
        ([{"image_id": 1, "ann_id": 10, "split": "val"}], {}, "missing field 'sentences'"),
        # the image is lost
        ([], {"listed": (2,)}, "image is not listed in instances.json"),
        ([], {"size": (60, 40)}, "image is EXIF-rotated and its annotation is not: apply the rotation to one of them"),
        ([], {"size": (41, 60)}, "image size differs from its annotation"),
    ],
)
def test_what_is_broken_is_counted(
    write: Callable[..., Refer], references: list, change: dict[str, Any], reason: str
) -> None:
    annotations = [
        annotation(10, 1, [polygon(HAT)]),
        annotation(20, 2, [polygon(DOG)]),
        annotation(21, 1, [[1, 2, 3, 4]]),
        {"id": 22, "image_id": 1},
    ]
    builder = write(RefCoco, [reference(1, 10, "val", "hat"), *references], annotations, **change)
    builder.split_items()
    rows = builder.usable_rows(("validation", 1))
    assert asked(rows) == ({} if change else {"hat": [box_rle(SIZE, HAT)]})
    assert builder.skipped == {reason: 1}


def test_a_missing_image_and_a_name_that_leads_out_are_counted(write: Callable[..., Refer]) -> None:
    references = [reference(1, 10, "val", "hat"), reference(3, 11, "val", "dog")]
    builder = write(RefCoco, references, [annotation(10, 1, [polygon(HAT)])], listed=(1, 3))
    builder.split_items()
    assert builder.usable_rows(("validation", 3)) == []
    path = builder.data_dir / "refer_seg/refcoco/instances.json"
    path.write_text(path.read_text().replace("COCO_train2014_000000000001.jpg", "../../../../../secret.jpg"))
    builder.split_items()
    assert builder.usable_rows(("validation", 1)) == []
    assert builder.skipped == {"image file name leads out of the data folder": 1}


class Trap:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["TRAP"],)


def test_a_malicious_pickle_is_refused(
    write: Callable[..., Refer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRAP", str(tmp_path / "trapped"))
    path = tmp_path / "trap.p"
    path.write_bytes(pickle.dumps([Trap()]))
    with pytest.raises(ValueError, match=r"refused to load \w+.mkdir: annotations hold plain data only"):
        load_pickle(path)
    builder = write(RefCoco, [reference(1, 10, "val", "hat"), Trap()], [])
    with pytest.raises(ValueError, match=r"refs\(unc\).p is not a pickle of plain data"):
        builder.split_items()
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"refs": []}, "holds no list of references but dict"),
        ([{"image_id": 1, "split": b"val"}], "holds more than lists, dicts, strings and numbers"),
    ],
)
def test_a_pickle_of_something_else_is_refused(write: Callable[..., Refer], content: Any, message: str) -> None:
    builder = write(RefCoco, [], [])
    path = builder.data_dir / "refer_seg" / "refcoco" / "refs(unc).p"
    path.write_bytes(pickle.dumps(content, protocol=4))
    with pytest.raises(ValueError, match=message):
        builder.split_items()


def test_a_missing_set_is_named(write: Callable[..., Refer], tmp_path: Path) -> None:
    write(RefCoco, [], [])
    builder = RefCocoG(cache_dir=str(tmp_path / "cache"), data_dir=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=r"refcocog/refs\(umd\).p"):
        builder.split_items()
