"""The README is true: its first block runs as it stands, its length is bounded, the files it names exist."""

import re
from pathlib import Path

import pytest
from PIL import Image

import mglmm.small

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) <= 250


def test_the_first_block_runs(tiny, tmp_path, monkeypatch, capsys):
    """With a toy model in place of the small one, so that it is run on every machine."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(mglmm.small, "assemble", lambda: tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    block = python_blocks()[0]
    assert len([line for line in block.splitlines() if line.strip()]) <= 6
    namespace: dict = {}
    exec(block, namespace)
    assert namespace["segcap"].image_size == (30, 40)
    assert namespace["segcap"].clean_text in capsys.readouterr().out


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_linked_files_exist(link):
    assert (ROOT / link).is_file()


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"\bmake ([a-z]+)\b", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
