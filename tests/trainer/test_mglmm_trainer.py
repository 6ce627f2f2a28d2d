"""The trainer: exact losses whatever the accumulation, its learning rates, what it logs, and that it learns."""

import json
import math
from pathlib import Path

import datasets
import pytest
import torch

from mglmm.modeling_mglmm.mask_losses import mask_ious
from mglmm.trainer.data_collator import MglmmDataCollator
from mglmm.trainer.mglmm_trainer import LOSS_PARTS, MglmmTrainer
from mglmm.trainer.training_args import MASK_MODULES
from tests.trainer.conftest import training_arguments, uscdf_row


@pytest.fixture
def trainer_of(adapted, tmp_path: Path):
    """Makes a trainer of a fresh toy model over rows in their order; keywords are training arguments."""

    def make(rows, **kwargs) -> MglmmTrainer:
        model, processor = adapted(lora_dropout=0.0)
        args = training_arguments(tmp_path / "run", train_sampling_strategy="sequential", **kwargs)
        collator = MglmmDataCollator(processor, args.mask_size)
        return MglmmTrainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, data_collator=collator)

    return make


def trained(trainer: MglmmTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: MglmmTrainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def uneven_rows() -> list[dict]:
    """1, 0, 3 and 0 masks: in batches of two, the first has one mask and the second three; tokens differ as well."""
    return [
        uscdf_row(0, "referring", ("the hat",)),
        uscdf_row(1, "absent", ()),
        uscdf_row(2, "referring", ("the car",), ("the dog", "the hat")),
        uscdf_row(1, "absent", ()),
    ]


SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "weight_decay": 0.0, "max_steps": 1}


