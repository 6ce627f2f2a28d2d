import json
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from mglmm.datasets_scripts import prepare as prepare_module
from mglmm.datasets_scripts.features import FEATURES
from mglmm.datasets_scripts.hierarchical_coco import HierarchicalCoco
from mglmm.datasets_scripts.prepare import prepare
from mglmm.datasets_scripts.scene import count_labels
from tests.datasets_scripts.conftest import scene_rows


def load(output: Path, config: str, split: str, tmp_path: Path) -> datasets.Dataset:
    return datasets.load_dataset(str(output), config, split=split, cache_dir=str(tmp_path / "cache"))


@pytest.mark.parametrize("images", ["embed", "path"])
def test_what_is_prepared_loads_without_code(tiny_dataset: Path, tmp_path: Path, images: str) -> None:
    output = tmp_path / "out"
    summary = prepare("photos", tiny_dataset, output, images=images, variants=2, seed=3)
    content = json.loads((tiny_dataset / "annotations.json").read_text())
    records = [
        (image, [item for item in content["annotations"] if item["image_id"] == image["id"]])
        for image in content["images"]
        if image["split"] == "train"
    ]
    vocabulary = count_labels(records)
    expected = [
        row
        for image, annotations in records
        for row in scene_rows(
            image,
            annotations,
            vocabulary=vocabulary,
            seed=3,
            variants=2,
            path=tiny_dataset / "images" / image["file_name"],
        )
    ]

    assert datasets.get_dataset_config_names(str(output)) == ["default", "benchmark", "paraphrases"]
    train = load(output, "default", "train", tmp_path)
    assert train.features == FEATURES
    assert train.remove_columns(["image", "ignore_mask"]).to_list() == expected
    assert set(train["ignore_mask"]) == {None}
    assert train[0]["image"].size == (60, 40)
    raw = train.cast_column("image", datasets.Image(decode=False))[0]["image"]
    file = tiny_dataset / "images" / "person.jpg"
    assert raw == (
        {"bytes": file.read_bytes(), "path": "person.jpg"} if images == "embed" else {"bytes": None, "path": str(file)}
    )

    validation = load(output, "default", "validation", tmp_path)
    assert set(validation["image_id"]) == {"3"}
    benchmark = load(output, "benchmark", "validation", tmp_path)
    assert benchmark["task"][:3] == ["object", "part", "part"]
    paraphrases = load(output, "paraphrases", "validation", tmp_path)
    assert paraphrases["task"][:] == ["object", "part", "part"]
    assert paraphrases["masks"][:] == benchmark["masks"][:3]
    assert paraphrases["messages"][0][0]["content"] != benchmark["messages"][0][0]["content"]
    assert summary.rows == {
        ("default", "train"): len(expected),
        ("default", "validation"): len(validation),
        ("benchmark", "validation"): len(benchmark),
        ("paraphrases", "validation"): 3,
    }
    assert summary.masks["default", "train"] == sum(len(row["masks"]) for row in expected)
    assert summary.skipped == {"part smaller than 30 pixels": 1}


def test_the_summary_is_a_table(tiny_dataset: Path, tmp_path: Path) -> None:
    summary = prepare("photos", tiny_dataset, tmp_path / "out", images="path", limit=1)
    lines = str(summary).splitlines()
    assert lines[0].split() == ["config", "split", "rows", "masks"]
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["default", "train"],
        ["default", "validation"],
        ["benchmark", "validation"],
        ["paraphrases", "validation"],
    ]
    assert lines[5:] == ["skipped 1 x part smaller than 30 pixels", f"written to {tmp_path / 'out'}"]
    assert set(load(tmp_path / "out", "default", "train", tmp_path)["image_id"]) == {"1"}  # limit: first image


def test_processes_do_not_change_the_rows(tiny_dataset: Path, tmp_path: Path) -> None:
    prepare("photos", tiny_dataset, tmp_path / "one", images="path")
    prepare("photos", tiny_dataset, tmp_path / "two", images="embed", num_proc=2)
    one = load(tmp_path / "one", "default", "train", tmp_path).remove_columns("image").to_list()
    assert load(tmp_path / "two", "default", "train", tmp_path).remove_columns("image").to_list() == one


def test_the_builder_streams_without_preparation(tiny_dataset: Path, tmp_path: Path) -> None:
    builder = HierarchicalCoco(config_name="benchmark", data_dir=str(tiny_dataset), cache_dir=str(tmp_path / "cache"))
    assert next(iter(builder.as_streaming_dataset("validation")))["task"] == "object"


KILLED = """
import os, signal, sys
from mglmm.datasets_scripts import prepare as module

write_shard = module.write_shard

def dying(builder, shard):
    if shard.path.name == sys.argv[3]:
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        shard.path.with_suffix(".1.partial").write_bytes(b"half a shard")
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)
    return write_shard(builder, shard)

module.write_shard = dying
module.ROWS_PER_SHARD = 1
module.prepare("photos", sys.argv[1], sys.argv[2], num_proc=1)
"""


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tiny_dataset: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "ROWS_PER_SHARD", 1)
    output = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tiny_dataset), str(output), "train-00002-of-00003.parquet"]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    first = output / "default" / "train-00000-of-00003.parquet"
    begun = first.stat().st_mtime_ns
    with pytest.raises(ValueError, match="begun with seed 0 instead of 1"):
        prepare("photos", tiny_dataset, output, seed=1)

    summary = prepare("photos", tiny_dataset, output)
    assert first.stat().st_mtime_ns == begun  # a finished shard is not made again
    whole = prepare("photos", tiny_dataset, tmp_path / "whole")
    assert (summary.rows, summary.masks, summary.skipped) == (whole.rows, whole.masks, whole.skipped)
    one, other = files_of(output), files_of(tmp_path / "whole")
    del one["README.md"], other["README.md"]  # the summary in it names the folder
    assert one == other and len(one) == 6


def test_an_output_in_use_is_left_alone(tiny_dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        prepare("photos", tiny_dataset, tmp_path / "out")


def test_unknown_names_and_unusable_data_are_refused(tiny_dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown dataset 'pictures'; known: photos"):
        prepare("pictures", tiny_dataset, tmp_path / "out")
    for image in (tiny_dataset / "images").iterdir():
        image.unlink()
    with pytest.raises(ValueError, match="no usable item"):
        prepare("photos", tiny_dataset, tmp_path / "out")
