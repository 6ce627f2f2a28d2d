"""
`mglmm doctor MODEL`: is a model sound, and can it learn? One small function per property, each with a test that breaks it.

Most faults of such models are silent: a `[SEG]` that is two tokens, a row that never trained, a decoder out of the
gradient's reach all give a loss that falls and masks that stay useless. Training starts with these checks, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from PIL import Image
from torch import nn
from transformers.utils.peft_utils import find_adapter_config_file

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.modeling_mglmm.mask_losses import mask_ious
from mglmm.processing import MglmmProcessor
from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import IMAGE_TOKEN, render_phrase

from .checks import Check, check, examine, listed, reason_of
from .data_collator import MglmmDataCollator
from .trainable import UNTRAINED
from .training_args import TRAINED_MODULES, MglmmTrainingArguments

__all__ = ["Check", "examine", "examine_trainable", "overfit", "report", "require", "run_doctor"]

OVERFIT_IOU = 0.95
LEARNING_RATE_TIMES_WIDTH = 0.2  # of overfitting: the wider the decoder, the smaller AdamW's steps must be
MAX_GRAD_NORM = 1.0
ADDED = ("original_module.", "lora_", "trainable_tokens_delta")  # parameters that PEFT puts among a part's own
NAME_WIDTH = 30

# ---------------------------------------------------------------------- what trains


def examine_trainable(
    model: PeftModel | MglmmForConditionalGeneration, new_token_ids: list[int], args: MglmmTrainingArguments
) -> list[Check]:
    """
    Whether exactly those parameters train that `args` names; for what `make_trainable` returned.

    Args:
        new_token_ids: Of `<p>`, `</p>`, `[SEG]`.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    parts = [name for name, _ in base.model.named_children()]
    return [
        trained_rows(base, new_token_ids, args),
        trained_lora(base, args),
        *(check(f"training of {name}")(trained_part)(base, name, args) for name in parts),
        trained_dtype(base),
    ]


@check("training of new-token rows")
def trained_rows(
    model: MglmmForConditionalGeneration, new_token_ids: list[int], args: MglmmTrainingArguments
) -> tuple[bool, str]:
    """The new tokens' rows of embedding and head train, and of the others none, unless the language model trains in full."""
    whole = "language_model" in args.trained_modules
    found = []
    for name, layer in (("embedding", model.get_input_embeddings()), ("head", model.lm_head)):
        rows = _trained_rows(layer)
        wanted = set(new_token_ids) if whole or args.train_new_tokens else set()
        if missing := wanted - rows:
            return False, (
                f"rows {sorted(missing)} of the {name} are frozen: the tokens would never mean anything; give their ids to "
                "make_trainable, with train_new_tokens=True"
            )
        if not whole and (more := rows - wanted):
            return False, f"{len(more)} rows of the {name} train that should not: freeze it, or set trained_modules"
        found.append(f"{len(rows)} of the {name}")
    return True, ", ".join(found)


def _trained_rows(layer: nn.Module) -> set[int]:
    rows: set[int] = set()
    for module in layer.modules():
        if isinstance(module, TrainableTokensLayer):
            for adapter, delta in module.trainable_tokens_delta.items():
                rows |= set(module.token_indices[adapter]) if delta.requires_grad else set()
        elif isinstance(module, nn.Embedding | nn.Linear) and module.weight.requires_grad:
            rows |= set(range(len(module.weight)))
    return rows


@check("training of LoRA")
def trained_lora(model: MglmmForConditionalGeneration, args: MglmmTrainingArguments) -> tuple[bool, str]:
    """LoRA is on the language model, if `args` wants it, and nowhere else."""
    lora = {name: p.requires_grad for name, p in model.named_parameters() if ".lora_" in name}
    if outside := [name for name in lora if ".language_model." not in name]:
        return (
            False,
            f"outside the language model: {listed(outside, 2)}; anchor lora_target with .*\\.language_model\\.",
        )
    trained = sum(lora.values())
    if trained != len(lora) or bool(lora) != bool(args.lora_r):
        return False, f"lora_r is {args.lora_r} but {trained} of {len(lora)} LoRA matrices train: check lora_target"
    return True, f"{trained} matrices, all in the language model" if trained else "none, as lora_r is 0"


