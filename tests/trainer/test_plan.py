"""The dry run: parameters, memory and amounts of data, against real models, real optimizers and real batches."""

import resource
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.trainer.config import DataConfig, RunConfig, read_config
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.memory_estimate import STRATEGIES
from mglmm.trainer.plan import Plan, plan
from mglmm.trainer.trainable import make_trainable
from tests.tiny import tiny_model, tiny_processor
from tests.trainer.conftest import training_arguments, write_dataset

PARTS = {
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "language_model": "lmsys/vicuna-7b-v1.5",
    "sam": "facebook/sam-vit-huge",
    "processor": "nowhere/processor",
}


# ---------------------------------------------------------------- the paper's model


@pytest.fixture(scope="module")
def paper() -> Plan:
    training = {"output_dir": "run", "max_steps": 30000, "per_device_train_batch_size": 16, "bf16": True}
    config = RunConfig(model=PARTS, data=[DataConfig("nowhere/rows")], training=training)
    config.language_model_dtype = "bfloat16"
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = plan(config, 16)
    assert time.process_time() - start < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # kilobytes; the weights are 15 GB
    return result


@pytest.mark.parametrize(
    ("name", "total", "trainable"),
    [
        ("vision_tower", 303_507_456, 0),  # openai/clip-vit-large-patch14-336, vision model
        ("pixel_encoder", 637_026_048, 0),  # image encoder of SAM ViT-H
        ("prompt_encoder", 6_476, 0),
        ("mask_decoder", 4_058_340, 4_058_340 - 552_036),  # without IoU head and three hypernetworks
        ("multi_modal_projector", 20_979_712, 20_979_712),  # 1024 -> 4096 -> 4096
        ("mask_projector", 17_830_144, 17_830_144),  # 4096 -> 4096 -> 256
        ("LoRA", 4_194_304, 4_194_304),  # 32 layers x (q, v) x 8 x (4096 + 4096)
        ("new-token rows", 24_576, 24_576),  # 3 tokens x 4096 x (embedding, head)
        ("lm_head", 32_004 * 4096, 0),
        ("untrained originals", 42_874_672, 0),  # of prompt encoder, decoder and both projectors
    ],
)
def test_parameters_of_the_paper(paper, name, total, trainable):
    assert (paper.modules[name].total, paper.modules[name].trainable) == (total, trainable)


def test_known_sums_of_the_paper(paper):
    modules = paper.modules
    new_tokens = 2 * 4 * 4096  # <image>, [SEG], <p>, </p>
    assert modules["language_model"].total + modules["lm_head"].total - new_tokens == 6_738_415_616  # Vicuna-7B
    sam = ("pixel_encoder", "prompt_encoder", "mask_decoder")
    assert sum(modules[name].total for name in sam) == 641_090_864  # SAM ViT-H
    assert paper.total == 7_768_950_112 and paper.trainable == 46_535_040


def test_memory_of_the_paper(paper):
    language_model, towers, projector = 6_738_448_384, 303_507_456 + 637_026_048, 20_979_712
    half = language_model + towers + projector  # the projector's original is kept beside the float32 one that trains
    assert paper.memory["weights"] == 2 * half + 4 * (7_768_950_112 - half)
    assert paper.memory["gradients"] == 4 * 46_535_040
    assert paper.memory["optimizer states"] == 8 * 46_535_040


def test_assumed_rows_and_what_is_missing(paper):
    assert paper.tokens_per_step == 256 * (24 * 24 + 96 + 96)
    assert (paper.images_per_step, paper.supervised_per_step, paper.masks_per_step) == (256, 256 * 96, 256 * 3)
    assert paper.missing == ["nowhere/rows"]
    text = str(paper)
    assert "vision_tower                 303,507,456             0     303,507,456  bfloat16" in text
    assert "30,000 steps: 7,680,000 rows, 5,898,240,000 tokens" in text
    assert "not on this machine, so that training would stop: nowhere/rows" in text
    assert "the processor nowhere/processor is not here" in text


