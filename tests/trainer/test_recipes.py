"""The recipes and accelerate's files that ship with the package."""

import re
from pathlib import Path

import pytest
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file

from mglmm.datasets_scripts.families import BUILDERS
from mglmm.modeling_mglmm import MglmmConfig
from mglmm.trainer.config import has_joint_stage, read_config, training_arguments
from mglmm.trainer.plan import plan, read_accelerate
from mglmm.trainer.stages import split_settings
from tests.tiny import tiny_model, tiny_processor

RECIPES = Path(__file__).resolve().parents[2] / "trainer" / "recipes"
PAPER = ("joint", "gcg", "mgsc", "referring", "caption")
ACCELERATE = {"ddp": "ddp", "fsdp2": "fsdp2", "deepspeed_zero2": "zero2", "deepspeed_zero3": "zero3"}

# On 16 GPUs, from the paper and its code.
TRAINING = {
    "max_steps": 30000,
    "per_device_train_batch_size": 16,
    "bf16": True,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 100,
    "max_grad_norm": 1.0,
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "activation_checkpointing": True,  # without, 16 rows of the 7B model need more than 80 GB
}


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name):
    config = read_config(RECIPES / f"{name}.yaml", [])
    assert {key: config.training.get(key) for key in TRAINING} == TRAINING
    assert config.language_model_dtype == "bfloat16"
    assert config.training["max_length"] == (2048 if name in ("gcg", "mgsc") else 1536)
    assert config.training["output_dir"] == f"runs/{name}"
    assert config.adapter == (None if name == "joint" else "runs/joint")
    assert config.model == {
        "vision_tower": "openai/clip-vit-large-patch14-336",
        "language_model": "lmsys/vicuna-7b-v1.5",
        "sam": "facebook/sam-vit-huge",
        "processor": "checkpoints/mglmm-7b-processor",
    }


def datasets_of(name: str) -> dict[str, float | None]:
    data = read_config(RECIPES / f"{name}.yaml", []).data
    return {item.path.removeprefix("rows/"): item.weight for item in data}


def test_the_joint_mixture():
    weights = datasets_of("joint")
    kinds = {
        "semantic": ("ade20k", "cocostuff", "mapillary_vistas", "paco_lvis", "pascal_part"),
        "referring": ("refclef", "refcoco", "refcoco+", "refcocog"),
        "grand": ("grand_referring",),
        "captions": ("coco_captions", "llava_instruct"),
        "grandf": ("grandf_refcocog", "grandf_openpsg", "grandf_flickr30k", "grandf_human"),
        "mgsc": ("mgscdata",),
    }
    assert sorted(weights) == sorted(name for names in kinds.values() for name in names)
    sums = {kind: sum(weights[name] for name in names) for kind, names in kinds.items()}
    assert sums == {"semantic": 15, "referring": 12, "grand": 12, "captions": 40, "grandf": 20, "mgsc": 20}


@pytest.mark.parametrize(
    ("name", "datasets"),
    [
        ("gcg", {"grandf_refcocog": 3, "grandf_openpsg": 3, "grandf_flickr30k": 3, "grandf_human": 1}),  # GLaMM's
        ("mgsc", {"mgscdata": None}),
        ("referring", {"refcoco": 1, "refcoco+": 1, "refcocog": 1}),
        ("caption", {"flickr30k_captions": None}),
    ],
)
def test_data_of_the_fine_tunings(name, datasets):
    assert datasets_of(name) == datasets


@pytest.mark.parametrize("name", PAPER)
def test_comments_name_commands_that_exist(name):
    """Every dataset is one that `mglmm prepare` knows and has its command; the launch names this recipe."""
    head = (RECIPES / f"{name}.yaml").read_text().split("\nmodel:")[0]
    words = set(re.sub(r"[#;\\]", " ", head).split())
    for dataset in datasets_of(name):
        assert dataset in BUILDERS and dataset in words
    assert "mglmm prepare" in head
    assert f"-m mglmm.cli train trainer/recipes/{name}.yaml" in head
    for file in re.findall(r"trainer/recipes/[\w/]+\.yaml", head):
        assert (RECIPES.parents[1] / file).is_file()


COMMON = {"num_machines": 2, "num_processes": 16, "machine_rank": 0, "use_cpu": False, "rdzv_backend": "static"}
FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer,CLIPEncoderLayer,SamVisionLayer",
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_reshard_after_forward": True,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_offload_params": False,
    # Trainer refuses it beside training.activation_checkpointing
    "fsdp_activation_checkpointing": False,
}
ZERO = {
    "deepspeed_multinode_launcher": "standard",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": 1.0,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
}


