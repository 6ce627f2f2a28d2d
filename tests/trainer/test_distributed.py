"""One process and several give the same gradients and the same logged losses, whichever of them gets the masks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.distributed_run import ROWS, eight, train

REPOSITORY = Path(__file__).resolve().parents[2]
LOSSES = ("loss", "ce_loss", "mask_bce_loss", "mask_dice_loss", "mask_iou")


def launch(output: Path, rows: str, batch_size: int, accumulation: int) -> None:
    """The same as `train` in two processes over gloo."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.trainer.distributed_run", str(output), rows, str(batch_size), str(accumulation)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]


def test_the_rows_are_as_uneven_as_they_claim():
    assert [len(row["masks"]) for row in ROWS["uneven"]] == [0, 1, 7, 0, 1, 0, 0, 7]
    assert len(eight((0,) * 8)) == 8


@pytest.mark.parametrize("rows", ["uneven", "one rank without"])
def test_batch_accumulation_and_processes_are_one(rows, tmp_path):
    results = {}
    for name, batch_size, accumulation in (("whole", 8, 1), ("accumulated", 2, 4)):
        train(tmp_path / f"{name}.pt", rows, batch_size, accumulation)
    launch(tmp_path / "two.pt", rows, 2, 2)
    for name in ("whole", "accumulated", "two"):
        results[name] = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    assert [results[name]["world"] for name in results] == [1, 1, 2]

    whole = results.pop("whole")
    (first,) = [entry for entry in whole["log"] if "loss" in entry]
    assert all(first[name] > 0 for name in LOSSES[:4])
    for name, result in results.items():
        (entry,) = [entry for entry in result["log"] if "loss" in entry]
        for key in LOSSES:
            assert entry[key] == pytest.approx(first[key], abs=1e-5, rel=1e-5), (name, key)
        assert result["parameters"].keys() == whole["parameters"].keys()
        for key, parameter in whole["parameters"].items():  # at a learning rate of 1 they differ as the gradients do
            torch.testing.assert_close(result["parameters"][key], parameter, atol=1e-5, rtol=1e-5, msg=f"{name} {key}")
        for key in LOSSES:
            key = f"eval_{key}"
            assert result["metrics"][key] == pytest.approx(whole["metrics"][key], abs=1e-4, rel=1e-4), (name, key)