# ---------------------------------------------------------------- the tiny model: plan and reality


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[bool, Path]:
    """Checkpoints with a shared tower and tied embeddings, and with neither."""
    made = {}
    for shared in (False, True):
        made[shared] = tmp_path_factory.mktemp("model")
        processor = tiny_processor(shared)
        tiny_model(processor, shared, tie_word_embeddings=shared).save_pretrained(made[shared])
        processor.save_pretrained(made[shared])
    return made


def tiny_run(folder: Path, data: str | list[DataConfig], **kwargs) -> RunConfig:
    keys = ("adapter", "language_model_dtype", "quantization", "rows_per_epoch", "eval_data")
    run = {key: kwargs.pop(key) for key in keys if key in kwargs}
    training = {"output_dir": "run", "per_device_train_batch_size": 2, "max_steps": 10, **kwargs}
    return RunConfig(
        model=str(folder), data=[DataConfig(data)] if isinstance(data, str) else data, training=training, **run
    )


@pytest.mark.parametrize(
    ("shared", "options"),
    [
        (False, {}),
        (True, {}),  # a neck, and one table of rows
        (False, {"lora_r": 0, "train_new_tokens": False}),  # PEFT's modules only
        (True, {"lora_target": r".*\.language_model\..*\.(q|k|v|o)_proj", "lora_r": 2}),
        (False, {"trained_modules": ["mask_decoder"]}),
        (False, {"lora_r": 0, "trained_modules": ["language_model", "mask_projector"]}),  # without PEFT
        (True, {"lora_r": 0, "trained_modules": ["language_model"]}),
    ],
)
def test_the_plan_counts_what_trains(folders, tmp_path, shared, options):
    result = plan(tiny_run(folders[shared], "nowhere/rows", language_model_dtype="bfloat16", **options))
    processor = MglmmProcessor.from_pretrained(folders[shared])
    model = MglmmForConditionalGeneration.from_pretrained(folders[shared])
    model.model.language_model.to(torch.bfloat16)
    model.lm_head.to(torch.bfloat16)
    model.tie_weights()
    tokens = processor.tokenizer.convert_tokens_to_ids(["<p>", "</p>", "[SEG]"])
    model = make_trainable(model, training_arguments(tmp_path, **options), tokens)
    parameters = list(model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    assert result.total == sum(parameter.numel() for parameter in parameters)
    assert result.trainable == sum(parameter.numel() for parameter in trained)
    assert result.memory["weights"] == sum(parameter.nbytes for parameter in parameters)

    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert result.memory["optimizer states"] == sum(value.nbytes for value in states)
    assert result.memory["gradients"] == sum(parameter.grad.nbytes for parameter in trained)


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "states_per_parameter"),
    [
        ("ddp", 1, 1, 8),
        ("zero2", 1, 4, (8 + 4) / 4),  # DeepSpeed keeps its own float32 copy of what trains
        ("zero3", 4, 4, (8 + 4) / 4),
        ("fsdp2", 4, 4, 8 / 4),
    ],
)
def test_what_four_processes_share(folders, strategy, weights, gradients, states_per_parameter):
    config = tiny_run(folders[False], "nowhere/rows")
    alone, shared = plan(config), plan(config, 4, strategy)
    assert shared.memory["weights"] == pytest.approx(alone.memory["weights"] / weights, abs=1)
    assert shared.memory["gradients"] == pytest.approx(alone.memory["gradients"] / gradients, abs=1)
    assert shared.memory["optimizer states"] == pytest.approx(states_per_parameter * alone.trainable, abs=1)
    assert shared.rows_per_step == 4 * alone.rows_per_step


def test_gathered_layers_of_fsdp(folders):
    """Two of the largest layers and what lies outside of all of them; the rest of the weights is elsewhere."""
    config = tiny_run(
        folders[False], "nowhere/rows", lora_r=0, train_new_tokens=False, trained_modules=["mask_decoder"]
    )
    model = MglmmForConditionalGeneration.from_pretrained(folders[False]).model
    stacks = [model.language_model.layers, model.vision_tower.encoder.layers, model.pixel_encoder.vision_encoder.layers]
    sizes = [[sum(p.nbytes for p in layer.parameters()) for layer in stack] for stack in stacks]
    result = plan(config, 2, "fsdp2")
    whole = sum(count.bytes for count in result.modules.values())
    outside = whole - sum(map(sum, sizes))
    assert result.memory["gathered: two layers, and all outside layers"] == 2 * max(map(max, sizes)) + outside


