import base64
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mglmm.datasets_scripts.annotation.export import export, mgsc_item, refusal, split_of
from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.mgscdata import MgscData, read_tags
from mglmm.datasets_scripts.prepare import prepare
from tests.datasets_scripts.annotation.run_folder import (
    DOOR,
    HOUSE,
    ROOT_TEXT,
    SIZE,
    TREE,
    WINDOWS,
    both_contexts,
    context,
    house_tree,
    tree_node,
    write_image,
    write_run,
)
from tests.datasets_scripts.conftest import box_rle

VALIDATION_ID = "sa_58"  # int(sha1(b"sa_58"), 16) % 100 < 5
IMAGE: Any = {"image_id": "sa_1", "file_name": "sa_1.jpg", "width": 60, "height": 40}
NODES = {node["id"]: node for node in house_tree()["nodes"]}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", tmp_path / "images")


def load(folder: Path, config: str, tmp_path: Path) -> datasets.DatasetDict:
    return datasets.load_dataset(str(folder), config, cache_dir=str(tmp_path / "cache"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.readlink().as_posix().encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }


def test_the_layout_of_mgscdata(run: Path, tmp_path: Path) -> None:
    write_image(run)
    export(run, tmp_path / "out")
    mgsc = tmp_path / "out" / "mgsc"
    assert (mgsc / "MGLMM_train_split.txt").read_text() == "sa_1.json\n"
    assert not (mgsc / "MGLMM_val_split.txt").exists()
    assert (mgsc / "imgs").readlink() == tmp_path / "images"
    root, house = json.loads((mgsc / "annotations" / "sa_1.json").read_text())
    masks = {name: json.loads(house[name].pop("mask")) for name in ("k1", "k2")}
    assert house == {
        "file_name": "sa_1.jpg",
        "label": "subtree: house",
        "type": "subtree",
        "gcg_caption": "The house has <k1>two windows</k1> above <k2>a green door</k2>.",
        "gcg_labels": ["k1", "k2"],
        "k1": {
            "label": "window",
            "caption": "A window with clean lines that stands in plain view.",
            "count": 2,
            "bbox": [8, 8, 17, 5],
        },
        "k2": {
            "label": "door",
            "caption": "A door with clean lines that stands in plain view.",
            "count": 1,
            "bbox": [15, 20, 10, 15],
        },
    }
    assert masks["k2"]["size"] == [40, 60]
    assert base64.b64decode(masks["k2"]["counts"]).decode() == box_rle(SIZE, DOOR)["counts"]
    assert (root["type"], root["label"]) == ("root", "root")
    assert root["gcg_caption"] == "<k1>A tall tree</k1> stands beside <k2>a brick house</k2>. The sky is grey."
    assert (root["k1"]["label"], root["k2"]["label"]) == ("tree", "house")


def test_rows_are_those_of_the_converter(run: Path, tmp_path: Path) -> None:
    write_image(run)
    write_image(run, "sub/sa_2")
    write_image(run, VALIDATION_ID)
    summary = export(run, tmp_path / "out")
    assert (summary.images, summary.items, summary.masks, summary.objects) == (3, 6, 12, 12)
    assert summary.skipped == {}
    assert datasets.get_dataset_config_names(str(tmp_path / "out")) == ["mgsc", "objects"]
    loaded = load(tmp_path / "out", "mgsc", tmp_path)
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 4, "validation": 2}
    assert loaded["train"].features == FEATURES

    builder = MgscData(data_dir=str(tmp_path / "out" / "mgsc"), cache_dir=str(tmp_path / "cache"), images="path")
    for split, items in builder.split_items().items():
        expected = [row for item in items for row in builder.usable_rows(item)]
        rows = loaded[split].cast_column("image", datasets.Image(decode=False)).to_list()
        assert [{**row, "image": row["image"]["path"]} for row in rows] == expected
        streamed = datasets.load_dataset(str(tmp_path / "out"), "mgsc", split=split, streaming=True)
        assert [row["messages"] for row in streamed] == loaded[split]["messages"][:]

    coarse, fine = loaded["train"][0], loaded["train"][1]
    assert (coarse["image_id"], coarse["task"], fine["task"]) == ("sa_1", "panoptic", "fine")
    assert coarse["image"].size == SIZE[::-1]
    answer = "<p> A tall tree </p> [SEG] stands beside <p> a brick house </p> [SEG]. The sky is grey."
    assert coarse["messages"][1]["content"] == answer
    assert coarse["masks"] == [box_rle(SIZE, TREE), box_rle(SIZE, HOUSE)]
    assert "the house" in fine["messages"][0]["content"]
    assert fine["masks"][1] == box_rle(SIZE, DOOR)

    # Prepared from the JSON by anybody else, under the same name.
    prepare("mgscdata", tmp_path / "out" / "mgsc", tmp_path / "again", images="path")
    assert load(tmp_path / "again", "mgsc", tmp_path)["train"].to_list() == loaded["train"].to_list()