def trained_part(model: MglmmForConditionalGeneration, name: str, args: MglmmTrainingArguments) -> tuple[bool, str]:
    """A part trains if it is named, except where no loss reaches; it is frozen if it is not."""
    parameters = getattr(model.model, name).named_parameters()
    own = {key: p.requires_grad for key, p in parameters if not any(piece in key for piece in ADDED)}
    named = name in args.trained_modules
    wanted = {key for key in own if named and not any(piece in key for piece in UNTRAINED)}
    trained = {key for key, trains in own.items() if trains}
    if frozen := sorted(wanted - trained):
        return (
            False,
            f"{len(frozen)} of {len(wanted)} tensors are frozen ({listed(frozen, 2)}): unfreeze them, or do not name {name}",
        )
    if more := sorted(trained - wanted):
        why = (
            "no loss reaches them, for which several processes would wait"
            if named
            else "trained_modules does not name it"
        )
        return False, f"{len(more)} tensors train ({listed(more, 2)}) though {why}: requires_grad_(False)"
    return True, f"{len(trained)} tensors" if trained else "frozen"


@check("dtype of what trains")
def trained_dtype(model: MglmmForConditionalGeneration) -> tuple[bool, str]:
    dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    if low := [f"{name} {str(dtype)[6:]}" for name, dtype in dtypes.items() if dtype != torch.float32]:
        return False, f"{listed(low, 2)}: small updates would be rounded away; call .float() on what trains"
    return True, f"float32 in {len(dtypes)} tensors"


# ---------------------------------------------------------------------- one sample by heart


@check("overfit")
@torch.enable_grad()
def overfit(model: MglmmForConditionalGeneration, processor: MglmmProcessor, steps: int = 60) -> tuple[bool, str]:
    """
    Whether projectors, neck and mask decoder learn one drawn picture, teacher-forced, to an IoU above 0.95.

    Runs the package's collator, forward pass and losses; the encoders run once. The model comes back as it was, but for
    gradients, which are dropped. It must be a model without an adapter.
    """
    modules = {name: getattr(model.model, name) for name in TRAINED_MODULES if getattr(model.model, name) is not None}
    parts = {
        name: [p for key, p in module.named_parameters() if not any(piece in key for piece in UNTRAINED)]
        for name, module in modules.items()
    }
    parameters = [parameter for part in parts.values() for parameter in part]
    collator = MglmmDataCollator(processor, 4 * model.model.prompt_encoder.image_embedding_size[0], strict=True)
    batch = {name: value.to(model.device) for name, value in collator([_drawn_row()]).items()}
    values = [parameter.detach().clone() for parameter in parameters]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    try:
        model.eval().requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        batch["image_features"] = model.encode_images(batch.pop("pixel_values"), batch.pop("sam_pixel_values", None))
        sam: Any = model.config.sam_config
        rate = LEARNING_RATE_TIMES_WIDTH / sam.mask_decoder_config.hidden_size
        return _fit(model, batch, parts, torch.optim.AdamW(parameters, rate, weight_decay=0.0), steps)
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data.copy_(value)
            parameter.grad = None
        for parameter, trained in trainable:
            parameter.requires_grad_(trained)
        model.train(training)


