"""Pictures with masks in prepared rows, as the annotation reads them."""

import pickle
from pathlib import Path
from typing import Any

import pytest

from mglmm.datasets_scripts.annotation.inputs import find_images, image_root
from mglmm.datasets_scripts.prepare import prepare
from tests.datasets_scripts.annotation.input_files import (
    CAT,
    CAT_RLE,
    DOG_RLE,
    SIZE,
    one,
    shown,
    write_json,
    write_picture,
)
from tests.datasets_scripts.conftest import box_rle


@pytest.mark.parametrize("images", ["embed", "path"])
def test_prepared_data(tiny_dataset: Path, tiny_content: dict, tmp_path: Path, images: Any) -> None:
    prepare("photos", tiny_dataset, tmp_path / "rows", images=images, num_proc=1, variants=3)
    items = find_images("uscdf", tmp_path / "rows", cache=tmp_path / "run" / "cache")
    sources = {image["id"]: image["source"] for image in tiny_content["images"]}
    assert [item.image_id for item in items] == sorted(f"{source}/{number}" for number, source in sources.items())
    person = next(item for item in items if item.image_id.endswith("/1"))
    info, masks = person.load()
    assert info == {"image_id": person.image_id, "file_name": f"{person.image_id}.jpg", "width": 60, "height": 40}
    annotated = {a["segmentation"]["counts"] for a in tiny_content["annotations"] if a["image_id"] == 1}
    assert {mask.rle["counts"] for mask in masks} <= annotated and len(masks) == 5  # all but the ring, too small
    assert sorted(str(mask.known_label) for mask in masks) == ["bag", "coat", "hair", "jeans", "person"]
    assert [mask.ann_id for mask in masks] == [1, 2, 3, 4, 5]

    root = image_root("uscdf", tmp_path / "rows", None, tmp_path / "run")
    assert root == tmp_path / "run" / "pictures"
    person.store_picture(root)
    assert (root / info["file_name"]).read_bytes() == (tiny_dataset / "images" / "person.jpg").read_bytes()
    assert [file.name for file in (root / info["file_name"]).parent.iterdir()] == ["1.jpg"]
    assert person.picture().size == (60, 40)
    again = find_images("uscdf", tmp_path / "rows", cache=tmp_path / "run" / "cache")  # from the database
    assert [item.fingerprint() for item in again] == [item.fingerprint() for item in items]
    assert pickle.loads(pickle.dumps(person)).load() == (info, masks)  # noqa: S301 (our own)


def write_rows(folder: Path, *rows: dict[str, Any]) -> Path:
    from datasets.arrow_writer import ParquetWriter

    from mglmm.datasets_scripts.features import FEATURES

    folder.mkdir()
    empty = {"task": "referring", "regions": [], "ignore_mask": None}
    with ParquetWriter(features=FEATURES, path=str(folder / "train.parquet")) as writer:
        for row in rows:
            writer.write({**empty, **row})
        writer.finalize()
    return folder


def row(image: Any, answer: str, *masks: Any, image_id: str = "1", source: str = "mine") -> dict[str, Any]:
    messages = [{"role": "user", "content": "<image>\nWhere?"}, {"role": "assistant", "content": answer}]
    return {"image": str(image), "image_id": image_id, "source": source, "messages": messages, "masks": list(masks)}


def test_rows_of_one_picture(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "cat.png")
    rows = write_rows(
        tmp_path / "rows",
        row(image, "<p> The sleepy cat </p> [SEG] and <p> it </p> [SEG].", CAT_RLE, DOG_RLE),
        row(image, "Sure, <p> the cat </p> [SEG].", CAT_RLE),
        row(image, "Sure, [SEG].", box_rle(SIZE, (1, 1, 3, 3))),
        row(image, "<p> all the hats </p> [SEG]", box_rle((60, 40), CAT)),
        row(image, "<p> a | hat [SEG]", box_rle(SIZE, (2, 2, 4, 4)), CAT_RLE),
        row(image, "There is none."),
        row(image, "<p> All the hats </p> [SEG]", box_rle(SIZE, (9, 9, 12, 12))),
        row(image, "Nothing here.", image_id="2"),  # a picture without masks
    )
    item = one(find_images("uscdf", rows, cache=tmp_path / "cache"))
    assert item.image_id == "mine/1"
    info, masks = item.load()
    assert info["file_name"] == "mine/1.png"
    assert shown(masks) == [
        (1, CAT_RLE, "cat"),  # the shortest of its phrases
        (2, DOG_RLE, None),  # a pronoun is no name
        (3, box_rle(SIZE, (1, 1, 3, 3)), None),
        (4, box_rle(SIZE, (9, 9, 12, 12)), "hats"),
        (5, {}, None),
        (6, {}, None),
    ]
    assert [mask.invalid for mask in masks[4:]] == [
        "mask size differs from the image size",
        "tags and masks of its row do not match",
    ]


def test_names_of_rows_never_lead_out(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "cat.jpg")
    rows = write_rows(tmp_path / "rows", row(image, "<p> cat </p> [SEG]", CAT_RLE, image_id="../../x y", source="/"))
    item = one(find_images("uscdf", rows, cache=tmp_path / "cache"))
    assert item.image_id == "_-8a5edab2/_.._x_y-e76b0dff"
    item.store_picture(tmp_path / "pictures")
    assert (tmp_path / "pictures" / item.load()[0]["file_name"]).is_file()


def test_rows_cannot_make_any_file_a_picture(tmp_path: Path) -> None:
    secret = write_json(tmp_path / "secret.jpg", "password")
    rows = write_rows(tmp_path / "rows", row(secret, "<p> cat </p> [SEG]", CAT_RLE))
    item = one(find_images("uscdf", rows, cache=tmp_path / "cache"))
    for method in (item.load, item.picture, lambda: item.store_picture(tmp_path / "pictures")):
        with pytest.raises(ValueError, match=r"^image cannot be read \(UnidentifiedImageError\)$"):
            method()
    assert not (tmp_path / "pictures").exists()
    other = write_picture(tmp_path / "other" / "cat.jpg")
    inside = one(
        find_images(
            "uscdf",
            write_rows(tmp_path / "r", row(other, "<p> c </p> [SEG]", CAT_RLE)),
            tmp_path / "rows",
            cache=tmp_path / "cache",
        )
    )
    with pytest.raises(ValueError, match="^image file name leads out of the data folder$"):
        inside.load()


def test_a_changed_source_is_read_anew(tmp_path: Path) -> None:
    image = write_picture(tmp_path / "cat.jpg")
    rows = write_rows(tmp_path / "rows", row(image, "<p> cat </p> [SEG]", CAT_RLE))
    assert len(find_images("uscdf", rows, cache=tmp_path / "cache")) == 1
    write_rows(tmp_path / "rows" / "more", row(image, "<p> dog </p> [SEG]", DOG_RLE, image_id="2"))
    assert len(find_images("uscdf", rows, cache=tmp_path / "cache")) == 2
