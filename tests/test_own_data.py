"""The guide docs/own_data.md is true: its blocks run from top to bottom in an empty folder."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from mglmm.cli import main
from tests.hub_server import TOKEN, hub_server

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")


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


def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: dict = {}
    pushed: dict[str, bytes] = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", GUIDE, flags=re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        assert language == "bash"
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "mglmm"
            if arguments[0] == "push-dataset":
                pushed = push(arguments, tmp_path)
                continue
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as exit_:
                main()
            assert not exit_.value.code, capsys.readouterr().err

    tagged = [row for row in names["rows"] if row["masks"]]
    assert tagged and all(row["image"].size == (120, 80) for row in tagged)
    assert any("the red hat" in message["content"] for row in tagged for message in row["messages"])
    assert "skipped" not in capsys.readouterr().out
    assert datasets.get_dataset_config_names("my_rows") == ["default", "benchmark"]
    (row,) = datasets.load_dataset("my_question_rows", split="train").to_list()
    assert (row["task"], len(row["masks"])) == ("reasoning", 2)
    assert "<article" in Path("my_rows.html").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in pushed["README.md"].decode() and len(pushed) == 4


def test_the_guide_is_short_enough_to_be_read() -> None:
    assert len(GUIDE.splitlines()) <= 150
