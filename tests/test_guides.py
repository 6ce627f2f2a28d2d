"""The guides on data are true: their blocks run from top to bottom, and every dataset has its line."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from PIL import Image

from mglmm.cli import main
from mglmm.datasets_scripts.families import BUILDERS
from tests.hub_server import TOKEN, hub_server

ROOT = Path(__file__).resolve().parents[1]
OWN_DATA, DATA = ((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("own_data.md", "data.md"))


def push(arguments: list[str], home: Path) -> dict[str, bytes]:
    """Runs a command against an empty hub; the files of the one repository that it makes."""
    with hub_server() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        env = {**os.environ, **environment, "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "mglmm.cli", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
        ((name, repository),) = server.repositories.items()
    assert name == "datasets/me/hats" and repository.private
    return repository.files


def run_guide(text: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict[str, bytes]]:
    """Runs the blocks in `home`; the names that they define and the files that they push."""
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "cache"))
    names: dict = {}
    pushed: dict[str, bytes] = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        assert language == "bash"
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "mglmm"
            if arguments[0] == "push-dataset":
                pushed = push(arguments, home)
                continue
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as exit_:
                main()
            assert not exit_.value.code, line
    return names, pushed


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names, pushed = run_guide(OWN_DATA, tmp_path, monkeypatch)
    tagged = [row for row in names["rows"] if row["masks"]]
    assert tagged and all(row["image"].size == (120, 80) for row in tagged)
    assert any("the red hat" in message["content"] for row in tagged for message in row["messages"])
    assert "skipped" not in capsys.readouterr().out
    assert datasets.get_dataset_config_names("my_rows") == ["default", "benchmark"]
    (row,) = datasets.load_dataset("my_question_rows", split="train").to_list()
    assert (row["task"], len(row["masks"])) == ("reasoning", 2)
    assert "<article" in Path("my_rows.html").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in pushed["README.md"].decode() and len(pushed) == 4


@pytest.fixture
def coco(tmp_path: Path) -> None:
    """COCO 2017 of one picture a split, in the folder COCO: a dog on the left, and two captions."""
    for number, split in enumerate(("train", "val"), 1):
        name, folder = f"{number:012d}.jpg", tmp_path / "COCO"
        (folder / f"{split}2017").mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (90 * number, 120, 30)).save(folder / f"{split}2017" / name)
        images = [{"id": number, "file_name": name, "height": 40, "width": 60}]
        dog = {
            "id": 1,
            "image_id": number,
            "category_id": 18,
            "segmentation": [[0, 0, 20, 0, 20, 40, 0, 40]],
            "iscrowd": 0,
        }
        texts = ("A dog.", "A dog in a field.")
        captions = [{"id": i, "image_id": number, "caption": text} for i, text in enumerate(texts)]
        instances = {"images": images, "annotations": [dog], "categories": [{"id": 18, "name": "dog"}]}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(instances))
        content = {"images": images, "annotations": captions}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


@pytest.mark.usefixtures("coco")
def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run_guide(DATA, tmp_path, monkeypatch)
    assert names["row"]["source"] in ("coco_instances", "coco_captions") and names["row"]["image"].size == (60, 40)


def test_every_dataset_has_its_line() -> None:
    table = DATA[DATA.index("## The names") : DATA.index('"All kinds"')]
    listed = [
        (name, module)
        for names, module in re.findall(r"^\| (`.*?`) \|.*?\| `(\w+)` \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(.*?)`", names)
    ]
    assert listed and sorted(listed) == sorted((n, b.__module__.rpartition(".")[2]) for n, b in BUILDERS.items())


@pytest.mark.parametrize("guide", [OWN_DATA, DATA])
def test_a_guide_is_short_enough_to_be_read(guide: str) -> None:
    assert len(guide.splitlines()) <= 150
