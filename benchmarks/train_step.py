"""
Time and memory of one training step on the CPU, beside the bare parts it is made of.

```shell
python benchmarks/train_step.py
python benchmarks/train_step.py --batch-sizes 2 --masks 3 --repeats 5 --threads 4
python benchmarks/train_step.py --quick
```

The first line measures the mid-size random model of `inference.py` with the default recipe and writes the tables of
`benchmarks/README.md`, where the columns are explained. `--quick` runs a toy model in this process: it shows that the
script works, not how fast anything is.
"""

import argparse
import os
import platform
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import peft
import torch
import torch.nn.functional as F
import transformers
from inference import (
    MID_SIZE_CONFIG,
    Figures,
    bare_language_model,
    bare_sam,
    mid_size_model,
    peak_memory,
    random_inputs,
    seconds,
)
from tables import README, in_own_process, markdown_table, write_tables

import mglmm
from mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.modeling_mglmm import MglmmImageFeatures
from mglmm.trainer.mglmm_trainer import MglmmTrainer
from mglmm.trainer.trainable import make_trainable
from mglmm.trainer.training_args import MglmmTrainingArguments

TOKENS_PER_MASK = 8  # of an answer, the [SEG] among them
AT_ONCE = 64  # masks that the bare decoder takes in one go, about 6 GiB; more do not fit into small machines
STEP = "step"
PARTS = ("vision tower", "pixel encoder", "language model", "mask decoder")
Peaks = dict[str, tuple[int, int]]  # of the step and of each part: most bytes of RAM before and after

TOY_LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TOY_GRID = {"image_size": 64, "patch_size": 16}
TOY_SAM_VISION = {"window_size": 2, "global_attn_indexes": [1], "output_channels": 32, "num_pos_feats": 16}
TOY_CONFIG: dict[str, Any] = MID_SIZE_CONFIG | {
    "vision_config": MID_SIZE_CONFIG["vision_config"] | TOY_LAYERS | {"intermediate_size": 64, "image_size": 28},
    "text_config": MID_SIZE_CONFIG["text_config"] | TOY_LAYERS | {"intermediate_size": 64, "vocab_size": 300},
    "sam_config": {
        "vision_config": MID_SIZE_CONFIG["sam_config"]["vision_config"] | TOY_LAYERS | TOY_GRID | TOY_SAM_VISION,
        "prompt_encoder_config": {"hidden_size": 32, **TOY_GRID},
        "mask_decoder_config": {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 64, "iou_head_hidden_dim": 32},
        "initializer_range": 0.02,
    },
    "image_token_id": 290,
    "seg_token_id": 291,
}


@dataclass(frozen=True)
class Case:
    """One row of the tables: `masks` of each of `batch_size` images."""

    batch_size: int
    masks: int
    checkpointing: bool
    repeats: int
    threads: int
    toy: bool = False


def training_batch(model: MglmmForConditionalGeneration, batch_size: int, masks: int, mask_size: int) -> dict[str, Any]:
    """
    What `MglmmDataCollator` makes of `batch_size` rows with `masks` masks each; time does not depend on what they show.

    Returns:
        `input_ids`, `attention_mask`, `labels`, `logits_to_keep` `(batch, length)`, `mask_labels` uint8
        `(batch * masks, mask_size, mask_size)`, `pixel_values`, `sam_pixel_values`.
    """
    inputs = random_inputs(model, batch_size)
    prompt = inputs["input_ids"]
    generator = torch.Generator().manual_seed(0)
    answer = torch.randint(3, 256, (batch_size, TOKENS_PER_MASK * masks + 1), generator=generator)
    answer[:, TOKENS_PER_MASK - 1 : -1 : TOKENS_PER_MASK] = model.config.seg_token_id
    input_ids = torch.cat([prompt, answer], dim=1)
    supervised = torch.zeros_like(input_ids, dtype=torch.bool)
    supervised[:, prompt.shape[1] :] = True
    labels = torch.randint(0, 2, (batch_size * masks, mask_size, mask_size), generator=generator, dtype=torch.uint8)
    return inputs | {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": input_ids.masked_fill(~supervised, -100),
        "logits_to_keep": F.pad(supervised[:, 1:], (0, 1), value=False),
        "mask_labels": labels,
    }


