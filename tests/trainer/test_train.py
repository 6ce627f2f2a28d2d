"""Reading a run from YAML and command line, and choosing its rows."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mglmm.trainer.config import DataConfig, read_config
from mglmm.trainer.train import main, run
from mglmm.trainer.training_args import MglmmTrainingArguments


@pytest.fixture
def config_file(tmp_path: Path):
    """Writes a valid run with some settings changed; gives its path."""

    def write(**changes: Any) -> Path:
        values = {"model": "base", "data": {"path": "rows"}, "training": {"output_dir": str(tmp_path / "run")}}
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def test_defaults(config_file):
    config = read_config(config_file(), [])
    assert config.data == [DataConfig(path="rows", name=None, split="train", task_weights={})]
    assert config.mask_warmup is None and config.language_model_dtype == "float32"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": "x"}, "there is no setting 'modle'; did you mean 'model'?"),
        ({"mask_warm_up": {}}, "there is no setting 'mask_warm_up'; did you mean 'mask_warmup'?"),
        (
            {"data": {"path": "x", "task_weight": {}}},
            "data: there is no setting 'task_weight'; did you mean 'task_weights'?",
        ),
        (
            {"data": [{"path": "x"}, {"path": "y", "splits": "a"}]},
            "data: there is no setting 'splits'; did you mean 'split'?",
        ),
        (
            {"training": {"learning_rat": 1}},
            "training: there is no setting 'learning_rat'; did you mean 'learning_rate'?",
        ),
        ({"mask_warmup": {"mask_per_image": 1}}, "mask_warmup: .* did you mean 'masks_per_image'?"),
        ({"mask_warmup": {"answers": "USCDF"}}, "mask_warmup: answers is 'USCDF'; choose from uscdf, plain"),
        (
            {"training": {"masks_per_image": 1}},
            "training: there is no setting 'masks_per_image'",
        ),  # of the warm-up only
        ({"data": {"name": "x"}}, "data: path missing"),
        (
            {"data": {"path": "x", "task_limits": {"fine": "1e4"}}},
            "data: task_limits of x holds '1e4', which is no number",
        ),
        ({"data": {"path": "x", "weight": "much"}}, "data: weight of x holds 'much', which is no number"),
        ({"data": []}, "data names no dataset"),
        ({"model": {"vision_tower": "a", "text": "b"}}, "model: there is no setting 'text'"),
        ({"model": {"vision_tower": "a"}}, "model: language_model, sam, processor missing"),
        ({"quantization": "2bit"}, "quantization is '2bit'; choose from 4bit, 8bit"),
        ({"answer_warmup": {"conversations": 3}}, "did you mean 'conversations_per_image'?"),
        ({"data": "rows"}, "data must be a mapping of settings, got 'rows'"),
        ({"training": None}, "training must be a mapping of settings, got None"),
        ({"training": "fast"}, "training must be a mapping of settings, got 'fast'"),
        ({"language_model_dtype": "bf16"}, "language_model_dtype is 'bf16'; choose from float32, bfloat16, float16"),
    ],
)
def test_wrong_settings_name_the_right_ones(config_file, changes, message):
    path = config_file(**changes)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_config(path, [])


@pytest.mark.parametrize("key", ["model", "data", "training"])
def test_missing_keys_are_named(config_file, key):
    path = config_file()
    values = yaml.safe_load(path.read_text())
    del values[key]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=f"{key} missing"):
        read_config(path, [])


def test_a_file_that_is_no_mapping(tmp_path):
    (tmp_path / "run.yaml").write_text("- model\n")
    with pytest.raises(ValueError, match="is not a mapping of settings"):
        read_config(tmp_path / "run.yaml", [])


@pytest.mark.parametrize(
    ("overrides", "value"),
    [
        (["--model", "other"], lambda c: c.model == "other"),
        (["--max_steps", "7"], lambda c: c.training["max_steps"] == 7),  # what belongs to training is known by its name
        (["--training.max_steps", "7"], lambda c: c.training["max_steps"] == 7),
        (["--training.report_to", "[]"], lambda c: c.training["report_to"] == []),
        (["--data.task_weights.fine", "2"], lambda c: c.data[0].task_weights == {"fine": 2}),  # in a new mapping
        (["--mask_warmup.max_steps", "3", "--mask_warmup.masks_per_image", "2"], lambda c: len(c.mask_warmup) == 2),
        (["--mask_warmup", "null"], lambda c: c.mask_warmup is None),
    ],
)
def test_overrides(config_file, overrides, value):
    assert value(read_config(config_file(), overrides))


def test_overrides_of_a_list(config_file):
    path = config_file(data=[{"path": "a"}, {"path": "b"}])
    assert [data.path for data in read_config(path, ["--data.1.path", "c"]).data] == ["a", "c"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--training.max_steps"], "settings come as --key value pairs, got '--training.max_steps'"),
        (["--training.max_step", "3"], "there is no setting 'max_step'; did you mean 'max_steps'?"),
        (["--model.name", "x"], "--model.name: model is 'base' .* has no settings of its own"),
    ],
)
def test_wrong_overrides(config_file, overrides, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_config(config_file(), overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"max_steps": "many", "use_cpu": True}}, "setting max_steps must be int, got 'many'"),
        ({"training": {"learning_rate": "fast", "use_cpu": True}}, "setting learning_rate must be float, got 'fast'"),
        ({"mask_warmup": {"max_steps": 1}}, "mask_warmup works on cached features: set training.cache_image_features"),
        ({"answer_warmup": {"max_steps": 1}}, "answer_warmup works on cached features"),
        ({"streaming": True}, "a stream has no end: set training.max_steps"),
        ({"training": {"max_steps": 0, "use_cpu": True}}, "max_steps is 0 and no stage comes before: nothing would be"),
        (
            {"streaming": True, "rows_per_epoch": 9, "training": {"max_steps": 3, "use_cpu": True}},
            "a stream has no epochs: leave out rows_per_epoch",
        ),
        (
            {"training": {"eval_strategy": "steps", "eval_steps": 1, "use_cpu": True}},
            "training.eval_strategy needs eval_data: name held-out rows",
        ),
        (
            {"adapter": "x", "training": {"lora_r": 0, "trained_modules": ["language_model"], "use_cpu": True}},
            "an adapter cannot be continued in full: merge it first",
        ),
        ({"data": {"path": "/no/such/folder"}}, "/no/such/folder/default/train cannot be opened"),
    ],
)
def test_wrong_values_stop_the_run_before_anything_is_loaded(config_file, changes, message):
    with pytest.raises(ValueError, match=message):
        run(read_config(config_file(**changes), []))


def test_one_process_does_not_share_a_batch_among_gpus(config_file, monkeypatch):
    monkeypatch.setattr(MglmmTrainingArguments, "n_gpu", 2)  # as on a machine with two of them
    with pytest.raises(ValueError, match="one process sees 2 GPUs: start one for each .*--nproc_per_node 2"):
        run(read_config(config_file(), []))


def test_usage():
    with pytest.raises(ValueError, match="usage: mglmm train CONFIG.yaml"):
        main([])
