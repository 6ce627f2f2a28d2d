"""The stage that trains the mask path alone: on the right states, with the gradients of a joint step, drawn by weight."""

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.trainer import curves, mask_stage, train
from mglmm.trainer.config import DataConfig, read_config
from mglmm.trainer.data_collator import MglmmDataCollator, masks_of
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.mask_stage import (
    MaskCollator,
    MaskImages,
    MaskPath,
    conversation_states,
    draw_conversations,
)
from mglmm.trainer.mixture import load_mixture
from mglmm.trainer.plan import plan
from mglmm.trainer.stages import check_sources
from mglmm.trainer.trainable import UNTRAINED
from mglmm.trainer.training_args import MASK_MODULES
from tests.tiny import tiny_model, tiny_processor
from tests.trainer.conftest import box_mask, uscdf_row, write_dataset

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def mixture(dataset_folder, tmp_path, rows):
    """Rows with 2, 0, 3 and 1 masks; those of the third are of another source."""
    rows[2] = {**rows[2], "source": "other"}
    return load_mixture([DataConfig(write_dataset(tmp_path / "once", rows))], seed=0)


@pytest.fixture
def stage(mixture, adapted, tmp_path):
    """Model with LoRA that matters and would drop out, collator of the joint stage, and the states of `mixture`."""
    model, processor = adapted(shared=True, lora_dropout=0.5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    base = model.get_base_model()
    cache = FeatureCache(tmp_path / "features", base, processor)
    cache.fill(base, processor, [mixture[i]["image"] for i in range(4)])
    collator = MglmmDataCollator(processor, mask_size=16, feature_cache=cache)
    numbers = draw_conversations(mixture, 4, seed=0)
    return model, collator, conversation_states(model, mixture, collator, numbers, tmp_path / "states")


def images_of(mixture, states, draws=50, source_weights=None, phrase_weights=None, seed=0) -> MaskImages:
    return MaskImages(mixture, states, source_weights or {}, phrase_weights or {}, draws, seed)


def test_conversations_are_drawn_by_the_weights_of_their_tasks(dataset_folder):
    config = DataConfig(dataset_folder, task_weights={"referring": 3, "absent": 1})
    mixture = load_mixture([config], seed=0)
    numbers = draw_conversations(mixture, 4, seed=0)
    assert len(numbers) == 3 and {mixture[n]["task"] for n in numbers} == {"referring"}  # the fourth has no mask
    assert len(draw_conversations(mixture, 400, seed=0)) == 4  # none twice
    lengths = [mixture.lengths[n] for n in numbers]
    assert lengths == sorted(lengths, reverse=True)


def test_states_are_those_that_a_whole_pass_decodes(stage, mixture, monkeypatch):
    model, collator, states = stage
    assert sorted(states["rows"].tolist()) == [0, 0, 2, 2, 2, 3]
    base = model.eval().get_base_model()
    decoded = []
    monkeypatch.setattr(
        base.model, "decode_masks", lambda given, *_: decoded.append(given) or torch.zeros(len(given), 8, 8)
    )
    for number in (0, 2, 3):
        with torch.no_grad():
            model(**collator([mixture[number]]))
        own = states["rows"] == number
        assert states["masks"][own].tolist() == list(range(len(decoded[-1])))
        torch.testing.assert_close(states["states"][own], decoded[-1], atol=1e-5, rtol=1e-5)


def test_a_bad_row_is_left_out(stage, dataset_folder, rows, tmp_path, capsys):
    model, collator, _ = stage
    rows[2]["masks"] = rows[2]["masks"][:2]  # of three
    mixture = load_mixture([DataConfig(write_dataset(tmp_path / "bad", rows))], seed=0)
    states = conversation_states(model, mixture, collator, [2, 0, 3], tmp_path / "others")
    assert states["rows"].tolist() == [0, 0, 3] and states["masks"].tolist() == [0, 1, 0]
    assert "1 of 3 conversations are bad rows and left out" in capsys.readouterr().out


def test_the_gradients_are_those_of_a_joint_step(stage, mixture):
    model, collator, states = stage
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and any(f".{module}." in name for module in MASK_MODULES))
    joint = copy.deepcopy(model).eval()  # the language model without dropout
    outputs = joint(**collator([mixture[i] for i in (0, 2, 3)]))
    (2 * outputs.mask_bce_loss + 0.5 * outputs.mask_dice_loss).backward()

    images = images_of(mixture, states)
    both = {item["image"].getpixel((0, 0)): item for item in (images[k] for k in range(20))}
    assert len(both) == 2  # the rows 0 and 3 show the same picture
    batch = MaskCollator(collator.processor, collator.feature_cache, 9, 16)(list(both.values()))
    losses = MaskPath(model)(**batch)
    losses["loss"].backward()
    torch.testing.assert_close(losses["mask_bce_loss"], outputs.mask_bce_loss)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {name: p.grad for name, p in joint.named_parameters() if p.grad is not None}
    assert gradients.keys() == wanted.keys() and not any(part in name for name in wanted for part in UNTRAINED)
    assert {module for module in MASK_MODULES for name in wanted if f".{module}." in name} == set(MASK_MODULES)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_a_batch_holds_drawn_masks_with_their_states(stage, mixture):
    _, collator, states = stage
    items = [item for item in (images_of(mixture, states)[k] for k in range(30)) if len(item["states"]) == 3]
    drawn = set()
    for item in items:
        batch = MaskCollator(collator.processor, collator.feature_cache, 2, 16)([item, item])
        assert batch["mask_image_index"].tolist() == [0, 0, 1, 1] and batch["mask_labels"].shape == (4, 16, 16)
        for state, label in zip(batch["seg_states"], batch["mask_labels"], strict=True):
            (at,) = [i for i, own in enumerate(states["states"]) if torch.equal(own, state)]
            row = mixture[int(states["rows"][at])]
            mask = masks_of(row)[int(states["masks"][at])]
            assert torch.equal(label, collator.processor.mask_labels([mask], 16)[0])
        pair = frozenset(state.sum().item() for state in batch["seg_states"][:2])
        assert len(pair) == 2  # none twice
        drawn.add((len(batch["image_features"].vision_hidden_states), pair))
    assert len(drawn) == 6  # every pair of three masks, of both pictures that have three