def with_cached_features(model: MglmmForConditionalGeneration, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with features in half precision, as `FeatureCache` gives them, in place of pixels; here random ones."""
    config, images = model.config, len(batch["pixel_values"])
    vision, sam = config.vision_config, config.sam_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    size = model.model.prompt_encoder.image_embedding_size
    generator = torch.Generator().manual_seed(0)
    features = MglmmImageFeatures(
        vision_hidden_states=torch.randn((images, tokens, vision.hidden_size), generator=generator).half(),
        pixel_hidden_states=torch.randn(
            (images, sam.prompt_encoder_config.hidden_size, *size), generator=generator
        ).half(),
    )
    pixels = ("pixel_values", "sam_pixel_values")
    return {name: value for name, value in batch.items() if name not in pixels} | {"image_features": features}


def default_trainer(model: MglmmForConditionalGeneration, folder: str, checkpointing: bool) -> MglmmTrainer:
    """A trainer of what trains by default: LoRA, the new tokens' rows, the projectors and the mask decoder."""
    args = MglmmTrainingArguments(
        output_dir=folder, use_cpu=True, report_to=[], disable_tqdm=True, activation_checkpointing=checkpointing
    )
    seg = model.config.seg_token_id
    trainer = MglmmTrainer(model=make_trainable(model, args, [seg, seg + 1, seg + 2]), args=args)
    if checkpointing:
        trainer.model.activation_checkpointing_enable()
    trainer.create_optimizer()
    return trainer


def training_step(trainer: MglmmTrainer, batch: dict[str, Any]) -> torch.Tensor:
    """Forward, backward, clipping and the optimizer's step, as `trainer.train()` does them. Returns the loss."""
    samples, num_items = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    loss = trainer.training_step(trainer.model, samples[0], num_items)
    trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    trainer.model.zero_grad()
    return loss


# ---------------------------------------------------------------------- the bare parts


class BareParts:
    """
    Plain modules around the weights that `trainer` trains, each to be run on its own. What lies between them (projectors,
    placing the image tokens, gathering states, mask losses, figures for the log, the optimizer) is in no part.
    """

    def __init__(self, trainer: MglmmTrainer, batch: dict[str, Any]):
        self.trainer, self.batch = trainer, batch
        self.model = trainer.model.get_base_model()
        self.language_model = bare_language_model(self.model)
        self.sam = bare_sam(self.model)

    def text(self, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """CE of the supervised tokens, and the last hidden states `(batch, length, hidden)`."""
        outputs = self.language_model.base_model(
            inputs_embeds=embeddings, attention_mask=self.batch["attention_mask"], use_cache=False
        )
        keep = self.batch["logits_to_keep"]
        logits = self.language_model.get_output_embeddings()(outputs.last_hidden_state[keep])
        logits[:, self.model.config.image_token_id] = torch.finfo(logits.dtype).min  # `<image>` is no answer
        return F.cross_entropy(
            logits.float(), self.batch["input_ids"].roll(-1, dims=1)[keep]
        ), outputs.last_hidden_state

    def masks(self, images: torch.Tensor, prompts: torch.Tensor) -> torch.Tensor:
        """Mask logits `(masks, h, w)` of prompts `(masks, hidden)` on as many image embeddings."""
        positional = self.sam.get_image_wide_positional_embeddings()
        dense = self.sam.prompt_encoder(None, None, None, None)[1]
        prompts = prompts[:, None, None]
        return self.sam.mask_decoder(images, positional, prompts, dense, multimask_output=False)[0][:, 0, 0]

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The parts by name: forward of the frozen encoders, forward and backward of what trains."""
        modules, batch = self.model.model, self.batch
        count = len(batch["mask_labels"])
        text_hidden, mask_hidden = self.model.config.text_config.hidden_size, modules.mask_decoder.hidden_size
        embeddings = torch.randn((*batch["input_ids"].shape, text_hidden))
        prompts = torch.randn((count, mask_hidden))
        images = torch.randn((len(batch["pixel_values"]), mask_hidden, *modules.prompt_encoder.image_embedding_size))
        index = torch.arange(count) // (count // len(images))

        def language_model() -> None:
            self.text(embeddings.requires_grad_())[0].backward()

        def mask_decoder() -> None:
            # Where they do not fit at once, some after others, each with its own backward pass: nothing is run twice.
            for some, rows in zip(prompts.split(AT_ONCE), index.split(AT_ONCE), strict=True):
                masks = self.masks(images[rows], some.detach().requires_grad_())
                masks.backward(torch.ones_like(masks))

        calls = [
            torch.no_grad()(lambda: modules.vision_tower(batch["pixel_values"], output_hidden_states=True)),
            torch.no_grad()(lambda: modules.pixel_encoder(batch["sam_pixel_values"])),
            language_model,
            mask_decoder,
        ]
        return dict(zip(PARTS, calls, strict=True))

    @torch.no_grad()
    def check(self) -> None:
        """Raises `AssertionError` if the parts lead to another CE or other masks than the trained model."""
        self.trainer.model.eval()
        batch = with_cached_features(self.model, self.batch)
        whole = self.trainer.model(**batch)
        modules, config, features = self.model.model, self.model.config, batch["image_features"]
        input_ids = batch["input_ids"]
        embeddings = self.model.get_input_embeddings()(input_ids)
        embeddings[input_ids == config.image_token_id] = modules.project_image_features(features).flatten(0, 1)
        loss, states = self.text(embeddings)
        prompts = modules.mask_projector(states[:, :-1][input_ids[:, 1:] == config.seg_token_id])
        rows = (input_ids == config.seg_token_id).nonzero()[:, 0]
        images = features.pixel_hidden_states.float()
        chunks = zip(prompts.split(AT_ONCE), rows.split(AT_ONCE), strict=True)
        masks = torch.cat([self.masks(images[index], some) for some, index in chunks])
        torch.testing.assert_close(loss, whole.ce_loss, atol=1e-4, rtol=1e-4)
        scale = whole.pred_masks.std()  # of random weights: without it, masks that are all alike would pass
        torch.testing.assert_close(masks / scale, whole.pred_masks / scale, atol=1e-2, rtol=1e-3)
        self.trainer.model.train()


# ---------------------------------------------------------------------- measuring


def prepared(case: Case, folder: str) -> tuple[MglmmTrainer, dict[str, Any]]:
    torch.set_num_threads(case.threads)
    if case.toy:
        torch.manual_seed(0)
        model = MglmmForConditionalGeneration(MglmmConfig(**TOY_CONFIG))
    else:
        model = mid_size_model()
    trainer = default_trainer(model, folder, case.checkpointing)
    trainer.model.train()
    return trainer, training_batch(model, case.batch_size, case.masks, trainer.args.mask_size)


def measure(case: Case) -> Figures:
    """
    Times the step, its parts and the step with cached features (`Figures.second`) in turn, after a warm-up of each.

    Raises:
        AssertionError: the parts are not those of the step, so that comparing them would mean nothing.
    """
    with TemporaryDirectory() as folder:
        trainer, batch = prepared(case, folder)
        parts = BareParts(trainer, batch)
        parts.check()
        cached = with_cached_features(parts.model, batch)
        calls = parts.calls()
        figures = Figures(parts={name: [] for name in calls})
        for i in range(case.repeats + 1):
            whole = seconds(lambda: training_step(trainer, batch))
            times = {name: seconds(call) for name, call in calls.items()}
            trainer.model.zero_grad()
            second = seconds(lambda: training_step(trainer, cached))
            print(
                f"  {i or 'warm-up'}: step {whole:.2f} s, sum of parts {sum(times.values()):.2f} s, "
                f"with cached features {second:.2f} s",
                flush=True,
            )
            if i > 0:
                figures.whole.append(whole)
                figures.second.append(second)
                for name, value in times.items():
                    figures.parts[name].append(value)
    return figures


def memory(case: Case, name: str) -> tuple[int, int]:
    """Most bytes of RAM of this process before and after it ran the step or the part called `name` once."""
    with TemporaryDirectory() as folder:
        trainer, batch = prepared(case, folder)
        call = (lambda: training_step(trainer, batch)) if name == STEP else BareParts(trainer, batch).calls()[name]
        before = peak_memory()
        call()
        return before, peak_memory()


def added_memory(peaks: Peaks) -> tuple[int, int]:
    """Bytes that the step takes above the loaded model, and the sum of what each part does."""
    added = {name: after - before for name, (before, after) in peaks.items()}
    return added[STEP], sum(added[name] for name in PARTS)


# ---------------------------------------------------------------------- tables


def render(
    results: dict[Case, tuple[Figures, Peaks]], notes: Sequence[str], command: str, threads: int, repeats: int
) -> str:
    """The text between the two markers of the README; memory is left out where it was not measured."""
    summary, details = [], []
    for case, (figures, peaks) in results.items():
        row = [str(case.batch_size), str(case.masks)]
        step, parts = added_memory(peaks) if peaks else (0, 0)
        summary.append(
            [
                *row,
                "yes" if case.checkpointing else "no",
                f"{median(figures.whole):.2f}",
                f"{median(figures.sum_of_parts):.2f}",
                f"{figures.ratio:.2f}",
                f"{figures.second_share:.2f}",
                f"{peaks[STEP][1] / 2**30:.1f}" if peaks else "–",
                f"{step / 2**30:.2f} / {parts / 2**30:.2f}" if peaks else "–",
                f"{step / parts:.2f}" if parts else "–",
            ]
        )
        details.append([*row, *(f"{median(figures.parts[part]):.3f}" for part in PARTS)])
    columns = [
        "batch",
        "masks per image",
        "checkpointing",
        "step, s",
        "sum of parts, s",
        "step / parts",
        "cached features / step",
        "peak memory, GiB",
        "above the model, GiB: step / parts",
        "ratio",
    ]
    lines = [
        f"`{command}`: {repeats} repetitions, {threads} threads on {os.cpu_count()} cores, float32; "
        f"mglmm {mglmm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"peft {peft.__version__}, Python {platform.python_version()}.\n",
        markdown_table(columns, summary),
        "Seconds of each part, run alone:\n",
        markdown_table(["batch", "masks per image", *PARTS], details),
        *(f"{note}\n" for note in notes),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 8], metavar="N")
    parser.add_argument("--masks", type=int, nargs="+", default=[3, 30], metavar="N", help="masks per image")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions after the warm-up (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument(
        "--checkpoint-above",
        type=int,
        default=AT_ONCE,
        metavar="MASKS",
        help=f"steps with more masks than these run with activation checkpointing (default: {AT_ONCE})",
    )
    parser.add_argument("--quick", action="store_true", help="a toy model in this process, nothing is written")
    parser.add_argument("--readme", type=Path, default=README, help="file whose tables are replaced")
    args = parser.parse_args(arguments)
    if min(*args.batch_sizes, *args.masks, args.repeats, args.threads) < 1:
        parser.error("--batch-sizes, --masks, --repeats and --threads must be at least 1")

    cases = [
        Case(size, masks, size * masks > args.checkpoint_above, args.repeats, args.threads, args.quick)
        for size in args.batch_sizes
        for masks in args.masks
    ]
    results: dict[Case, tuple[Figures, Peaks]] = {}
    notes: list[str] = []
    for i, case in enumerate(cases):
        print(f"[{i + 1}/{len(cases)}] batch {case.batch_size}, {case.masks} masks per image", flush=True)
        if case.toy:
            results[case] = measure(case), {}
            continue
        try:
            figures = in_own_process(measure, case)
            results[case] = figures, {name: in_own_process(memory, case, name) for name in (STEP, *PARTS)}
        except BrokenProcessPool:
            print("  ended by the system, most likely for want of memory", flush=True)
            notes.append(f"Batch {case.batch_size} with {case.masks} masks per image did not fit into memory.")
    if not results:
        parser.exit(1, "nothing was measured\n")

    command = (
        f"python benchmarks/train_step.py{' --quick' * args.quick} --batch-sizes {' '.join(map(str, args.batch_sizes))} "
        f"--masks {' '.join(map(str, args.masks))} --repeats {args.repeats} --threads {args.threads} "
        f"--checkpoint-above {args.checkpoint_above}"
    )
    tables = render(results, notes, command, args.threads, args.repeats)
    print(f"\n{tables}")
    if not args.quick:
        write_tables(args.readme, Path(__file__).name, tables)
        print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
