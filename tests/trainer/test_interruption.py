"""Runs that are stopped by real signals, and go on to the weights of one that never was."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mglmm.trainer import curves, train
from mglmm.trainer.checkpoints import last_checkpoint
from tests.tiny import tiny_model, tiny_processor

REPOSITORY = Path(__file__).resolve().parents[2]
SIGNALLED = """
import os, signal, sys
import mglmm
from mglmm.trainer import curves, train
from mglmm.trainer.mglmm_trainer import MglmmTrainer

original = MglmmTrainer.training_step

def training_step(self, *args, **kwargs):
    loss = original(self, *args, **kwargs)
    if self.state.global_step == 3:  # in the fourth step, after its gradients and before its update
        os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    return loss

MglmmTrainer.training_step = training_step
curves.plot_curves = lambda *args, **kwargs: None
train.main(sys.argv[2:])
"""


@pytest.fixture
def config_file(tmp_path: Path, dataset_folder: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six steps with dropout, a checkpoint after every second."""
    monkeypatch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)
    processor = tiny_processor()
    tiny_model(processor).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    values = {
        "model": str(tmp_path / "base"),
        "data": {"path": dataset_folder, "task_weights": {"referring": 2, "absent": 1, "fine": 1}},
        "rows_per_epoch": 6,  # so that the kill is in the second epoch
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 6,
            "save_steps": 2,
            "mask_size": 16,
            "per_device_train_batch_size": 2,
            "learning_rate": 5e-3,
            "lora_dropout": 0.5,  # random numbers in every step
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_signalled_run_ends_with_the_same_weights(config_file, tmp_path):
    cases = {"SIGKILL": 2, "SIGTERM": 4}  # the step of the last checkpoint: SIGTERM lets the fourth step end and saves
    train.main([str(config_file), "--training.output_dir", str(tmp_path / "straight")])
    straight = load_file(tmp_path / "straight" / "adapter_model.safetensors")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets_cache")
    for name, last in cases.items():
        folder = tmp_path / name
        command = [sys.executable, "-c", SIGNALLED, name, str(config_file), "--training.output_dir", str(folder)]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
        if name == "SIGKILL":
            assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        else:
            assert done.returncode == 0, done.stderr[-3000:]
            assert f"stopped by SIGTERM after step 4, saved in {folder}: the same command goes on" in done.stdout
        assert not (folder / "adapter_model.safetensors").exists()
        assert last_checkpoint(folder) == str(folder / f"checkpoint-{last}")

        train.main([str(config_file), "--training.output_dir", str(folder)])
        resumed = load_file(folder / "adapter_model.safetensors")
        assert resumed.keys() == straight.keys()
        assert [key for key in straight if not torch.equal(resumed[key], straight[key])] == []
