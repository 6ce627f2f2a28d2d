"""Whole runs from a saved model and a Parquet folder to an adapter, and their resumption after being killed."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.trainer import curves, stages, train
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.mglmm_trainer import MglmmTrainer
from mglmm.trainer.stage_trainer import StageTrainer
from tests.tiny import tiny_model, tiny_processor
from tests.trainer.conftest import uscdf_row, write_dataset

QUIET = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1, "lr_scheduler_type": "constant"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model with a shared tower and tied embeddings, as the small checkpoint has."""
    folder = tmp_path_factory.mktemp("base")
    processor = tiny_processor(shared=True)
    tiny_model(processor, shared=True, tie_word_embeddings=True).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def config_file(tmp_path: Path, model_folder: Path, dataset_folder: str) -> Path:
    values = {
        "model": str(model_folder),
        "data": {"path": dataset_folder, "task_weights": {"referring": 2, "absent": 1, "fine": 1}},
        "mask_warmup": {
            "max_steps": 4,
            "save_steps": 2,
            "mask_size": 16,
            "masks_per_image": 2,
            "per_device_train_batch_size": 2,
            "learning_rate": "2e-3",
            **QUIET,
        },
        "training": {
            "output_dir": str(tmp_path / "run"),
            "cache_image_features": str(tmp_path / "features"),
            "max_steps": 4,
            "save_steps": 2,
            "mask_size": 16,
            "per_device_train_batch_size": 2,
            "learning_rate": "5e-3",
            "lora_dropout": 0.0,
            **QUIET,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than these runs."""
    monkeypatch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)


def log_of(folder: Path, stage: str) -> list[dict]:
    entries = [json.loads(line) for line in (folder / f"{stage}_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def die_at(monkeypatch: pytest.MonkeyPatch, trainer: type, step: int) -> None:
    """The training of `trainer` is torn down in the middle of its step number `step` (from 0)."""
    original = trainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", training_step)


def test_a_run_writes_adapter_log_and_curves(config_file, model_folder, tmp_path, rows, capsys):
    train.main([str(config_file)])
    folder = tmp_path / "run"
    printed = capsys.readouterr().out
    assert "processes: 1" in printed and "8 rows" in printed and f"result, log and curves: {folder}" in printed

    warmup, joint = log_of(folder, "mask_warmup"), log_of(folder, "training")
    assert [entry["step"] for entry in warmup] == [entry["step"] for entry in joint] == [1, 2, 3, 4]
    assert {"mask_bce_loss", "mask_dice_loss"} <= warmup[0].keys()
    assert {"ce_loss", "mask_bce_loss", "mask_dice_loss", "grad_norm"} <= joint[0].keys()
    assert joint[0]["learning_rate"] == 5e-3
    for stage in ("mask_warmup", "training"):
        with Image.open(folder / f"{stage}_curves.png") as curves:
            curves.verify()
            assert curves.format == "PNG" and curves.width > 2 * curves.height

    # The folder is all that is needed beside the base: processor and adapter, with the warmed-up decoder in it.
    processor = MglmmProcessor.from_pretrained(folder)
    base = MglmmForConditionalGeneration.from_pretrained(model_folder)
    batch = MglmmDataCollator(processor, 16)(rows)
    with torch.no_grad():
        before = base(**batch)
        after = PeftModel.from_pretrained(base, folder).merge_and_unload()(**batch)
    assert after.ce_loss < before.ce_loss and after.mask_bce_loss < before.mask_bce_loss


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("trainer", "step"),
    [
        (StageTrainer, 3),  # in the first stage, after its checkpoint of step 2
        (MglmmTrainer, 0),  # between the stages
        (MglmmTrainer, 3),  # in the second stage, after its checkpoint of step 2
    ],
)
def test_a_killed_run_continues(config_file, tmp_path, monkeypatch, trainer, step):
    with monkeypatch.context() as patch:
        die_at(patch, trainer, step)
        with pytest.raises(KeyboardInterrupt):
            train.main([str(config_file)])
    folder = tmp_path / "run"
    assert not (folder / "adapter_model.safetensors").exists()
    warmed_up = folder / "mask_warmup.safetensors"
    assert warmed_up.exists() == (trainer is MglmmTrainer)

    steps = {StageTrainer: 0, MglmmTrainer: 0}
    for kind in steps:
        original = kind.training_step

        def counted(self, *args, kind=kind, original=original, **kwargs):
            steps[kind] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "training_step", counted)
    train.main([str(config_file)])
    resumed_at = 2 if step else 0
    if trainer is StageTrainer:
        assert steps == {StageTrainer: 4 - resumed_at, MglmmTrainer: 4}
    else:
        assert steps == {StageTrainer: 0, MglmmTrainer: 4 - resumed_at}
    assert [entry["step"] for entry in log_of(folder, "training")] == [1, 2, 3, 4]
    assert [entry["step"] for entry in log_of(folder, "mask_warmup")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    ("overrides", "step"),
    [
        (["--mask_warmup", "null"], 3),
        (["--mask_warmup", "null", "--training.train_sampling_strategy", "group_by_length"], 3),
        ([], 0),  # between the stages: the result of the first comes from its file
    ],
)
def test_a_killed_second_stage_ends_with_the_same_weights(config_file, tmp_path, monkeypatch, overrides, step):
    with monkeypatch.context() as patch:
        die_at(patch, MglmmTrainer, step)
        with pytest.raises(KeyboardInterrupt):
            train.main([str(config_file), *overrides])
    train.main([str(config_file), *overrides])
    train.main([str(config_file), *overrides, "--training.output_dir", str(tmp_path / "straight")])
    resumed, straight = adapter_of(tmp_path / "run"), adapter_of(tmp_path / "straight")
    assert resumed.keys() == straight.keys()
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.usefixtures("no_curves")
def test_a_finished_run_is_not_repeated(config_file, tmp_path, monkeypatch):
    train.main([str(config_file)])
    before = adapter_of(tmp_path / "run")
    die_at(monkeypatch, StageTrainer, 0)
    die_at(monkeypatch, MglmmTrainer, 0)
    monkeypatch.setattr(stages, "phrase_states", None)
    train.main([str(config_file)])
    after = adapter_of(tmp_path / "run")
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("no_curves")
def test_an_unfinished_checkpoint_is_passed_over(config_file, tmp_path):
    overrides = ["--mask_warmup", "null"]
    train.main([str(config_file), *overrides, "--training.max_steps", "2"])
    unfinished = tmp_path / "run" / "checkpoint-3"
    unfinished.mkdir()
    (unfinished / "adapter_model.safetensors").write_bytes(b"")
    train.main([str(config_file), *overrides])
    assert [entry["step"] for entry in log_of(tmp_path / "run", "training")] == [1, 2, 3, 4]


@pytest.mark.usefixtures("no_curves")
def test_without_cache_and_with_a_bfloat16_language_model(config_file, tmp_path):
    overrides = ["--mask_warmup", "null", "--training.cache_image_features", "null"]
    overrides += ["--language_model_dtype", "bfloat16", "--training.max_steps", "3"]
    train.main([str(config_file), *overrides])
    losses = [entry["loss"] for entry in log_of(tmp_path / "run", "training")]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert all(value.dtype == torch.float32 for value in adapter_of(tmp_path / "run").values())


@pytest.mark.usefixtures("no_curves")
def test_datasets_may_give_the_same_id_to_different_pictures(config_file, tmp_path, dataset_folder):
    rows = [{**uscdf_row(seed, "referring", ("the hat",)), "image_id": str(seed - 3)} for seed in (3, 4)]
    other = write_dataset(tmp_path / "other", rows)
    values = yaml.safe_load(config_file.read_text())
    values |= {"data": [{"path": dataset_folder}, {"path": other}], "mask_warmup": None}
    config_file.write_text(yaml.safe_dump(values))
    train.main([str(config_file), "--training.max_steps", "5", "--training.train_sampling_strategy", "sequential"])
    assert len(log_of(tmp_path / "run", "training")) == 5  # 8 rows of the first and 2 of the second
    assert len(list((tmp_path / "features").rglob("*.safetensors"))) == 5


@pytest.mark.usefixtures("no_curves")
def test_a_run_goes_on_from_an_adapter(config_file, tmp_path):
    """With LoRA on more layers than before: what both know is taken over, the rest starts fresh."""
    train.main([str(config_file), "--mask_warmup", "null"])
    first = adapter_of(tmp_path / "run")
    options = ["--mask_warmup", "null", "--adapter", str(tmp_path / "run"), "--training.max_steps", "1"]
    options += ["--training.learning_rate", "1e-9", "--training.mask_learning_rate", "1e-9"]
    wider = ["--training.lora_target", r".*\.language_model\..*\.(q|k|v)_proj"]
    train.main([str(config_file), *options, *wider, "--training.output_dir", str(tmp_path / "wider")])
    second = adapter_of(tmp_path / "wider")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-6, rtol=0)
    fresh = second.keys() - first.keys()
    assert fresh and all(".k_proj." in name for name in fresh)

    options[3] = str(tmp_path / "wider")
    with pytest.raises(ValueError, match="weights that this run does not train"):
        train.main([str(config_file), *options, "--training.output_dir", str(tmp_path / "narrower")])
