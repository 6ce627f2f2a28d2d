"""
A benchmark from a folder to results, in one process and in two, through kills; and, for a subprocess to start:

    python -m tests.evaluation.test_run CHECKPOINT DATA OUTPUT BENCHMARK [KILLED_AT]

which evaluates with short answers and kills itself after so many batches.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch

from mglmm.evaluation import predictions as predictions_module
from mglmm.evaluation import run
from mglmm.evaluation.predictions import Predictions
from mglmm.evaluation.report import to_markdown
from mglmm.evaluation.run import evaluate
from tests.evaluation import benchmark_rows

ROOT = Path(__file__).resolve().parents[2]
FILES = ["predictions.jsonl", "report.html", "results.json", "settings.json"]


def shorten() -> dict:
    return {
        name: replace(benchmark, max_new_tokens=dict.fromkeys(benchmark.max_new_tokens, 5))
        for name, benchmark in run.BENCHMARKS.items()
    }


@pytest.fixture
def home(tiny, tmp_path, monkeypatch) -> Path:
    """A folder with the tiny model as `checkpoint`; short answers and a private cache for the test's speed."""
    monkeypatch.setattr(run, "BENCHMARKS", shorten())
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    tiny.model.save_pretrained(tmp_path / "checkpoint")
    tiny.processor.save_pretrained(tmp_path / "checkpoint")
    return tmp_path


def test_from_a_folder_to_results(home) -> None:
    data, output = benchmark_rows.write(home / "data", "refcoco"), home / "out"
    first = evaluate(home / "checkpoint", data, output, "refcoco", limit=3, batch_size=2)
    assert (first["rows"], first["questions"]["generate"], first["limit"]) == (3, 3, 3)
    results = evaluate(home / "checkpoint", data, output, "refcoco", batch_size=4)
    assert results["questions"] == {"generate": 7, "each": 6, "three": 2}
    assert 7 < results["rows_answered"] < 15  # those of the subset are there
    assert json.loads((output / "results.json").read_text()) == results
    assert sorted(path.name for path in output.iterdir()) == FILES
    assert results["numbers"]["clean"].keys() >= {"gIoU", "cIoU", "P@0.5", "questions"}
    assert results["numbers"]["parity"].keys() == {"lisa", "glamm", "mglmm"}
    settings = results["settings"]
    assert (settings["dtype"], settings["generation"]) == ("float32", {"do_sample": False, "num_beams": 1})
    assert all(re.fullmatch("[0-9a-f]{64}", settings[name]) for name in ("checkpoint_sha256", "data_sha256"))
    assert results["counts"]["answers"] == 15 and results["versions"]["torch"].startswith("2.")
    assert "| gIoU |" in to_markdown(results) and "parity wording" in to_markdown(results)

    (home / "checkpoint" / "README.md").write_text("A changed model card changes nothing.")
    again = evaluate(home / "checkpoint", data, output, "refcoco")
    assert (again["rows_answered"], again["numbers"]) == (0, results["numbers"])
    with pytest.raises(ValueError, match="holds predictions made with another dtype: choose another output folder"):
        evaluate(home / "checkpoint", data, output, "refcoco", dtype="bfloat16")
    with pytest.raises(ValueError, match="made with another benchmark"):
        evaluate(home / "checkpoint", data, output, "refcocog")
    with open(home / "checkpoint" / "model.safetensors", "ab") as file:
        file.write(b"\0")
    with pytest.raises(ValueError, match="made with another checkpoint_sha256"):
        evaluate(home / "checkpoint", data, output, "refcoco")


def test_photos_keep_their_groups(home) -> None:
    data = benchmark_rows.write(home / "data", "photos")
    results = evaluate(home / "checkpoint", data, home / "out", limit=6)
    assert [group["rows"] for group in results["groups"].values()] == [6, 6]
    assert results["skipped"] == {"parity": "none of the originals evaluates these rows"}
    assert to_markdown(results).splitlines()[0] == "|  | all | s |"