def test_pictures_and_masks_are_drawn_by_weight(stage, mixture):
    _, collator, states = stage
    images = images_of(mixture, states, 300, {"test": 3}, {"dog": 1e9, "hat": 2})
    assert images.shares.tolist() == [0.25, 0.75]  # of the sources other and test
    assert sorted(images.weights.tolist()) == [1, 1, 2, 2, 1e9, 1e9]
    of_test = [images[k]["image"].getpixel((0, 0)) == (20, 20, 20) for k in range(len(images))]
    assert 0.67 < np.mean(of_test) < 0.83
    dog = collator.processor.mask_labels([box_mask("the dog")], 16)[0]
    one = MaskCollator(collator.processor, collator.feature_cache, 1, 16)
    assert all(torch.equal(label, dog) for label in one([images[k] for k in range(20)])["mask_labels"])

    same, other = images_of(mixture, states), images_of(mixture, states, seed=1)
    seeds = [
        [len(draws[k]["states"]), draws[k]["weights"].tolist(), draws[k]["seed"]]
        for draws in (same, other)
        for k in (3, 3)
    ]
    assert seeds[0] == seeds[1] != seeds[2]


def test_pictures_of_two_datasets_may_have_the_same_id(stage, mixture, tmp_path):
    path = write_dataset(tmp_path / "second", [uscdf_row(4, "referring", ("the hat",)) | {"image_id": "0"}])
    both = load_mixture([DataConfig(str(tmp_path / "once")), DataConfig(path)], seed=0)
    states = {"states": torch.zeros(2, 48), "rows": torch.tensor([0, 4]), "masks": torch.tensor([0, 0])}
    assert images_of(both, states).images == [[0], [1]]


# ---------------------------------------------------------------------- whole runs

KILLED = """
import os, signal, sys
import mglmm
from mglmm.trainer import curves, mask_stage, train
from mglmm.trainer.stage_trainer import StageTrainer

where, count = sys.argv[1], 0

def killed_at(number, original):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call

mask_stage.BATCH, mask_stage.SHARD = 1, 2
if where == "states":
    mask_stage._states_of = killed_at(4, mask_stage._states_of)  # the second row of the second file
else:
    StageTrainer.training_step = killed_at(4, StageTrainer.training_step)  # after the checkpoint of step 2
train.main(sys.argv[2:])
"""