def test_quantized_weights(folders):
    config = tiny_run(folders[False], "nowhere/rows", lora_r=0, train_new_tokens=False)
    whole = plan(config).modules["language_model"]
    # Llama with 2 layers: q, o 48 x 48, k, v 48 x 24, three of 48 x 96
    linear = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)
    config.quantization = "4bit"
    quantized = plan(config).modules["language_model"]
    assert quantized.total == whole.total
    assert whole.bytes - quantized.bytes == linear * (4 - 0.5 - 4 / 64)
    assert quantized.dtypes == {"4bit", "float32"}


# ---------------------------------------------------------------- activations


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(folders):
    kept = [
        plan(tiny_run(folders[False], "nowhere/rows", **options)).memory["activations"]
        for options in (
            {"activation_checkpointing": True},
            {},
            {"per_device_train_batch_size": 20},
        )
    ]
    assert kept[0] < kept[1] and kept[2] == pytest.approx(10 * kept[1], rel=0.1)


def test_encoders_set_the_peak_unless_their_features_are_cached(paper):
    """SAM's position bias alone: 16 images x 16 heads x 4096 x 4096 values of two bytes."""
    assert paper.memory["activations"] > 16 * 16 * 4096**2 * 2
    training = {"output_dir": "run", "max_steps": 1, "per_device_train_batch_size": 64, "bf16": True}
    training |= {"activation_checkpointing": True}
    config = RunConfig(model=PARTS, data=[DataConfig("nowhere/rows")], training=training)
    with_encoders = plan(config).memory["activations"]
    config.training["cache_image_features"] = "features"
    assert with_encoders > max(64 * 16 * 4096**2 * 2, plan(config).memory["activations"])


# ---------------------------------------------------------------- data


def test_rows_are_measured_as_the_collator_makes_them(folders, dataset_folder, rows):
    result = plan(tiny_run(folders[False], dataset_folder, max_steps=12, gradient_accumulation_steps=2), 2)
    batch = MglmmDataCollator(MglmmProcessor.from_pretrained(folders[False]), 16)(rows)
    assert result.rows_per_step == 2 * 2 * 2
    assert result.tokens_per_step == pytest.approx(8 * batch["attention_mask"].sum().item() / 4)
    assert result.supervised_per_step == pytest.approx(8 * (batch["labels"] != -100).sum().item() / 4)
    assert (result.masks_per_step, result.images_per_step) == (8 * 6 / 4, 8)
    (data,) = result.datasets
    assert (data.rows, data.share, data.drawn, data.epochs) == (8, 1.0, 96.0, 12.0)
    assert result.missing == [] and result.notes == []


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "num_train_epochs": 3}, 6),  # 8 rows, 4 a step
        ({"max_steps": -1, "num_train_epochs": 2, "rows_per_epoch": 10}, 6),  # 10 rows are 3 steps
    ],
)
def test_steps(folders, dataset_folder, options, steps):
    assert plan(tiny_run(folders[False], dataset_folder, **options), 2).steps == steps


def test_steps_are_unknown_without_the_data(folders, dataset_folder):
    data = [DataConfig(dataset_folder), DataConfig("nowhere/rows")]
    result = plan(tiny_run(folders[False], data, max_steps=-1))
    assert result.steps is None and "steps: unknown while datasets are missing" in str(result)


def test_a_mixture(folders, dataset_folder, tmp_path, rows):
    """Weights are shares of the drawn rows; tasks have theirs within a dataset, and limits."""
    other = write_dataset(tmp_path / "other", rows[1:2] * 3)  # without masks
    data = [
        DataConfig(dataset_folder, weight=3, task_weights={"referring": 1, "fine": 1}, task_limits={"referring": 2}),
        DataConfig(other, weight=1),
    ]
    config = tiny_run(folders[False], data, per_device_train_batch_size=8, eval_data=[DataConfig("no/rows")])
    config.adapter = "no/adapter"
    result = plan(config)
    first, second = result.datasets
    assert (first.rows, first.share, first.drawn) == (4, 0.75, 60)
    assert (second.rows, second.share, second.drawn, second.masks) == (3, 0.25, 20, 0)
    assert result.missing == ["no/rows", "no/adapter"]