@pytest.mark.parametrize(
    ("name", "kind", "mixed_precision", "fsdp", "deepspeed"),
    [
        ("ddp", "MULTI_GPU", "bf16", {}, {}),
        # FSDP2's and DeepSpeed's mixed precision would cast the float32 mask path
        ("fsdp2", "FSDP", "no", FSDP, {}),
        ("deepspeed_zero2", "DEEPSPEED", "no", {}, ZERO | {"zero_stage": 2, "zero3_save_16bit_model": False}),
        ("deepspeed_zero3", "DEEPSPEED", "no", {}, ZERO | {"zero_stage": 3, "zero3_save_16bit_model": True}),
    ],
)
def test_accelerate_reads_its_files(name, kind, mixed_precision, fsdp, deepspeed):
    path = RECIPES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert {key: getattr(config, key) for key in COMMON} == COMMON
    assert (config.distributed_type, config.mixed_precision) == (kind, mixed_precision)
    assert (config.fsdp_config, config.deepspeed_config) == (fsdp, deepspeed)
    assert read_accelerate(path) == (16, ACCELERATE[name])
    assert "never run" in path.read_text()
    assert ("--training.bf16 false" in path.read_text()) == (mixed_precision == "no")


def test_layers_to_shard_exist_in_the_model():
    """accelerate raises for a class name that the model lacks, and would shard nothing of that part."""
    names = FSDP["fsdp_transformer_layer_cls_to_wrap"].split(",")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=names
    )
    model = tiny_model(tiny_processor())  # of the same classes as the paper's
    kinds = [type(getattr(model.config, part)) for part in ("vision_config", "text_config", "sam_config")]
    paper = MglmmConfig()
    assert kinds == [type(getattr(paper, part)) for part in ("vision_config", "text_config", "sam_config")]
    plugin.set_auto_wrap_policy(model)
    wrapped = [name for name, module in model.named_modules() if plugin.auto_wrap_policy(module, False, 0)]
    assert len(wrapped) == 2 + 3 + 2  # Llama, CLIP, SAM
    assert {name.split(".")[1] for name in wrapped} == {"language_model", "vision_tower", "pixel_encoder"}


def test_other_accelerate_files_are_not_planned(tmp_path):
    path = tmp_path / "tpu.yaml"
    path.write_text("distributed_type: XLA\nnum_processes: 8\n")
    with pytest.raises(ValueError, match="says XLA None; plans are made for ddp, fsdp2, zero2, zero3"):
        read_accelerate(path)


@pytest.mark.parametrize(
    ("recipe", "file"),
    [("joint", file) for file in ACCELERATE]
    + [("gcg", "fsdp2"), ("mgsc", "deepspeed_zero2"), ("referring", "deepspeed_zero3"), ("caption", "ddp")],
)
def test_recipes_fit_on_their_gpus(recipe, file):
    overrides = [] if file == "ddp" else ["--training.bf16", "false"]
    config = read_config(RECIPES / f"{recipe}.yaml", overrides)
    result = plan(config, *read_accelerate(RECIPES / "accelerate" / f"{file}.yaml"))
    assert (result.rows_per_step, result.steps) == (256, 30000)
    assert result.trainable == 46_535_040
    assert 5 * 2**30 < result.memory_per_gpu < 80e9
    folders = [data.path for data in config.data] + ([config.adapter] if config.adapter else [])
    assert result.missing == folders
    assert not any("bf16" in note for note in result.notes)


def test_the_recipes_of_the_small_model_fit_together(tmp_path):
    names = ("mglmm_small", "mglmm_small_answers", "mglmm_small_wordings", "mglmm_small_views")
    first, answers, wordings, views = configs = [read_config(RECIPES / f"{name}.yaml", []) for name in names]
    assert first.adapter is None
    assert [config.adapter for config in configs[1:]] == [config.training["output_dir"] for config in configs[:-1]]
    assert answers.data[0].path == first.data[0].path and views.data[0].path == wordings.data[0].path
    assert answers.data[0].task_weights.keys() == first.data[0].task_weights.keys()  # without "absent" none is refused
    assert not wordings.data[0].task_weights  # all tasks
    same = ("lora_r", "lora_alpha", "lora_target", "cache_image_features")  # or the adapter would not fit
    for config in configs[1:]:
        assert (config.model, config.language_model_dtype) == (first.model, first.language_model_dtype)
        assert all(config.training[key] == first.training[key] for key in same)
        assert not has_joint_stage(training_arguments({**config.training, "output_dir": str(tmp_path)}))
    for config in (answers, wordings):
        args, settings = split_settings("answer_warmup", {**(config.answer_warmup or {}), "output_dir": str(tmp_path)})
        assert args.max_steps >= 190 and settings["conversations_per_image"] == 18
    for config in (answers, views):
        args, settings = split_settings("mask_path", {**(config.mask_path or {}), "output_dir": str(tmp_path)})
        assert args.max_steps >= 1500 and settings["masks_per_image"] == 5