def test_objects_of_the_trees(run: Path, tmp_path: Path) -> None:
    write_image(run)
    export(run, tmp_path / "out")
    rows = load(tmp_path / "out", "objects", tmp_path)["train"].to_list()
    assert [(row["id"], row["parent"], row["depth"], row["label"], row["count"], row["area"]) for row in rows] == [
        ("obj_1", "root", 1, "house", 1, 900),
        ("obj_2", "root", 1, "tree", 1, 450),
        ("obj_3", "obj_1", 2, "window", 2, 50),
        ("obj_4", "obj_1", 2, "door", 1, 150),
    ]
    assert rows[3]["segmentation"] == box_rle(SIZE, DOOR) and rows[3]["bbox"] == [15, 20, 10, 15]
    assert (rows[3]["image_id"], rows[3]["file_name"], rows[3]["weak"]) == ("sa_1", "sa_1.jpg", False)
    streamed = datasets.load_dataset(str(tmp_path / "out"), "objects", split="train", streaming=True)
    assert list(streamed) == rows


def test_the_same_run_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for name in ("sa_1", "sa_2", VALIDATION_ID):
        write_image(run, name)
    export(run, tmp_path / "a" / "out")
    export(run, tmp_path / "b" / "out")
    one = files_of(tmp_path / "a" / "out")
    assert one == files_of(tmp_path / "b" / "out")
    assert sorted(one) == [
        "README.md",
        "mgsc/MGLMM_train_split.txt",
        "mgsc/MGLMM_val_split.txt",
        "mgsc/annotations/sa_1.json",
        "mgsc/annotations/sa_2.json",
        "mgsc/annotations/sa_58.json",
        "mgsc/imgs",
        "mgsc/train-00000-of-00001.parquet",
        "mgsc/validation-00000-of-00001.parquet",
        "objects/train.parquet",
        "objects/validation.parquet",
    ]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]  # no traces beside it


def test_only_a_validation_image(run: Path, tmp_path: Path) -> None:
    write_image(run, VALIDATION_ID)
    assert export(run, tmp_path / "out").items == 2
    assert list(load(tmp_path / "out", "mgsc", tmp_path)) == ["validation"]
    assert list(load(tmp_path / "out", "objects", tmp_path)) == ["validation"]


def test_pictures_are_embedded_on_request(run: Path, tmp_path: Path) -> None:
    write_image(run)
    export(run, tmp_path / "out", images="embed")
    picture = tmp_path / "images" / "sa_1.jpg"
    content = picture.read_bytes()
    picture.unlink()
    rows = load(tmp_path / "out", "mgsc", tmp_path)["train"].cast_column("image", datasets.Image(decode=False))
    assert rows[0]["image"]["bytes"] == content
    assert "Rows hold the pictures themselves" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "weak", "reason"),
    [
        ({}, (), None),
        ({"status": "partial"}, (), None),
        ({"status": "failed", "tagged": ""}, (), "description failed"),
        ({"status": "template"}, (), "description is a template"),
        ({"tagged": "There is <obj_1>a house</obj_1>."}, (), "description of fewer than 2 objects"),
        (
            {"tagged": "<obj_1>A house</obj_1> and <obj_9>a cat</obj_9>."},
            (),
            "description of an object that is not in the tree",
        ),
        ({"about": "obj_9"}, (), "description of an object that is not in the tree"),
        ({}, ("obj_1",), "captions of more than 20% of its objects do not name them"),
        # the weak one is not among its targets
        ({}, ("obj_3",), None),
    ],
)
def test_what_is_not_good_enough(change: dict[str, Any], weak: tuple[str, ...], reason: str | None) -> None:
    item = context(**{"about": "root", "tagged": ROOT_TEXT, "targets": [], **change})
    nodes = {node["id"]: node for node in house_tree(**dict.fromkeys(weak, True))["nodes"]}
    assert refusal(item, nodes) == reason
    if item["status"] == "template":
        assert refusal(item, nodes, with_templates=True) is None