def test_unweighted_datasets_count_by_their_rows(folders, dataset_folder, tmp_path, rows):
    data = [DataConfig(dataset_folder), DataConfig(write_dataset(tmp_path / "other", rows[:2])), DataConfig("no/rows")]
    result = plan(tiny_run(folders[False], data))
    assert [item.share for item in result.datasets] == pytest.approx([8 / 15, 2 / 15, 5 / 15])
    assert any("taken for as large as the others: no/rows" in note for note in result.notes)


def test_rows_that_will_be_left_out(folders, dataset_folder, rows):
    processor = MglmmProcessor.from_pretrained(folders[False])
    lengths = MglmmDataCollator(processor, 16)(rows)["attention_mask"].sum(1).tolist()
    limit = max(lengths) - 1
    result = plan(tiny_run(folders[False], dataset_folder, max_length=limit))
    assert result.datasets[0].tokens == pytest.approx(np.mean([length for length in lengths if length <= limit]))
    (note,) = result.notes
    assert f"2 of 8 sampled rows are left out, such as: {max(lengths)} tokens" in note
    with pytest.raises(ValueError, match="none of 8 sampled rows can be used"):
        plan(tiny_run(folders[False], dataset_folder, max_length=5))


def test_without_a_tokenizer_characters_are_counted(dataset_folder, rows):
    training = {"output_dir": "run", "max_steps": 1, "per_device_train_batch_size": 1}
    result = plan(RunConfig(model=PARTS, data=[DataConfig(dataset_folder)], training=training))
    characters = [sum(len(message["content"]) for message in row["messages"]) for row in rows]
    assert result.tokens_per_step == 24 * 24 + 48 + np.mean(characters) / 4


# ---------------------------------------------------------------- refusals


def test_a_misspelt_key_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "data": {"path": "x"}, "training": {"max_step": 1}}))
    with pytest.raises(ValueError, match=r"no setting 'max_step'; did you mean 'max_steps'\?"):
        plan(read_config(path, []))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"weight": 0.0}}, "weight 0.0"),
        ({"data": {"split": "test"}}, "has no split 'test'; it has train"),
        ({"data": {"task_weights": {"refering": 1}}}, "task 'refering' has no rows; it has absent, fine, referring"),
        ({"trained_modules": ["mask_decoders"]}, "did you mean 'mask_decoder'"),
        ({"max_steps": "many"}, "setting max_steps must be int, got 'many'"),
    ],
)
def test_what_training_would_refuse(folders, dataset_folder, changes, message):
    changes = dict(changes)
    data = [DataConfig(dataset_folder, **changes.pop("data", {}))]
    with pytest.raises(ValueError, match=message):
        plan(tiny_run(folders[False], data, **changes))


@pytest.mark.parametrize(("strategy", "num_processes"), [("fsdp", 2), ("ddp", 0)])
def test_wrong_strategies(folders, strategy, num_processes):
    with pytest.raises(ValueError, match=f"'{strategy}' on {num_processes} processes: choose from"):
        plan(tiny_run(folders[False], "nowhere/rows"), num_processes, strategy)


def test_half_precision_and_sharding(folders):
    config = tiny_run(folders[False], "nowhere/rows", bf16=True)
    notes = {strategy: " ".join(plan(config, 2, strategy).notes) for strategy in STRATEGIES}
    assert {strategy: "--training.bf16 false" in text for strategy, text in notes.items()} == {
        "ddp": False,
        "fsdp2": True,
        "zero2": True,
        "zero3": True,
    }
    config.training["bf16"] = False
    assert "bf16" not in " ".join(plan(config, 2, "fsdp2").notes)


def test_a_model_that_is_nowhere():
    with pytest.raises(FileNotFoundError, match="configuration of 'nowhere/model' is neither in a folder"):
        plan(RunConfig(model="nowhere/model", data=[DataConfig("rows")], training={"output_dir": "run"}))
