"""GRPO on the toy model: a whole run through the YAML, resumption, what the rewards do to the policy, and bad settings."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN, conversation_of
from mglmm.trainer import grpo
from mglmm.trainer.config import DataConfig
from mglmm.trainer.grpo import (
    MglmmGRPOTrainer,
    asked,
    grpo_arguments,
    prompts_of,
    questions_of,
    read_grpo_config,
    run_grpo,
)
from mglmm.trainer.mixture import load_mixture
from mglmm.trainer.rewards import CountMatch
from tests.tiny import Tiny, tiny_model, tiny_processor
from tests.trainer.conftest import uscdf_row, write_dataset

RECIPES = sorted((Path(__file__).resolve().parents[2] / "trainer" / "recipes").glob("*_grpo.yaml"))
QUIET = {
    "use_cpu": True,
    "bf16": False,
    "report_to": [],
    "disable_tqdm": True,
    "logging_steps": 1,
    "save_strategy": "no",
    "lr_scheduler_type": "constant",
    "activation_checkpointing": False,
}
REWARDS = {"well_formed": 1.0, "phrases_have_masks": 0.5, "count_match": 1, "mask_iou": 1.0, "caption_cider": 0.5}
ROWS = [
    uscdf_row(0, "fine", ("the hat", "the dog")),
    uscdf_row(1, "absent", ()),
    uscdf_row(2, "referring", ("the car",), ("the dog", "the hat")),
    uscdf_row(0, "fine", ("the car",)),
]


def talkative(processor: MglmmProcessor) -> MglmmForConditionalGeneration:
    """The toy model, made likely to write tags and to stop: otherwise its random answers would all earn the same."""
    model = tiny_model(processor)
    inputs = prompt_inputs(processor, ROWS[0])
    with torch.no_grad():
        state = model.model(**inputs).last_hidden_state[0, -1]
        tokens = [PHRASE_START, PHRASE_END, SEG_TOKEN, processor.tokenizer.eos_token]
        for token, logit in zip(tokens, (8.0, 8.0, 9.0, 7.0), strict=True):
            model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids(token)] = (
                logit * state / state.square().sum()
            )
    return model


def prompt_inputs(processor: MglmmProcessor, row: dict) -> dict[str, torch.Tensor]:
    inputs = processor.apply_chat_template(
        conversation_of({**row, "messages": row["messages"][:1]}),
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("grpo")
    processor = tiny_processor()
    talkative(processor).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return {"model": str(folder / "model"), "data": write_dataset(folder / "data", ROWS)}


@pytest.fixture(scope="module")
def config_file(tmp_path_factory, folders):
    """Writes a valid run with some settings changed; gives its path."""

    def write(**changes) -> Path:
        folder = tmp_path_factory.mktemp("run")
        values = {
            "model": folders["model"],
            "data": {"path": folders["data"]},
            "rewards": REWARDS,
            "training": {
                "output_dir": str(folder / "out"),
                "max_steps": 5,
                "per_device_train_batch_size": 8,
                "num_generations": 4,
                "max_completion_length": 12,
                "learning_rate": "1e-2",
                "beta": 0.05,
                "lora_r": 4,
                **QUIET,
            },
        }
        values |= {key: change for key, change in changes.items() if key != "training"}
        values["training"] = values["training"] | changes.get("training", {})
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        return folder / "run.yaml"

    return write


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory):
    """A dataset cache of the module's own; and no curves, which take longer to draw than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets_cache")))
        patch.setattr("mglmm.trainer.curves.plot_curves", lambda *args, **kwargs: None)
        yield


@pytest.fixture(scope="module")
def finished(config_file) -> Path:
    return run_grpo(read_grpo_config(config_file(training={"save_strategy": "steps", "save_steps": 3}), []))