def test_one_weak_caption_of_five_is_let_be() -> None:
    nodes = {f"obj_{n}": tree_node(n, "cat", (n, 0, n + 1, 1), weak=n == 1) for n in range(1, 6)}
    item = context("root", " ".join(f"<obj_{n}>cat</obj_{n}>" for n in range(1, 6)), [])
    assert refusal(item, nodes) is None
    item["tagged"] = item["tagged"].removesuffix("<obj_5>cat</obj_5>")
    assert refusal(item, nodes) is not None


def test_what_was_left_out_is_counted(run: Path, tmp_path: Path) -> None:
    root, house = both_contexts()
    house["status"] = "failed"
    write_image(run, items=[root, house])
    write_image(run, "sa_2", reason="image cannot be read")
    write_image(run, "sa_3")
    (tmp_path / "images" / "sa_3.jpg").unlink()
    folder = write_image(run, "sa_4")
    (folder.path / "contexts.json").unlink()
    summary = export(run, tmp_path / "out")
    assert (summary.images, summary.items, summary.objects) == (1, 1, 4)
    assert summary.skipped == {
        "description failed": 1,
        "image: image cannot be read": 1,
        "image: image file is missing": 1,
        "image: a stage file is missing or broken": 1,
    }
    assert str(summary).splitlines()[0] == "1 images, 1 descriptions with 2 masks, 4 objects"
    assert "- 1 x description failed" in (tmp_path / "out" / "README.md").read_text()


def test_templates_are_exported_on_request(run: Path, tmp_path: Path) -> None:
    write_image(run, items=[context("root", ROOT_TEXT, [], status="template")])
    with pytest.raises(ValueError, match="nothing of .* can be exported: {'description is a template': 1}"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export(run, tmp_path / "out", with_templates=True).items == 1


def test_a_folder_in_use_is_left_alone(run: Path, tmp_path: Path) -> None:
    write_image(run)
    (tmp_path / "out").mkdir()
    export(run, tmp_path / "out")  # an empty one may be there
    with pytest.raises(FileExistsError, match="is not empty"):
        export(run, tmp_path / "out")
    with pytest.raises(ValueError, match="is no folder of `mglmm annotate run`"):
        export(tmp_path / "images", tmp_path / "other")


def test_the_card(run: Path, tmp_path: Path) -> None:
    write_run(run, tmp_path / "images", model="Qwen/Qwen2.5-VL-7B-Instruct")
    write_image(run)
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`Qwen/Qwen2.5-VL-7B-Instruct` named and described" in card
    assert "1 pictures have 2 descriptions" in card and "each of the 4 objects" in card
    assert "| `mgsc` | `train` | 2 | 4 |" in card
    assert "SA-1B: its dataset research license" in card and "templates of the Python package" not in card
    assert 'load_dataset("out", "mgsc", split="train")' in card
    assert "\n\n\n" not in card and "{{" not in card and "{%" not in card


def test_names_without_colons_and_in_their_number() -> None:
    nodes = {
        "obj_1": tree_node(1, "sign: exit", *WINDOWS),
        "obj_2": tree_node(2, "arrow", (8, 8, 9, 9), parent="obj_1"),
        "obj_3": tree_node(3, "glasses", *WINDOWS),
    }
    tagged = "<obj_2>An arrow</obj_2>."
    assert mgsc_item(context("obj_1", tagged, []), IMAGE, nodes)["label"] == "subtree: sign exits"
    assert mgsc_item(context("obj_3", tagged, []), IMAGE, nodes)["label"] == "subtree: glasses"
    assert mgsc_item(context("obj_2", "<obj_1>A sign</obj_1>.", []), IMAGE, nodes)["k1"]["label"] == "sign exit"


@given(
    st.permutations(["obj_1", "obj_2", "obj_3", "obj_4"]),
    st.lists(st.text("ab ,.", max_size=8), min_size=5, max_size=5),
)
def test_keys_are_in_the_order_of_the_text(order: list[str], between: list[str]) -> None:
    tagged = (
        "".join(f"{text}<{name}>{name[4]}</{name}>" for text, name in zip(between, order, strict=False)) + between[4]
    )
    item = mgsc_item(context("root", tagged, order), IMAGE, NODES)
    assert item["gcg_labels"] == ["k1", "k2", "k3", "k4"]
    _, found = read_tags(item["gcg_caption"], set(item["gcg_labels"]))
    assert [key for key, _, _ in found] == item["gcg_labels"]
    assert [item[key]["label"] for key in item["gcg_labels"]] == [NODES[name]["label"] for name in order]


def test_splits() -> None:
    assert [split_of(name) for name in ("sa_57", "sa_58", "sa_101")] == ["train", "validation", "validation"]
