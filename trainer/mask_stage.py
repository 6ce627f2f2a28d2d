"""
Third stage: the mask path alone, on the `[SEG]` states of whole conversations.

What a joint step spends on its masks is little beside what the language model takes. Here the language model stays as it
is: it reads each conversation with its picture once, the `[SEG]` states are kept on disk, and neck, mask projector and
mask decoder train on them, many masks of a picture in a step, rare and hard ones as often as their weights say. What the
model says does not change.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import send_to_device
from datasets import concatenate_datasets
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.mask_losses import mask_ious, mask_losses
from mglmm.modeling_mglmm.seg_states import gather_seg_states
from mglmm.processing import MglmmProcessor

from .data_collator import MglmmDataCollator, masks_of
from .feature_cache import FeatureCache
from .mask_warmup import phrases_of
from .mixture import Mixture, MixtureSampler
from .training_args import MASK_MODULES

BATCH, SHARD = 16, 256  # conversations of a forward pass, and of a file
MODEL_INPUTS = ("input_ids", "attention_mask", "image_features", "region_boxes")


def draw_conversations(rows: Mixture, conversations: int, seed: int) -> list[int]:
    """
    At most `conversations` different rows with masks, in the shares that the mixture gives its datasets and tasks; long
    ones first. Raises `ValueError` if some task gets none, or no row has a mask.
    """
    try:
        drawn = list(dict.fromkeys(MixtureSampler(rows, seed, conversations).order(0)))
    except ValueError as error:
        raise ValueError(f"mask_path.conversations is {conversations}: {error}") from error
    messages = concatenate_datasets(rows.datasets).select(drawn)["messages"]
    numbers = [number for number, conversation in zip(drawn, messages, strict=True) if phrases_of(conversation)]
    if not numbers:
        raise ValueError(f"none of the {len(drawn)} conversations drawn for mask_path has a mask: name other tasks")
    return sorted(numbers, key=lambda number: (-rows.lengths[number], number))


@torch.no_grad()
def conversation_states(
    model: PeftModel, rows: Mixture, collator: MglmmDataCollator, numbers: Sequence[int], folder: Path
) -> dict[str, torch.Tensor]:
    """
    The `[SEG]` states of rows, as a joint step computes them without dropout; each process computes its share. They are
    written file by file, so that this can be killed and started again; what was written for other rows or other weights of
    the adapter is not used.

    Args:
        collator: Of the joint stage, with its feature cache; rows that it leaves out have no states.
        numbers: Of rows of the mixture, in the order in which they are batched.
        folder: For the files.

    Returns:
        `states` `(masks, hidden)` in the language model's dtype, `rows` `(masks,)` int64, numbers in the mixture, and
        `masks` `(masks,)` int64, the position of each mask in its row.
    """
    model.eval()
    base = cast(MglmmForConditionalGeneration, model.get_base_model())
    folder = folder / _fingerprint(model, rows, numbers)
    folder.mkdir(parents=True, exist_ok=True)
    shards = [numbers[start : start + SHARD] for start in range(0, len(numbers), SHARD)]
    paths = [folder / f"{i:05}.safetensors" for i in range(len(shards))]
    process = PartialState()
    share = list(zip(paths, shards, strict=True))[process.process_index :: process.num_processes]
    with tqdm(total=sum(len(shard) for _, shard in share), desc="conversations", unit="row") as bar:
        for path, shard in share:
            if path.is_file():
                bar.update(len(shard))
                continue
            parts = []
            for start in range(0, len(shard), BATCH):
                batch = shard[start : start + BATCH]
                parts.append(_states_of(base, rows, collator, batch))
                bar.update(len(batch))
            partial = path.with_suffix(".partial")
            save_file({name: torch.cat([part[name] for part in parts]) for name in parts[0]}, partial)
            partial.replace(path)
    process.wait_for_everyone()
    loaded = [load_file(path) for path in paths]
    states = {name: torch.cat([shard[name] for shard in loaded]) for name in loaded[0]}
    if bad := len(numbers) - len(states["rows"].unique()):
        process.print(f"mask_path: {bad} of {len(numbers)} conversations are bad rows and left out", flush=True)
        if bad == len(numbers):
            raise ValueError(
                "no conversation is left for mask_path: set training.strict to see what is wrong with them"
            )
    return states


def _fingerprint(model: PeftModel, rows: Mixture, numbers: Sequence[int]) -> str:
    """Of what the states depend on, but for the base and the pictures' pixels."""
    base = cast(MglmmForConditionalGeneration, model.get_base_model())
    dtype = cast(nn.Embedding, base.get_input_embeddings()).weight.dtype
    texts = concatenate_datasets(rows.datasets).select_columns(["source", "image_id", "messages"]).select(numbers)
    digest = hashlib.sha256(json.dumps([str(dtype), list(numbers), *texts]).encode())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _states_of(
    model: MglmmForConditionalGeneration, rows: Mixture, collator: MglmmDataCollator, numbers: Sequence[int]
) -> dict[str, torch.Tensor]:
    items = [rows[number] for number in numbers]
    batch = collator(items)
    skipped = {(row["dataset"], row["index"]) for row in batch.pop("skipped_rows", [])}
    kept = [n for n, item in zip(numbers, items, strict=True) if (item["dataset"], item["index"]) not in skipped]
    inputs = send_to_device({name: batch[name] for name in MODEL_INPUTS if name in batch}, model.device)
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    states, found, _ = gather_seg_states(hidden[:, :-1], inputs["input_ids"][:, 1:], model.config.seg_token_id)
    counts = torch.bincount(found.cpu(), minlength=len(kept)).tolist()
    return {
        "states": states.cpu(),
        "rows": torch.tensor(
            [number for number, count in zip(kept, counts, strict=True) for _ in range(count)], dtype=torch.int64
        ),
        "masks": torch.tensor([k for count in counts for k in range(count)], dtype=torch.int64),
    }


