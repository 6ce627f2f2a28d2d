"""Prepared data goes to a hub and comes back: with its pictures, or with references that a local folder completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.prepare import prepare
from mglmm.datasets_scripts.publish import load_with_images, push_dataset, read_contents
from tests.hub_server import TOKEN, HubServer, hub_server

ROOT = Path(__file__).resolve().parents[2]

PUSH = """
import sys
from mglmm.datasets_scripts.publish import push_dataset

rows, data, token = sys.argv[1:]
push_dataset(rows, "me/hats", token=token)
push_dataset(rows, "me/hats", token=token)  # again: the same files
push_dataset(rows, "me/paths", images="reference", image_root=data, private=True, license="cc-by-4.0", token=token)
"""

LOAD = """
import json, sys
import datasets
from mglmm.datasets_scripts.lint import lint
from mglmm.datasets_scripts.publish import load_with_images

data, output = sys.argv[1:]
whole = datasets.load_dataset("me/hats", "default", split="train")
joined = load_with_images("me/paths", data, "default", split="train")
streamed = load_with_images("me/paths", data, "default", split="train", streaming=True)
found = {
    "features": [str(whole.features), str(joined.features), str(streamed.features)],
    "rows": [len(whole), len(joined)],
    "sizes": [row["image"].size for rows in (whole, joined, streamed) for row in [next(iter(rows))]],
    "same": whole.remove_columns("image").to_list() == joined.remove_columns("image").to_list(),
    "streamed": [row["messages"] for row in streamed] == joined["messages"][:],
    "pixels": all(one.tobytes() == other.tobytes() for one, other in zip(whole["image"], joined["image"])),
    "bare": datasets.load_dataset("me/paths", "default", split="train")[0]["image"],
    "linted": sum(lint("me/hats", config="benchmark").rows.values()),
}
json.dump(found, open(output, "w"))
"""


def run_python(code: str, *arguments: object, home: Path, server: HubServer) -> None:
    environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env = {**os.environ, **environment, "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.fixture
def rows(tiny_dataset: Path, tmp_path: Path) -> Path:
    """Prepared rows that hold the paths of their pictures."""
    prepare("photos", tiny_dataset, tmp_path / "rows", images="path", num_proc=1)
    return tmp_path / "rows"


def test_the_way_to_the_hub_and_back(tiny_dataset: Path, rows: Path, tmp_path: Path) -> None:
    with hub_server() as server:
        run_python(PUSH, rows, tiny_dataset, TOKEN, home=tmp_path, server=server)
        run_python(LOAD, tiny_dataset, tmp_path / "found.json", home=tmp_path, server=server)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["features"] == [str(FEATURES)] * 3
    count = read_contents(rows).rows["default", "train"]
    assert found["rows"] == [count] * 2 and found["sizes"] == [[60, 40]] * 3
    assert found["same"] and found["streamed"] and found["pixels"]
    assert found["bare"] == "images/person.jpg"
    assert found["linted"] == read_contents(rows).rows["benchmark", "validation"]

    whole, paths = (server.repositories[f"datasets/me/{name}"] for name in ("hats", "paths"))
    assert (whole.private, paths.private) == (False, True)
    written = sorted(str(path.relative_to(rows)) for path in rows.rglob("*") if path.is_file())
    assert sorted(whole.files) == sorted(paths.files) == written
    assert str(tiny_dataset).encode() not in b"".join([*whole.files.values(), *paths.files.values()])

    card = DatasetCard(whole.files["README.md"].decode())
    assert (card.data.license, card.data.pretty_name) == ("other", "photos")
    assert card.data.size_categories == ["n<1K"] and "image-segmentation" in card.data.task_categories
    assert [config["config_name"] for config in card.data.configs] == ["default", "benchmark", "paraphrases"]
    assert {info["config_name"] for info in card.data.dataset_info} == {"default", "benchmark", "paraphrases"}
    assert {"name": "image", "dtype": "image"} in card.data.dataset_info[0]["features"]
    assert f"| `default` | `train` | {count} | {read_contents(rows).masks['default', 'train']} |" in card.text
    assert 'load_dataset("me/hats", "default", split="train")' in card.text and "load_with_images" not in card.text

    card = DatasetCard(paths.files["README.md"].decode())
    assert card.data.license == "cc-by-4.0"
    assert 'load_with_images("me/paths", "FOLDER_OF_THE_PICTURES", "default", split="train")' in card.text
    assert {"name": "image", "dtype": "string"} in card.data.dataset_info[0]["features"]


def test_the_card_of_a_prepared_folder(rows: Path) -> None:
    card = DatasetCard.load(rows / "README.md")
    assert "| referring |" in card.text and "| fashion |" in card.text
    assert "- 1 x part smaller than 30 pixels" in card.text
    assert "\n\n\n" not in card.text and "{{" not in card.text and "{%" not in card.text


def test_terms_that_are_a_text_are_kept(rows: Path) -> None:
    from mglmm.hub_cards.cards import dataset_card

    terms = "cc-by-4.0 (annotations), Flickr terms of use (images)"
    card = dataset_card(read_contents(rows), FEATURES, name="hats", terms=terms, repo_id="me/hats")
    assert (card.data.license, card.data.to_dict()["license_details"]) == ("other", terms)
    assert terms in card.text


def test_counts_are_those_of_the_rows(rows: Path) -> None:
    contents = read_contents(rows)
    train = pq.read_table(rows / "default" / "train-00000-of-00001.parquet").to_pylist()
    assert contents.rows["default", "train"] == len(train)
    assert contents.masks["default", "train"] == sum(len(row["masks"]) for row in train)
    assert contents.tasks.total() == contents.sources.total() == contents.rows.total()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": "reference"}, "give image_root"),
        ({"images": "reference", "image_root": "/usr"}, "is not below /usr"),
    ],
)
def test_references_need_their_root(rows: Path, monkeypatch: pytest.MonkeyPatch, options: dict, message: str) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("too early"))
    with pytest.raises(ValueError, match=message):
        push_dataset(rows, "me/hats", **options)


def test_only_pictures_leave_the_machine(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of somebody else may name any file."""
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: pytest.fail("too early"))
    secret = tmp_path / "secret"
    secret.write_text("password")
    file = rows / "default" / "train-00000-of-00001.parquet"
    content = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    content = content.cast_column("image", datasets.Image(decode=False)).to_list()
    content[0]["image"]["path"] = str(secret)
    with datasets.arrow_writer.ParquetWriter(features=FEATURES, path=str(file)) as writer:
        for row in content:
            writer.write(row)
        writer.finalize()
    with pytest.raises(ValueError, match="image cannot be read"):
        push_dataset(rows, "me/hats")


def test_joining_refuses_what_is_not_there(tiny_dataset: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no references"):
        load_with_images(rows, tiny_dataset, "default", split="train", cache_dir=str(tmp_path / "cache"))
    features = datasets.Features({**FEATURES, "image": datasets.Value("string")})
    for name, message in (("../rows/README.md", "leads out"), ("images/none.jpg", "is missing")):
        row = dict.fromkeys(FEATURES) | {"image": name, "messages": [], "masks": [], "regions": []}
        folder = tmp_path / message.split()[0]
        folder.mkdir()
        datasets.Dataset.from_list([row], features=features).to_parquet(folder / "train.parquet")
        with pytest.raises(ValueError, match=message):
            load_with_images(folder, tiny_dataset, split="train", cache_dir=str(tmp_path / "cache"))
        streamed = load_with_images(folder, tiny_dataset, split="train", streaming=True)
        with pytest.raises(ValueError, match=message):
            next(iter(streamed))
