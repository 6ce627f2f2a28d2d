"""Foreign files: streamed JSON, pickles without code, names that stay inside, sizes as displayed."""

import json
import os
import pickle
from pathlib import Path

import PIL.Image
import pytest

from mglmm.datasets_scripts import sources
from mglmm.datasets_scripts.sources import (
    JsonTables,
    check_image_size,
    displayed_size,
    first_existing,
    inside,
    load_pickle,
    read_json,
)

COCO = {
    "info": {"year": 2014},
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [{"image_id": 3, "x": 1.5}, {"image_id": 7, "x": 2}, {"image_id": 3, "x": [None, "ü"]}],
}
TABLES = {"images": ("images.item", "id"), "annotations": ("annotations.item", "image_id")}


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_tables_keep_the_order_of_the_file_and_group_by_key(tmp_path: Path) -> None:
    tables = JsonTables(write(tmp_path / "coco.json", COCO), TABLES, tmp_path / "cache")
    assert tables.keys("images") == [7, 3]
    assert tables.get("annotations", 3) == [{"image_id": 3, "x": 1.5}, {"image_id": 3, "x": [None, "ü"]}]
    assert tables.get("annotations", 99) == []
    assert tables.one("images", 3)["file_name"] == "a.jpg"
    assert [key for key, _ in tables.all("annotations")] == [3, 7, 3]
    with pytest.raises(ValueError, match=r"coco.json has no images 99"):
        tables.one("images", 99)


@pytest.mark.parametrize(
    ("content", "table", "keys"),
    [
        ([{"id": "a"}, {"id": "b"}], ("item", "id"), ["a", "b"]),  # a list at the top
        ([{"k": 1}, {"k": 2}], ("item", ""), [0, 1]),  # numbered
        ({"x": {"v": 1}, "y": {"v": 2}}, ("*", ""), ["x", "y"]),  # an object at the top, by name
        ({"d": {"x": 1, "y": 2}}, ("d.*", ""), ["x", "y"]),  # an object further down
        ([{"id": [1, 2]}], ("item", "id"), ["[1, 2]"]),  # a key that is no scalar
        ([], ("item", "id"), []),
    ],
)
def test_other_shapes(tmp_path: Path, content, table, keys) -> None:
    tables = JsonTables(write(tmp_path / "f.json", content), {"t": table}, tmp_path / "cache")
    assert tables.keys("t") == keys


def test_tables_are_made_once_and_anew_when_the_file_changes(tmp_path: Path, monkeypatch) -> None:
    path = write(tmp_path / "coco.json", COCO)
    first = JsonTables(path, TABLES, tmp_path / "cache")
    monkeypatch.setattr(sources.ijson, "items", None)  # a second reading would fail
    assert JsonTables(path, TABLES, tmp_path / "cache").keys("images") == [7, 3]
    monkeypatch.undo()
    os.utime(write(path, {**COCO, "images": []}), ns=(1, 1))
    assert JsonTables(path, TABLES, tmp_path / "cache").keys("images") == []
    assert pickle.loads(pickle.dumps(first)).keys("images") == [7, 3]  # noqa: S301 (as it travels to another process)


def test_broken_json_leaves_no_tables(tmp_path: Path) -> None:
    path = tmp_path / "cut.json"
    path.write_text(json.dumps(COCO)[:-20])
    with pytest.raises(ValueError, match="is not valid JSON"):
        JsonTables(path, TABLES, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


class Bomb:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize(
    "value",
    [
        [{"ref_id": 1, "sentences": [{"raw": "the ü", "tokens": ["the"]}], "ann_id": [-1]}],
        {"a": (1, [2.5], None, True)},
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_plain_pickles_load(tmp_path: Path, value, protocol) -> None:
    (tmp_path / "refs.p").write_bytes(pickle.dumps(value, protocol))
    assert load_pickle(tmp_path / "refs.p") == value


def test_pickles_with_code_and_broken_ones_are_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "refs.p").write_bytes(pickle.dumps([Bomb()]))
    with pytest.raises(ValueError, match=r"refused to load (posix|nt)\.system"):
        load_pickle(tmp_path / "refs.p")
    assert not (tmp_path / "pwned").exists()
    for content in (b"", b"hello", pickle.dumps([1, 2])[:-3]):
        (tmp_path / "refs.p").write_bytes(content)
        with pytest.raises(ValueError, match="is not a pickle of plain data"):
            load_pickle(tmp_path / "refs.p")
    monkeypatch.setattr(sources, "MAX_PICKLE_BYTES", 3)
    with pytest.raises(ValueError, match="bytes, more than 3"):
        load_pickle(tmp_path / "refs.p")


def test_names_stay_inside(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for path in (folder / "sub" / "a.jpg", tmp_path / "secret.jpg"):
        path.write_bytes(b"x")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    assert inside(folder, "sub/a.jpg") == folder / "sub" / "a.jpg"
    assert inside(folder, "sub/../sub/a.jpg") == folder / "sub" / "a.jpg"
    for name in ("../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg"):
        with pytest.raises(ValueError, match="image file name leads out of the data folder"):
            inside(folder, name)
    with pytest.raises(ValueError, match="label file is missing"):
        inside(folder, "b.png", "label file")


def test_the_first_layout_that_exists(tmp_path: Path) -> None:
    (tmp_path / "coco_2014").mkdir()
    assert first_existing(tmp_path, "coco/train2014", "coco_20??") == tmp_path / "coco_2014"
    with pytest.raises(FileNotFoundError, match="none of a, b: is it the folder of this dataset"):
        first_existing(tmp_path, "a", "b")


@pytest.mark.parametrize(("orientation", "size"), [(1, (20, 30)), (3, (20, 30)), (6, (30, 20)), (8, (30, 20))])
def test_sizes_are_those_of_the_displayed_image(tmp_path: Path, orientation: int, size: tuple[int, int]) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    PIL.Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert displayed_size(tmp_path / "a.jpg") == size
    check_image_size(tmp_path / "a.jpg", *size)
    with pytest.raises(ValueError, match="EXIF-rotated"):
        check_image_size(tmp_path / "a.jpg", *size[::-1])
    with pytest.raises(ValueError, match="image size differs"):
        check_image_size(tmp_path / "a.jpg", 10, 15)


def test_unreadable_images_and_bombs(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="image cannot be read"):
        displayed_size(tmp_path / "a.jpg")
    PIL.Image.new("RGB", (30, 20)).save(tmp_path / "b.png")
    for limit, reason in ((100, "cannot be read|more than Pillow's limit"), (500, "30x20 pixels, more than Pillow's")):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.warns() if limit == 500 else pytest.MonkeyPatch.context(), pytest.raises(ValueError, match=reason):
            displayed_size(tmp_path / "b.png")


def test_small_json(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "x.json"
    for content in (
        '{"t": "caf\u00e9"}'.encode(),
        '{"t": "caf\u00e9"}'.encode("cp1252"),
        b'\xef\xbb\xbf{"t": "caf\xc3\xa9"}',
    ):
        path.write_bytes(content)
        assert read_json(path) == {"t": "café"}
    for content in (b"{", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.json is not valid JSON"):
            read_json(path)
    monkeypatch.setattr(sources, "MAX_JSON_BYTES", 10)
    with pytest.raises(ValueError, match="100,000 bytes, more than the 10"):
        read_json(path)