class MaskImages(torch.utils.data.Dataset):
    """
    Pictures with their masks and the states of these, drawn with repetition: item k is one picture, which seed and k alone
    determine. So a run that goes on after a kill sees the pictures that it would have seen.

    Args:
        rows, states: From `conversation_states`.
        source_weights: How often the pictures of a source are drawn, relative to those of others (1).
        phrase_weights: How often masks are drawn, by the last word of their phrase in lower case, relative to the others
            of their picture (1).
        draws: Number of items.
        seed: Of the draws.

    An item holds `image` (PIL), `states` `(masks, hidden)`, `masks` (for each a mapping that `masks_of` reads), `weights`
    float64 `(masks,)` and `seed`, two numbers for what is drawn of it.
    """

    def __init__(
        self,
        rows: Mixture,
        states: Mapping[str, torch.Tensor],
        source_weights: Mapping[str, float],
        phrase_weights: Mapping[str, float],
        draws: int,
        seed: int,
    ):
        all_rows = concatenate_datasets(rows.datasets)
        self.pictures = all_rows.select_columns("image")
        self.encoded = all_rows.select_columns([n for n in ("masks", "ignore_mask") if n in all_rows.column_names])
        self.states, self.draws, self.seed = states["states"], draws, seed
        self.masks = list(zip(states["rows"].tolist(), states["masks"].tolist(), strict=True))
        self.weights = np.ones(len(self.masks))
        of_image: dict[tuple[int, str, str], list[int]] = defaultdict(list)
        columns = all_rows.select_columns(["source", "image_id", "messages"])
        texts = {number: columns[number] for number in dict.fromkeys(states["rows"].tolist())}
        phrases = {number: phrases_of(text["messages"]) for number, text in texts.items()}
        ends = np.cumsum(rows.sizes)  # two datasets may give the same id to different pictures
        for i, (number, position) in enumerate(self.masks):
            part = int(np.searchsorted(ends, number, side="right"))
            of_image[part, texts[number]["source"], texts[number]["image_id"]].append(i)
            word = phrases[number][position].lower().rpartition(" ")[2]
            self.weights[i] = phrase_weights.get(word, 1.0)
        images = sorted(of_image)
        self.images = [of_image[image] for image in images]
        shares = np.array([source_weights.get(source, 1.0) for _, source, _ in images])
        self.shares = shares / shares.sum()

    def __len__(self) -> int:
        return self.draws

    def __getitem__(self, k: int) -> dict[str, Any]:
        chosen = self.images[np.random.default_rng([self.seed, k]).choice(len(self.images), p=self.shares)]
        places = [self.masks[i] for i in chosen]
        found = {number: self.encoded[number] for number in dict.fromkeys(number for number, _ in places)}
        return {
            "image": self.pictures[places[0][0]]["image"],
            "states": self.states[chosen],
            "masks": [{**found[number], "masks": [found[number]["masks"][i]]} for number, i in places],
            "weights": self.weights[chosen],
            "seed": [self.seed, k],
        }


@dataclass
class MaskCollator:
    """
    Items of `MaskImages` to image features, states and labels of at most `masks_per_image` masks each, drawn by weight and
    none twice: `image_features`, `seg_states` `(total_masks, hidden)`, `mask_image_index` `(total_masks,)`, `mask_labels`
    uint8 `(total_masks, mask_size, mask_size)` in {0, 1, 255}.
    """

    processor: MglmmProcessor
    feature_cache: FeatureCache
    masks_per_image: int
    mask_size: int

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        states, labels, index = [], [], []
        for i, item in enumerate(items):
            weights = item["weights"] / item["weights"].sum()
            count = min(self.masks_per_image, len(weights))
            chosen = np.random.default_rng([*item["seed"], 1]).choice(len(weights), count, replace=False, p=weights)
            states.append(item["states"][torch.from_numpy(chosen)])
            masks = [masks_of(item["masks"][k])[0] for k in chosen]
            labels.append(self.processor.mask_labels(masks, self.mask_size))
            index += [i] * count
        return {
            "image_features": self.feature_cache.load([item["image"] for item in items]),
            "seg_states": torch.cat(states),
            "mask_image_index": torch.tensor(index),
            "mask_labels": torch.cat(labels),
        }


class MaskPath(nn.Module):
    """
    Neck, mask projector and mask decoder of `model` in the form that `Trainer` takes: the mask losses of a joint step from
    `[SEG]` states that are given. Freezes everything else in `model`.
    """

    def __init__(self, model: PeftModel):
        super().__init__()
        base = cast(MglmmForConditionalGeneration, model.train().get_base_model())
        self.config = base.config
        self._models = (base.model,)  # in a tuple, hence no submodule: checkpoints hold the trained modules alone
        modules = {name: getattr(base.model, name) for name in MASK_MODULES}
        self.trained = nn.ModuleDict({n: m.modules_to_save["default"] for n, m in modules.items() if m is not None})
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)

    def forward(
        self,
        image_features: MglmmImageFeatures,
        seg_states: torch.Tensor,
        mask_image_index: torch.LongTensor,
        mask_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        model = self._models[0]
        embeddings = model.get_image_embeddings(image_features)
        pred_masks = model.decode_masks(seg_states, mask_image_index, embeddings)
        bce, dice = mask_losses(pred_masks, mask_labels, len(mask_labels))
        loss = self.config.bce_loss_weight * bce + self.config.dice_loss_weight * dice
        iou = mask_ious(pred_masks, mask_labels).mean()
        return {"loss": loss, "mask_bce_loss": bce, "mask_dice_loss": dice, "mask_iou": iou}