def log_of(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "grpo_log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "loss" in entry]


def test_five_steps_log_finite_rewards(finished):
    log = log_of(finished)
    assert [entry["step"] for entry in log] == [1, 2, 3, 4, 5]
    for entry in log:
        for name in REWARDS:
            mean = entry[f"rewards/{name}/mean"]
            # Only descriptions are measured by CIDEr, and not every step asks for one.
            assert (mean is None and name == "caption_cider") or 0.0 <= mean <= 1.0
        assert all(math.isfinite(entry[name]) for name in ("loss", "grad_norm", "reward", "reward_std", "kl"))
    for name in REWARDS:
        assert any(entry[f"rewards/{name}/mean"] is not None for entry in log)
    varied = [name for name in REWARDS if any((entry[f"rewards/{name}/std"] or 0) > 0 for entry in log)]
    assert {"well_formed", "phrases_have_masks", "count_match", "mask_iou"} <= set(varied)
    assert all(entry["grad_norm"] > 0 for entry in log)


def test_five_steps_change_the_policy_and_nothing_else(finished, folders):
    weights = load_file(finished / "adapter_model.safetensors")
    assert all(".language_model." in name and ".lora_" in name for name in weights)
    assert all(value.any() for name, value in weights.items() if "lora_B" in name)  # which starts as zeros
    base = MglmmForConditionalGeneration.from_pretrained(folders["model"]).eval()
    inputs = prompt_inputs(MglmmProcessor.from_pretrained(finished), ROWS[0])
    with torch.no_grad():
        before = base(**inputs).logits[0, -1].softmax(-1)
        after = PeftModel.from_pretrained(base, finished).eval()(**inputs).logits[0, -1].softmax(-1)
    assert (after - before).abs().sum() > 0.01


def test_a_run_started_again_goes_on(finished, config_file):
    """As if killed after the third step: bit-equal to the run that was not."""
    training = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3}
    path = config_file(training=training)
    folder = run_grpo(read_grpo_config(path, []))
    assert run_grpo(read_grpo_config(path, ["--training.max_steps", "5"])) == folder
    assert [entry["step"] for entry in log_of(folder)] == [1, 2, 3, 4, 5]
    once, resumed = (load_file(f / "adapter_model.safetensors") for f in (finished, folder))
    assert once.keys() == resumed.keys()
    assert all(torch.equal(once[name], resumed[name]) for name in once)


@pytest.fixture
def make_trainer(tmp_path, folders):
    """A trainer of one reward on the rows of one task, without a YAML."""

    def make(task: str, reward_of, **training) -> tuple[MglmmGRPOTrainer, Tiny]:
        processor = tiny_processor()
        model = talkative(processor).requires_grad_(False)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 8,
            "num_generations": 8,
            "max_completion_length": 4,
            **QUIET,
        }
        args = grpo_arguments({**defaults, **training}, [1.0])
        mixture = load_mixture([DataConfig(folders["data"], task_weights={task: 1})], 0)
        trainer = MglmmGRPOTrainer(
            model=model,
            reward_funcs=[reward_of(processor)],
            args=args,
            train_dataset=prompts_of(mixture, list(range(len(mixture))) * 4, 0),
            processing_class=processor,
            peft_config=LoraConfig(r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=args.lora_target),
        )
        return trainer, Tiny(model, processor)

    return make


def probability_of_seg(tiny: Tiny, row: dict) -> float:
    tiny.model.eval()
    with torch.no_grad():
        return (
            tiny.model(**prompt_inputs(tiny.processor, row))
            .logits[0, -1]
            .softmax(-1)[tiny.processor.seg_token_id]
            .item()
        )


def test_what_is_rewarded_becomes_more_likely(make_trainer):
    """Where nothing is to be found, `count_match` pays for answers without masks: `[SEG]` is unlearnt."""
    trainer, tiny = make_trainer("absent", CountMatch, max_steps=16, learning_rate=1e-2)
    before = probability_of_seg(tiny, ROWS[1])
    trainer.train()
    after = probability_of_seg(tiny, ROWS[1])
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert before > 0.1 and after < before / 2
    assert sum(rewards[-4:]) > sum(rewards[:4])


def test_the_picture_reaches_the_policy(make_trainer):
    """TRL's log-probabilities are those of our own forward pass with the picture, whatever else a processor returns."""
    trainer, tiny = make_trainer("absent", CountMatch, max_steps=1)
    tiny.model.eval()
    answer = torch.tensor([tiny.processor.tokenizer("Sure.", add_special_tokens=False)["input_ids"]])
    found = []
    for row in (ROWS[1], {**ROWS[1], "image": ROWS[2]["image"]}):
        inputs = prompt_inputs(tiny.processor, row)
        ids = torch.cat([inputs["input_ids"], answer], 1)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            states = tiny.model.model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"])
            # TRL applies the head itself, without `forward`'s rule that `<image>` is no answer.
            logits = tiny.model.lm_head(states.last_hidden_state)
            expected = logits[:, -answer.shape[1] - 1 : -1].log_softmax(-1).gather(-1, answer[..., None])[..., 0]
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model,
                ids,
                mask,
                answer.shape[1],
                pixel_values=inputs["pixel_values"],
                num_images=[1],
                sam_pixel_values=torch.zeros(1),
                original_sizes=torch.zeros(1),
            )
        torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)
        found.append(logps)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("training", "questions"),
    [
        ({"max_steps": 3}, 6),  # 2 groups of 4 in 8 completions
        ({"max_steps": 3, "gradient_accumulation_steps": 2}, 12),
        ({"max_steps": 3, "steps_per_generation": 2}, 8),  # 16 completions serve 2 steps; the last of them half
        ({"max_steps": 3, "num_iterations": 3}, 2),  # one round serves all
        ({"num_train_epochs": 2.5}, 10),
    ],
)
def test_questions_of_a_run(tmp_path, folders, training, questions):
    mixture = load_mixture([DataConfig(folders["data"])], 0)
    settings = {"output_dir": str(tmp_path), "per_device_train_batch_size": 8, "num_generations": 4, **QUIET}
    numbers = questions_of(mixture, grpo_arguments({**settings, **training}, [1.0]))
    assert len(numbers) == questions
    assert all(sorted(numbers[i : i + 4]) == [0, 1, 2, 3] for i in range(0, questions - 3, 4))


