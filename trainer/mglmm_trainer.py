"""Trainer of MGLMM: transformers' `Trainer` with losses that are exact means over the global batch."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from mglmm.modeling_mglmm.mask_losses import mask_ious

from .mixture import Mixture, MixtureSampler
from .mixture_stream import Stream, StreamLoader
from .training_args import MASK_MODULES, MglmmTrainingArguments

LOSS_PARTS = ("ce_loss", "mask_bce_loss", "mask_dice_loss")
COUNTS = ("iou", "masks", "targets", "tokens", "images")  # of a batch, summed


class MglmmTrainer(Trainer):
    """
    CE is the mean over the supervised tokens, BCE and DICE the mean over the masks of the *global* batch: all ranks
    and all accumulation steps. So N ranks x k steps give the gradients of one big batch.

    Logs beside the loss its parts, the teacher-forced mean IoU of the masks (`mask_iou`) and the throughput over all
    ranks (`tokens_per_second`, `masks_per_second`, `images_per_second`; tokens with their image). Evaluation gives
    exact means over the whole dataset, on any number of ranks. Rows that the collator left out are appended to
    `skipped_rows.rank*.jsonl` in the output folder as they come.
    """

    args: MglmmTrainingArguments
    loss_is_scaled_for_ga = True  # both kinds are already means over the accumulated batch

    def __init__(self, *args: Any, rows_per_epoch: int | None = None, **kwargs: Any):
        """`rows_per_epoch`: How many rows of a `Mixture` make an epoch; as many as it has if unset."""
        super().__init__(*args, **kwargs)
        self.rows_per_epoch = rows_per_epoch
        self._stream: StreamLoader | None = None
        self._num_masks = torch.ones(())
        self._steps = 0
        self._sums: torch.Tensor = torch.zeros(len(LOSS_PARTS) + len(COUNTS))
        self._since = time.perf_counter()
        self._skipped: Counter[str] = Counter()

    # ------------------------------------------------------------------ rows

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if not isinstance(self.train_dataset, Mixture):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        return MixtureSampler(
            self.train_dataset,
            args.seed if args.data_seed is None else args.data_seed,
            self.rows_per_epoch,
            batch_size=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            group_by_length=args.train_sampling_strategy == "group_by_length",
        )

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        if isinstance(self.train_dataset, Stream):
            args = self.args
            args.ignore_data_skip = True  # the stream itself knows where it was
            self._stream = StreamLoader(
                self.train_dataset,
                args.train_batch_size,
                self.data_collator,
                args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )
            if resume_from_checkpoint:
                self._stream.restore(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def get_train_dataloader(self) -> Any:
        return super().get_train_dataloader() if self._stream is None else self._stream

    def _save_rng_state(self, output_dir: str) -> None:
        """On every rank; the file that makes a checkpoint complete is written when all have come here."""
        super()._save_rng_state(output_dir)
        if self._stream is not None:
            self._stream.save(output_dir)
        self.accelerator.wait_for_everyone()

    # ------------------------------------------------------------------ training

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """Once per optimizer step, with all its micro-batches."""
        num_tokens = super()._get_num_items_in_batch(batch_samples, device)
        if isinstance(num_tokens, torch.Tensor):
            num_tokens = num_tokens.clamp_min(1)  # every row of the step may have been left out
        count = torch.tensor(float(sum(len(batch["mask_labels"]) for batch in batch_samples)), device=device)
        if self.args.world_size > 1 and self.args.average_tokens_across_devices:
            count = self.accelerator.reduce(count, "sum")
        self._num_masks = count.clamp_min(1)
        self._steps += 1
        return num_tokens

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = dict(inputs)
        self._note_skipped(inputs.pop("skipped_rows", []))
        inputs |= {"num_masks_in_batch": self._num_masks if model.training else None, "use_cache": False}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        parts = torch.stack([outputs[name].detach().float() for name in LOSS_PARTS])
        counts = _counts(inputs, outputs)
        if not model.training:  # means over the batch: weighted to become means over the dataset
            _, masks, targets, *_ = counts
            parts = parts * torch.stack([targets, masks, masks])
        self._sums = self._sums.to(parts.device) + torch.cat([parts, counts])
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._steps:  # the same on every rank
            sums = self._take_sums()
            logs |= {name: sums[name] / self._steps for name in LOSS_PARTS}
            if sums["masks"]:
                logs["mask_iou"] = sums["iou"] / sums["masks"]
            seconds = time.perf_counter() - self._since
            logs |= {f"{name}_per_second": round(sums[name] / seconds, 2) for name in ("tokens", "masks", "images")}
            self._steps, self._since = 0, time.perf_counter()
        super().log(logs, start_time)

    def _take_sums(self) -> dict[str, float]:
        """Sums over all ranks since the last call."""
        sums = self.accelerator.reduce(self._sums, "sum").tolist()
        self._sums = torch.zeros(len(sums))
        return dict(zip((*LOSS_PARTS, *COUNTS), sums, strict=True))

    # ------------------------------------------------------------------ evaluation

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """Every rank's share of the rows: none twice, and as many batches on each rank."""
        held_out: Any = self.eval_dataset
        dataset = (
            held_out
            if eval_dataset is None
            else held_out[eval_dataset]
            if isinstance(eval_dataset, str)
            else eval_dataset
        )
        return DataLoader(
            _Share(dataset, self.args.process_index, self.args.world_size),
            batch_size=self.args.eval_batch_size,
            collate_fn=lambda rows: self.data_collator([row for row in rows if row is not None]),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        training, self._sums = self._sums, torch.zeros_like(self._sums)
        started = time.perf_counter()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        sums = self._take_sums()
        self._sums = training
        self._since += time.perf_counter() - started  # the throughput is that of training
        masks, targets = max(sums["masks"], 1.0), max(sums["targets"], 1.0)
        means = {
            "ce_loss": sums["ce_loss"] / targets,
            "mask_bce_loss": sums["mask_bce_loss"] / masks,
            "mask_dice_loss": sums["mask_dice_loss"] / masks,
        }
        config = self.accelerator.unwrap_model(self.model).config
        means["loss"] = (
            config.ce_loss_weight * means["ce_loss"]
            + config.bce_loss_weight * means["mask_bce_loss"]
            + config.dice_loss_weight * means["mask_dice_loss"]
        )
        if sums["masks"]:
            means["mask_iou"] = sums["iou"] / masks
        metrics = {**(output.metrics or {}), **{f"{metric_key_prefix}_{name}": value for name, value in means.items()}}
        return output._replace(metrics=metrics)

    # ------------------------------------------------------------------ rows that were left out

    def _note_skipped(self, rows: list[dict[str, Any]]) -> None:
        if rows:
            path = Path(str(self.args.output_dir)) / f"skipped_rows.rank{self.args.process_index}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            self._skipped.update(f"{row['dataset']}: {row['reason']}" for row in rows)

    def skipped_summary(self) -> str:
        """How many rows of this run were left out, on all ranks, with the commonest reasons; empty if none was."""
        skipped: Counter[str] = Counter()
        for counts in gather_object([dict(self._skipped)]):
            skipped.update(counts)
        if not skipped:
            return ""
        lines = [f"{skipped.total()} bad rows left out (listed in {self.args.output_dir}/skipped_rows.rank*.jsonl):"]
        lines += [f"  {count} x {reason}" for reason, count in skipped.most_common(5)]
        if len(skipped) > 5:
            lines.append(f"  and {len(skipped) - 5} other reasons")
        return "\n".join(lines)

    # ------------------------------------------------------------------ optimisation

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            args = self.args
            trained: Any = self.model if model is None else model
            decay = set(self.get_decay_parameter_names(trained))
            mask_rate = args.learning_rate if args.mask_learning_rate is None else args.mask_learning_rate
            groups: dict[tuple[float, float], list] = {}
            for name, parameter in trained.named_parameters():
                if parameter.requires_grad:
                    mask_path = any(f".{module}." in name for module in MASK_MODULES)
                    rate = mask_rate if mask_path else args.learning_rate
                    weight_decay = args.weight_decay if name in decay else 0.0
                    groups.setdefault((rate, weight_decay), []).append(parameter)
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, trained)
            self.optimizer = optimizer_class(
                [{"params": p, "lr": lr, "weight_decay": decay_} for (lr, decay_), p in groups.items()], **options
            )
        return self.optimizer


def _counts(inputs: dict[str, Any], outputs: Any) -> torch.Tensor:
    """`COUNTS` of one batch, float32."""
    labels, pixels = inputs["mask_labels"], inputs.get("pixel_values")
    if pixels is None and inputs.get("image_features") is not None:
        pixels = inputs["image_features"]["vision_hidden_states"]
    device = inputs["input_ids"].device
    ious = mask_ious(outputs["pred_masks"].to(device), labels.to(device)) if len(labels) else torch.zeros(0)
    values = [
        ious.sum(),
        len(labels),
        (inputs["labels"][:, 1:] != -100).sum(),
        inputs["attention_mask"].sum(),
        0 if pixels is None else len(pixels),
    ]
    return torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values])


class _Share(Dataset):
    """The rows of one rank, from its own number on in steps of the number of ranks; `None` where others have one more."""

    def __init__(self, dataset: Any, rank: int, world_size: int):
        self.dataset, self.rank, self.world_size = dataset, rank, world_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.world_size)

    def __getitem__(self, index: int) -> Any:
        row = index * self.world_size + self.rank
        return self.dataset[row] if row < len(self.dataset) else None