@pytest.mark.parametrize(
    ("batch_size", "accumulation"),
    [
        (4, 1),
        (2, 2),
        (1, 4),  # three of the four have other numbers of masks, two have none
    ],
)
def test_gradients_and_losses_are_those_of_the_whole_batch(trainer_of, batch_size, accumulation):
    rows = uneven_rows()
    trainer = trainer_of(rows, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, **SGD)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)

    whole = trainer_of(rows)
    outputs = whole.model.train()(**whole.data_collator(rows))
    outputs.loss.backward()
    gradients = {name: p.grad for name, p in whole.model.named_parameters() if p.requires_grad}
    assert max(float(gradient.abs().max()) for gradient in gradients.values()) > 0.01
    for name, gradient in gradients.items():  # at a learning rate of 1 the step is the gradient
        torch.testing.assert_close(before[name] - after[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    (entry,) = logged(trainer)
    for name in ("loss", *LOSS_PARTS):
        assert entry[name] == pytest.approx(float(outputs[name].detach()), abs=1e-5, rel=1e-5), name


def test_the_logged_parts_are_means_over_the_logged_steps(trainer_of):
    rows = uneven_rows()
    trainer = trainer_of(
        rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    trainer.train()
    outputs = [trainer.model(**trainer.data_collator(pair)) for pair in (rows[:2], rows[2:])]
    (entry,) = logged(trainer)
    for name in ("loss", *LOSS_PARTS):
        expected = sum(float(output[name].detach()) for output in outputs) / 2
        assert entry[name] == pytest.approx(expected, abs=1e-5, rel=1e-5), name
    config = trainer.model.config
    total = entry["ce_loss"] + config.bce_loss_weight * entry["mask_bce_loss"]
    assert entry["loss"] == pytest.approx(total + config.dice_loss_weight * entry["mask_dice_loss"], rel=1e-5)


def test_a_short_last_accumulation_counts_as_one_step(trainer_of):
    rows = uneven_rows()[:3]
    trainer = trainer_of(
        rows,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        logging_steps=2,
        num_train_epochs=1,
        learning_rate=0.0,
    )
    trainer.train()
    outputs = [trainer.model(**trainer.data_collator(part)) for part in (rows[:2], rows[2:])]
    (entry,) = logged(trainer)
    expected = sum(float(output.ce_loss.detach()) for output in outputs) / 2
    assert entry["ce_loss"] == pytest.approx(expected, rel=1e-5)


def test_batches_without_masks_train_the_text_alone(trainer_of):
    row = uscdf_row(1, "absent", ())
    trainer = trainer_of([row, row], per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    first, last = logged(trainer)
    assert first["mask_bce_loss"] == first["mask_dice_loss"] == 0.0
    assert first["loss"] == pytest.approx(first["ce_loss"]) and last["loss"] < first["loss"]
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("lora_B" in name for name in moved)


def test_a_few_steps_lower_every_loss(trainer_of, rows):
    trainer = trainer_of(rows, per_device_train_batch_size=4, max_steps=12, learning_rate=1e-2)
    before = trained(trainer)
    trainer.train()
    after = trained(trainer)
    still = [name for name in after if torch.equal(after[name], before[name])]
    assert still == []
    first, last = logged(trainer)[0], logged(trainer)[-1]
    assert last["loss"] < 0.8 * first["loss"]
    for name in LOSS_PARTS:
        assert last[name] < first[name], name
    assert all(math.isfinite(value) for entry in logged(trainer) for value in entry.values())


def test_learning_rates_and_weight_decay_by_group(trainer_of, rows):
    trainer = trainer_of(rows, learning_rate=1e-3, mask_learning_rate=3e-4, weight_decay=0.1)
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    settings = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    parameters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert settings.keys() == {id(parameter) for parameter in parameters.values()}
    of = {name.removeprefix("base_model.model."): settings[id(p)] for name, p in parameters.items()}
    language = "model.language_model"
    assert of[f"{language}.layers.0.self_attn.q_proj.lora_A.default.weight"] == (1e-3, 0.1)
    assert of[f"{language}.embed_tokens.token_adapter.trainable_tokens_delta.default"] == (1e-3, 0.1)
    assert of["lm_head.token_adapter.trainable_tokens_delta.default"] == (1e-3, 0.1)
    assert of["model.multi_modal_projector.modules_to_save.default.linear_1.weight"] == (1e-3, 0.1)  # the text's, too
    assert of["model.mask_projector.modules_to_save.default.linear_1.bias"] == (3e-4, 0.0)
    decoder = "model.mask_decoder.modules_to_save.default"
    assert of[f"{decoder}.upscale_conv1.weight"] == (3e-4, 0.1)
    assert of[f"{decoder}.transformer.layers.0.layer_norm1.weight"] == (3e-4, 0.0)
    for name, (rate, _) in of.items():
        assert rate == (3e-4 if any(f".{module}." in name for module in MASK_MODULES) else 1e-3), name


@pytest.mark.parametrize(
    ("mask_learning_rate", "expected"),
    [
        (None, {1e-3}),  # unset: one rate for all
        (0.0, {1e-3, 0.0}),  # zero is a rate: the mask path stands still
    ],
)
def test_the_mask_path_may_have_no_rate_of_its_own(trainer_of, rows, mask_learning_rate, expected):
    trainer = trainer_of(rows, learning_rate=1e-3, mask_learning_rate=mask_learning_rate)
    assert {group["lr"] for group in trainer.create_optimizer().param_groups} == expected


def test_evaluation_gives_the_mean_loss(trainer_of, rows):
    trainer = trainer_of(rows, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    with torch.no_grad():
        expected = trainer.model.eval()(**trainer.data_collator(rows)).loss
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_rows_of_like_length_share_a_batch(adapted, rows, tmp_path: Path):
    model, processor = adapted()
    short, long = rows[1], rows[2]
    columns = {
        "row": [0, 1] * 32,
        "length": [len(str(row["messages"])) for row in (short, long)] * 32,
    }
    args = training_arguments(
        tmp_path / "run", train_sampling_strategy="group_by_length", per_device_train_batch_size=4
    )
    trainer = MglmmTrainer(
        model=model, args=args, train_dataset=datasets.Dataset.from_dict(columns), data_collator=list
    )
    batches = [[item["row"] for item in batch] for batch in trainer.get_train_dataloader()]
    assert len(batches) == 16
    assert sum(len(set(batch)) == 1 for batch in batches) >= 11  # one mixed batch in four, and the first by exchange


def test_every_step_logs_masks_and_throughput(trainer_of, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("mglmm.trainer.mglmm_trainer.time.perf_counter", lambda: float(next(clock)))
    rows = uneven_rows()
    trainer = trainer_of(rows, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=2)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        outputs = trainer.model.train()(**batch)
    expected = mask_ious(outputs.pred_masks, batch["mask_labels"]).mean()
    trainer.train()
    first, second = logged(trainer)
    assert first["mask_iou"] == pytest.approx(float(expected), abs=1e-6)
    seconds = 1.0 if second["images_per_second"] == 4.0 else 4.0 / second["images_per_second"]
    assert second["masks_per_second"] == pytest.approx(4 / seconds)  # 1 + 0 + 3 + 0
    assert second["tokens_per_second"] == pytest.approx(float(batch["attention_mask"].sum()) / seconds)


def test_rows_that_were_left_out_are_listed_and_summed_up(trainer_of, tmp_path):
    good, bad = uscdf_row(0, "referring", ("the hat",)), uscdf_row(1, "referring", ("the dog",))
    bad = {**bad, "masks": [], "dataset": "dogs", "index": 3}
    trainer = trainer_of([good, bad, bad, bad], per_device_train_batch_size=2, num_train_epochs=1)
    assert trainer.skipped_summary() == ""
    trainer.train()  # the second batch has no good row at all
    summary = trainer.skipped_summary()
    assert summary.startswith("3 bad rows left out (listed in ")
    assert "3 x dogs: USCDF row '1': 1 [SEG] in assistant turns but 0 masks" in summary
    (path,) = (tmp_path / "run").glob("skipped_rows.rank0.jsonl")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3, 3, 3]
    assert all(math.isfinite(value) for entry in logged(trainer) for value in entry.values())
    assert logged(trainer)[1]["loss"] == 0.0


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_evaluation_is_exact_whatever_the_batches(trainer_of, batch_size):
    rows = uneven_rows()
    trainer = trainer_of(rows, per_device_eval_batch_size=batch_size)
    metrics = trainer.evaluate()
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        outputs = trainer.model.eval()(**batch)
    for name in ("loss", *LOSS_PARTS):
        assert metrics[f"eval_{name}"] == pytest.approx(float(outputs[name]), rel=1e-4), name
    assert metrics["eval_mask_iou"] == pytest.approx(float(mask_ious(outputs.pred_masks, batch["mask_labels"]).mean()))


def test_tensorboard_gets_what_is_logged(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    trainer = trainer_of(uneven_rows(), per_device_train_batch_size=2, max_steps=2, report_to=["tensorboard"])
    trainer.train()
    events = event_accumulator.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for name in ("loss", *LOSS_PARTS, "mask_iou", "tokens_per_second", "masks_per_second", "images_per_second"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in logged(trainer) if name in entry], rel=1e-5), name