def test_prompts_are_one_turn_of_a_row(folders):
    mixture = load_mixture([DataConfig(folders["data"])], 0)
    prompts = prompts_of(mixture, [2] * 20, seed=0)
    assert len(prompts) == 20 and {len(row["prompt"]) for row in prompts} == {1, 3}
    assert prompts[0]["messages"] == prompts[0]["messages"]  # a group asks one and the same turn
    for row in prompts:
        assert "image" not in row  # TRL would add it a second time
        assert [part["type"] for part in row["prompt"][0]["content"]] == ["image", "text"]
        assert row["prompt"][-1]["role"] == "user" and row["messages"][-1]["role"] == "assistant"
        assert len(row["messages"]) == len(row["prompt"]) + 1
        assert row["masks"] == ROWS[2]["masks"][: 1 if len(row["prompt"]) == 1 else 3]


@pytest.mark.parametrize(
    ("draw", "turns"),
    [(0.0, 1), (0.49, 1), (0.5, 3), (0.999, 3)],
)
def test_draws_choose_turns(draw, turns):
    row = {**ROWS[2], "dataset": "photos", "index": 7}
    assert len(asked(row, draw)["prompt"]) == turns


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "photos, row 7 has no picture: leave its task out with task_weights"),  # a text-only row
        ({"image": None, "error": "truncated"}, "photos, row 7 has no picture: truncated"),  # a broken file
        ({"messages": ROWS[0]["messages"][:1], "masks": []}, "row 7 has no assistant turn"),  # nothing to compare with
        ({"masks": []}, r"2 \[SEG\] in assistant turns but 0 masks"),  # not USCDF
    ],
)
def test_rows_that_cannot_be_asked(changes, message):
    with pytest.raises(ValueError, match=message):
        asked({**ROWS[0], "dataset": "photos", "index": 7, **changes}, 0.0)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_can_be_read(path, tmp_path):
    config = read_grpo_config(path, ["--training.output_dir", str(tmp_path)])
    assert config.model and config.data
    grpo_arguments(config.training, list(config.rewards.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward": {}}, "there is no setting 'reward'; did you mean 'rewards'?"),
        ({"rewards": {"mask_iuo": 1}}, "rewards: there is no setting 'mask_iuo'; did you mean 'mask_iou'?"),
        ({"rewards": {}}, "rewards is empty; choose from well_formed, phrases_have_masks, count_match, mask_iou"),
        ({"rewards": {"mask_iou": 0}}, "the weight of reward mask_iou is 0; give a number above 0"),
        ({"rewards": {"mask_iou": "high"}}, "the weight of reward mask_iou is 'high'"),
        ({"rewards": ["mask_iou"]}, r"rewards must be a mapping of settings, got \['mask_iou'\]"),
        ({"training": {"num_generation": 2}}, "training: there is no setting 'num_generation'; did you mean 'num_gen"),
        ({"training": {"reward_weights": [1]}}, "training: there is no setting 'reward_weights'"),  # in rewards
        ({"data": {"name": "x"}}, "data: path missing"),
        ({"language_model_dtype": "bf16"}, "language_model_dtype is 'bf16'; choose from float32, bfloat16, float16"),
    ],
)
def test_wrong_settings(config_file, changes, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        read_grpo_config(config_file(**changes), [])


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lora_r": 0}, "training.lora_r is 0: GRPO trains LoRA only"),
        ({"temperature": "warm"}, "setting temperature must be float, got 'warm'"),
    ],
)
def test_wrong_arguments(tmp_path, training, message):
    with pytest.raises(ValueError, match=message):
        grpo_arguments({"output_dir": str(tmp_path), **QUIET, **training}, [1.0])


def test_an_adapter_is_refused(finished, config_file):
    """Two adapters on one model would be saved as one that fits neither."""
    with pytest.raises(ValueError, match="is an adapter: GRPO adds its own, so merge it first"):
        run_grpo(read_grpo_config(config_file(model=str(finished)), []))


def test_command_line(config_file, capsys, monkeypatch):
    with pytest.raises(ValueError, match="usage: mglmm grpo CONFIG.yaml"):
        grpo.main([])
    seen = []
    monkeypatch.setattr(grpo, "run_grpo", lambda config: seen.append(config) or Path("out"))
    grpo.main([str(config_file()), "--training.beta", "0.5"])
    assert seen[0].training["beta"] == 0.5
    assert capsys.readouterr().out == "adapter, log and curves: out\n"