def test_answers_are_scored_again_without_a_model(home) -> None:
    data, output = benchmark_rows.write(home / "data", "refcoco"), home / "out"
    results = evaluate(home / "checkpoint", data, output, "refcoco")
    file = home / "elsewhere.jsonl"  # without the settings beside it
    file.write_bytes((output / "predictions.jsonl").read_bytes())
    again = evaluate(None, data, home / "again", "refcoco", predictions=file)
    assert again["numbers"] == results["numbers"]
    assert (again["settings"]["checkpoint_sha256"], again["settings"]["dtype"]) == (None, None)
    assert len(again["settings"]["predictions_sha256"]) == 64 and "no checkpoint" in to_markdown(again)
    beside = evaluate(None, data, output, "refcoco", predictions=output / "predictions.jsonl", mode="clean")
    assert beside["settings"]["checkpoint_sha256"] == results["settings"]["checkpoint_sha256"]
    assert beside["numbers"] == {"clean": results["numbers"]["clean"]}

    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if "protocol" not in line))
    partly = evaluate(None, data, home / "again", "refcoco", predictions=file)
    assert partly["numbers"] == {"clean": results["numbers"]["clean"]}
    assert partly["skipped"]["protocol each"] == "no such predictions in the file"
    file.write_text("".join(lines[:10]))
    with pytest.raises(ValueError, match="rows have no prediction, the first is row"):
        evaluate(None, data, home / "again", "refcoco", predictions=file)
    file.write_text("".join(lines).replace('"image_id": "1"', '"image_id": "7"'))
    with pytest.raises(ValueError, match="the predictions belong to another dataset"):
        evaluate(None, data, home / "again", "refcoco", predictions=file)
    other = benchmark_rows.write(home / "other", "grefcoco")
    with pytest.raises(ValueError, match="holds answers for the benchmark 'refcoco', not 'grefcoco'"):
        evaluate(None, other, home / "again", "grefcoco", predictions=output / "predictions.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"benchmark": "refcoco++"},
            "unknown benchmark 'refcoco[+][+]'; known: photos, photos_paraphrased, refcoco, refcoco[+]",
        ),
        ({"model": None}, "name a model to answer the questions, or --predictions FILE"),
        ({"predictions": "p.jsonl"}, "not both"),
        ({"data": "./nowhere"}, "there is no './nowhere'"),
        ({"model": "./nowhere"}, "there is no './nowhere'"),
        ({"split": "testC"}, "testC"),
        ({"benchmark": "gcg", "text_similarity": "./nowhere"}, "the text encoder './nowhere' is not at hand"),
        ({"benchmark": "gcg", "text_similarity": "exact"}, "none of the 7 rows is of a task that GranD-f GCG asks for"),
        ({"benchmark": "photos"}, "benchmark"),  # no such configuration
    ],
)
def test_wrong_input_is_one_clear_error(home, arguments, message) -> None:
    data = benchmark_rows.write(home / "data", "refcoco")
    options = {"model": home / "checkpoint", "data": data, "output": home / "out", "benchmark": "refcoco"} | arguments
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(**options)


def test_broken_pictures_count_and_nothing_but_broken_ones_is_an_error(home) -> None:
    rows = [{**row, "image": {"bytes": b"x", "path": None}} for row in benchmark_rows.reasoning()]
    folder = benchmark_rows.write(home / "data", "reasonseg")
    file = next((folder / "default").glob("*.parquet"))
    raw = benchmark_rows.dataset("reasonseg").features
    datasets.Dataset.from_list(rows[:1] + benchmark_rows.reasoning()[1:], features=raw).to_parquet(file)
    results = evaluate(home / "checkpoint", folder, home / "out", "reasonseg")
    assert (results["counts"]["failed"], results["numbers"]["clean"]["questions"]) == (2, 2)  # both protocols
    (reason,) = results["failures"]
    assert "not a picture that Pillow can read" in reason and f"failed: 2 x {reason}" in to_markdown(results)
    folder = benchmark_rows.write(home / "none", "reasonseg")
    datasets.Dataset.from_list(rows, features=raw).to_parquet(next((folder / "default").glob("*.parquet")))
    with pytest.raises(ValueError, match="none of 4 questions could be asked, the first: .*not a picture"):
        evaluate(home / "checkpoint", folder, home / "out2", "reasonseg")


def start(home: Path, output: str, *arguments: str, processes: int = 1) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "tests.evaluation.test_run"]
    command += [str(home / "checkpoint"), str(home / "data"), str(home / output), *arguments]
    environment = os.environ | {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_killed_runs_and_two_processes_give_the_same_as_one(home) -> None:
    benchmark_rows.write(home / "data", "refcoco")
    whole = evaluate(home / "checkpoint", home / "data", home / "whole", "refcoco", batch_size=1)

    done = start(home, "killed", "refcoco", "4")
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    part = home / "killed" / "predictions.part0.jsonl"
    assert len(part.read_text().splitlines()) == 4
    with open(part, "ab") as file:
        file.write(b'{"row": 5, "im')

    # What one process began two go on with.
    done = start(home, "killed", "refcoco", processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((home / "killed" / "results.json").read_text())
    assert (results["processes"], results["rows_answered"]) == (2, 11)
    assert results["numbers"] == whole["numbers"]
    assert sorted(path.name for path in (home / "killed").iterdir()) == FILES
    both = [Predictions(home / name / "predictions.jsonl") for name in ("whole", "killed")]
    assert list(both[0]) == list(both[1]) and all(both[0][key] == both[1][key] for key in both[0])
    assert done.stdout.count("| gIoU |") == 1  # the main process alone speaks


def main(checkpoint: str, data: str, output: str, benchmark: str, killed_at: str = "-1") -> None:
    left = int(killed_at)
    synchronise = os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        synchronise(descriptor)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    predictions_module.os.fsync = fsync
    run.BENCHMARKS = shorten()
    if (results := evaluate(checkpoint, data, output, benchmark, batch_size=1)) is not None:
        print(to_markdown(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