def _fit(
    model: MglmmForConditionalGeneration,
    batch: dict[str, Any],
    parts: dict[str, list[nn.Parameter]],
    optimizer: torch.optim.Optimizer,
    steps: int,
) -> tuple[bool, str]:
    best = 0.0
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.05, total_iters=steps)
    for step in range(steps + 1):
        optimizer.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        reached = {name for name, part in parts.items() if any(p.grad is not None and bool(p.grad.any()) for p in part)}
        if unreached := sorted(parts.keys() - reached):
            return (
                False,
                f"no gradient reaches {', '.join(unreached)}: look for a detach or no_grad, and for a loss weight of 0",
            )
        if not bool(outputs.loss.isfinite()):
            return (
                False,
                f"the loss is {float(outputs.loss.detach())} at step {step}: look for overflow, such as in float16",
            )
        iou = float(mask_ious(outputs.pred_masks, batch["mask_labels"]).mean())
        best = max(best, iou)
        if iou > OVERFIT_IOU:
            return True, f"IoU {iou:.3f} after {step} steps"
        nn.utils.clip_grad_norm_([parameter for part in parts.values() for parameter in part], MAX_GRAD_NORM)
        optimizer.step()
        scheduler.step()
    return False, (
        f"IoU {best:.3f} at best in {steps} steps, not above {OVERFIT_IOU}: compare the pixels that the encoder sees with the "
        "mask labels, and the weights of the losses in config.json with 1, 2 and 0.5"
    )


def _drawn_row() -> dict[str, Any]:
    """A USCDF row: a yellow ellipse on dark blue, `(240, 320)`."""
    y, x = np.mgrid[:240, :320]
    mask = ((x - 176) / 90) ** 2 + ((y - 108) / 72) ** 2 < 1
    pixels = np.where(mask[..., None], [250, 220, 40], [30, 50, 90]).astype(np.uint8)
    question, answer = f"{IMAGE_TOKEN}\nSegment the ellipse.", f"Sure, {render_phrase('the ellipse')}."
    return {
        "image": Image.fromarray(pixels),
        "image_id": "ellipse",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "masks": [encode_mask(mask)],
        "regions": [],
    }


# ---------------------------------------------------------------------- all together


def report(checks: Iterable[Check]) -> str:
    """One line each; that of a failed check says what to do."""
    return "\n".join(f"{'ok' if c.ok else 'FAIL':<4}  {c.name:<{NAME_WIDTH}}  {c.message}" for c in checks)


def require(checks: Iterable[Check]) -> None:
    """Raises `ValueError` with what failed, if anything did: for the start of training."""
    if failed := [c for c in checks if not c.ok]:
        faults = "; ".join(f"{c.name}: {c.message}" for c in failed)
        raise ValueError(f"the model is not fit for training, {len(failed)} checks failed: {faults}")


def run_doctor(model: str, overfit: bool = True) -> bool:
    """
    Examines a trained checkpoint, prints each result as it comes, and returns whether all is well.

    Args:
        model: Folder or hub id of a model, or of an adapter, which is merged into its base first.
        overfit: Also learn one picture by heart, which takes up to 61 forward and backward passes.
    """
    results = []
    for result in _diagnose(model, overfit):
        print(report([result]), flush=True)
        results.append(result.ok)
    print("all is well" if all(results) else f"{results.count(False)} of {len(results)} checks failed")
    return all(results)


def _diagnose(name: str, with_overfit: bool) -> Iterator[Check]:
    try:
        model, processor, missing = _load(name)
    except Exception as error:  # whatever a damaged checkpoint raises is what is wrong with it
        yield Check("checkpoint", False, f"cannot be loaded: {reason_of(error)}")
        return
    found = f"{len(missing)} weights are missing and start at random: {listed(missing)}; save the whole model"
    yield Check("checkpoint", not missing, found if missing else "no weight is missing")
    yield from examine(model, processor)
    if with_overfit:
        yield overfit(model, processor)


def _load(name: str) -> tuple[MglmmForConditionalGeneration, MglmmProcessor, list[str]]:
    """Model, processor, and the names of the weights that the checkpoint lacks."""
    if name.startswith(("/", ".", "~")) and not Path(name).is_dir():
        raise FileNotFoundError(f"there is no folder {name!r}: name a checkpoint folder or a hub id")
    adapter = find_adapter_config_file(name) is not None
    base = PeftConfig.from_pretrained(name).base_model_name_or_path if adapter else name
    loaded: Any = MglmmForConditionalGeneration.from_pretrained(base, output_loading_info=True)
    model, loading = loaded
    if adapter:
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return model.to(PartialState().device), MglmmProcessor.from_pretrained(name), sorted(loading["missing_keys"])