@pytest.fixture
def base(tmp_path: Path) -> None:
    processor = tiny_processor(shared=True)
    tiny_model(processor, shared=True, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A run that ends with the stage; needs `base` and `dataset_folder`."""
    common = {"mask_size": 16, "per_device_train_batch_size": 2, "learning_rate": 5e-3, "save_steps": 2}
    common |= {"use_cpu": True, "report_to": [], "disable_tqdm": True, "logging_steps": 1}
    values = {
        "model": str(tmp_path / "base"),
        "data": {"path": str(tmp_path / "dataset"), "task_weights": {"referring": 2, "fine": 1}},
        "language_model_dtype": "bfloat16",
        "mask_path": {"max_steps": 5, "masks_per_image": 2, "phrase_weights": {"hat": 3}, **common},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "cache_image_features": str(tmp_path / "features"),
            "max_steps": 0,
            **common,
        },
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.usefixtures("base", "dataset_folder")
def test_a_run_that_ends_with_the_stage_and_one_that_is_killed_twice(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(mask_stage, "BATCH", 1)
    monkeypatch.setattr(mask_stage, "SHARD", 2)
    first, folder, killed = tmp_path / "first", tmp_path / "run", tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)
        options = ["--mask_path", "null", "--max_steps", "2", "--output_dir", str(first)]
        train.main([str(config_file), *options])
    train.main([str(config_file), "--adapter", str(first)])
    before, after = adapter_of(first), adapter_of(folder)
    assert before.keys() == after.keys()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert {module for module in MASK_MODULES for name in changed if f".{module}." in name} == set(MASK_MODULES)
    assert all(any(f".{module}." in name for module in MASK_MODULES) for name in changed)
    assert not any(part in name for name in changed for part in UNTRAINED)
    assert load_file(next((folder / "mask_path" / "states").rglob("*.safetensors")))["states"].dtype == torch.bfloat16

    models = [MglmmForConditionalGeneration.from_pretrained(path).model for path in (first, folder)]
    spoken = [model.language_model.state_dict() for model in models]
    assert all(torch.equal(value, spoken[1][name]) for name, value in spoken[0].items())
    assert not torch.equal(*(model.mask_projector.linear_1.weight for model in models))

    card = (folder / "README.md").read_text()
    assert (
        "Trained: `mask_path`: mask_projector, mask_decoder, pixel_neck; 5 steps of 2 images, learning rate 0.005."
        in card
    )
    assert "(mask_path_curves.png)" in card and (folder / "mask_path_curves.png").is_file()
    assert len((folder / "mask_path_log.jsonl").read_text().splitlines()) == 6  # five steps and the summary
    assert not (folder / "training_log.jsonl").exists() and (folder / "tokenizer.json").is_file()

    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "datasets_cache")
    arguments = [str(config_file), "--adapter", str(first), "--output_dir", str(killed)]
    for where in ("states", "training"):
        command = [sys.executable, "-c", KILLED, where, *arguments]
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        files = sorted((killed / "mask_path" / "states").rglob("*.*"))
        assert [file.name for file in files] == [f"0000{i}.safetensors" for i in range(1 if where == "states" else 3)]
    assert not (killed / "mask_path.safetensors").exists() and (killed / "mask_path" / "checkpoint-2").is_dir()
    written = [file.stat().st_mtime_ns for file in files]
    with monkeypatch.context() as patch:
        patch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)
        train.main(arguments)
        assert [file.stat().st_mtime_ns for file in files] == written
        resumed = adapter_of(killed)
        assert [name for name in after if not torch.equal(resumed[name], after[name])] == []

        # The stage's result is not made again, and a joint stage after it trains everything.
        monkeypatch.setattr("mglmm.trainer.stages.conversation_states", None)
        train.main([*arguments, "--max_steps", "1"])
    joint = adapter_of(killed)
    assert any("lora_" in name for name in joint if not torch.equal(joint[name], after[name]))


@pytest.mark.usefixtures("base", "dataset_folder")
def test_a_run_that_ends_with_the_answers_takes_no_joint_step(config_file, tmp_path, monkeypatch):
    monkeypatch.setattr(curves, "plot_curves", lambda *args, **kwargs: None)
    stage = yaml.safe_load(config_file.read_text())["mask_path"]
    stage = {key: value for key, value in stage.items() if key not in ("masks_per_image", "phrase_weights")}
    tasks = ["--data.task_weights", "{}"]  # with refusals
    train.main([str(config_file), *tasks, "--mask_path", "null", "--answer_warmup", json.dumps(stage)])
    folder = tmp_path / "run"
    assert not [*folder.glob("training_log*"), *folder.glob("checkpoint-*")] and (folder / "tokenizer.json").is_file()
    assert any(value.any() for name, value in adapter_of(folder).items() if "lora_B" in name)
    card = (folder / "README.md").read_text()
    assert "`answer_warmup`: LoRA of rank 8 on the language model, multi_modal_projector; 5 steps of 2 images" in card
    assert "(answer_warmup_curves.png)" in card


@pytest.mark.usefixtures("base", "dataset_folder")
def test_the_plan_names_the_stage(config_file):
    result = plan(read_config(config_file, []), num_processes=3)
    assert result.steps == 0
    assert "note: the stage mask_path comes before, 5 steps of 6 images\nnote: no joint stage follows" in str(result)
    assert plan(read_config(config_file, ["--max_steps", "7"])).steps == 7


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--mask_path", "{learning_rate: 0.1}"], "mask_path: max_steps missing"),
        (["--mask_path.max_steps", "0"], "mask_path: max_steps must be a whole number above zero, got 0"),
        (["--mask_path.masks_per_image", "1.5"], "masks_per_image must be a whole number above zero, got 1.5"),
        (["--mask_path.conversation", "3"], "no setting 'conversation'; did you mean 'conversations'?"),
        (["--mask_path.phrase_weights", "[hat]"], "phrase_weights must be a mapping of names to numbers, got .'hat'."),
        (
            ["--mask_path.phrase_weights.hat", "0"],
            "phrase_weights gives 'hat' 0, which must be a number above zero",
        ),
        (
            ["--mask_path.source_weights.test", "'2'"],
            "source_weights gives 'test' '2', which must be a number above zero",
        ),
        (
            ["--answer_warmup.source_repeats.test", "1.5"],
            "source_repeats gives 'test' 1.5, which must be a whole number above zero",
        ),
        (["--cache_image_features", "null"], "mask_path works on cached features: set training.cache_image_features"),
        (["--streaming", "true"], "mask_path needs all rows at hand: set streaming to false"),
        (
            ["--trained_modules", "[pixel_neck]"],
            "mask_path trains mask_decoder, mask_projector, which the result would lack",
        ),
        (
            ["--lora_r", "0", "--trained_modules", "[language_model, mask_projector, mask_decoder, pixel_neck]"],
            "mask_path needs a frozen language model: leave language_model out of trained_modules",
        ),
    ],
)
def test_wrong_settings_stop_the_run_before_anything_is_loaded(config_file, overrides, message, monkeypatch):
    monkeypatch.setattr(train, "load_mixture", None)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        train.main([str(config_file), *overrides])


def test_rows_that_the_stage_cannot_use(mixture, dataset_folder):
    with pytest.raises(
        ValueError, match=r"source_weights names tset, of which there is no row \(sources: other, test\)"
    ):
        check_sources(mixture.datasets, {"other": 2, "tset": 3}, "mask_path.source_weights")
    absent = load_mixture([DataConfig(dataset_folder, task_weights={"absent": 1})], seed=0)
    with pytest.raises(ValueError, match="none of the 2 conversations drawn for mask_path has a mask"):
        draw_conversations(absent, 10, seed=0)
    several = load_mixture([DataConfig(dataset_folder, task_weights={"absent": 1, "fine": 1})], seed=0)
    with pytest.raises(ValueError, match="mask_path.conversations is 1: task 'fine' .* gets none"):
        draw_conversations(several, 1, seed=0)
