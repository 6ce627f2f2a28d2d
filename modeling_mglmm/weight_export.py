"""Writes the weights of a model in the layout of LISA or GLaMM, for tools that read nothing else."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from .configuration_mglmm import MglmmConfig
from .weight_files import TensorInfo, list_tensors, open_tensors
from .weight_import import TOWER, VOCABULARY
from .weight_layouts import LISA, Layout, original_name

BUFFERS = "buffers.safetensors"  # beside the original configuration: what `WeightImport.buffers` kept


def check_exportable(config: MglmmConfig, layout: Layout) -> None:
    """Raises `ValueError` naming everything in a model that the layout's code cannot hold."""
    problems = []
    linear = config.projector_hidden_act is None
    if linear != (layout is LISA):
        problems.append(f"its image projector is {'one linear layer' if linear else 'two layers'}")
    if config.text_config.model_type != "llama":
        problems.append(f"its language model is a {config.text_config.model_type}, not a llama")
    if config.vision_config.model_type != "clip_vision_model":
        problems.append(f"its vision tower is a {config.vision_config.model_type}, not a CLIP")
    if config.pixel_config is not None or config.share_vision_tower:
        problems.append("its pixel encoder is not SAM's")
    if config.tie_word_embeddings:
        problems.append("its word embeddings are tied")
    if (
        config.image_token_stride != 1
        or config.normalize_vision_features
        or isinstance(config.vision_feature_layer, list)
    ):
        problems.append("its image tokens are pooled, normalised or of several layers")
    if config.region_feature_layers is not None and layout is LISA:
        problems.append("it has a region encoder")
    if config.image_token_id != config.text_config.vocab_size - 1:
        problems.append(f"<image> ({config.image_token_id}) is not the last of {config.text_config.vocab_size} tokens")
    if problems:
        raise ValueError(f"not a model that {layout.name} can hold: {'; '.join(problems)}")


def export_weights(folder: Path, output: Path, layout: Layout, original: Path, max_shard_size: int = 10**10) -> int:
    """
    Writes `pytorch_model*.bin` (and the index) into a folder, shard by shard.

    The vision tower is left out and the row of `<image>` cut off, as in the originals; types stay as they are stored.

    Args:
        folder: A saved model of this package.
        original: Folder with the layout's `config.json` and, if it was imported, its buffers.
        max_shard_size: Bytes of one file, and about the memory needed.

    Returns:
        Number of tensors.

    Raises:
        ValueError: see `check_exportable`.
    """
    config = MglmmConfig.from_pretrained(folder)
    check_exportable(config, layout)
    tensors = {name: info for name, info in list_tensors(folder).items() if not name.startswith(TOWER)}
    shards = _shards(tensors, max_shard_size)
    names = ["pytorch_model.bin"]
    if len(shards) > 1:
        names = [f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin" for i in range(1, len(shards) + 1)]
    weight_map: dict[str, str] = {}
    for file, shard in zip(names, tqdm(shards, desc="files"), strict=True):
        state = _state(shard, tensors, layout, config)
        if file == names[0]:
            state |= load_file(original / BUFFERS) if (original / BUFFERS).is_file() else _frequencies(config)
        weight_map |= dict.fromkeys(state, file)
        torch.save(state, output / f"{file}.unfinished")
        os.replace(output / f"{file}.unfinished", output / file)
    if len(shards) > 1:
        total = sum(info.shape.numel() * info.dtype.itemsize for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (output / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return len(weight_map)


def _shards(tensors: dict[str, TensorInfo], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, info in tensors.items():
        of_tensor = info.shape.numel() * info.dtype.itemsize
        if shards[-1] and size + of_tensor > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += of_tensor
    return shards


def _state(
    names: list[str], tensors: dict[str, TensorInfo], layout: Layout, config: MglmmConfig
) -> dict[str, torch.Tensor]:
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[tensors[name].file].append(name)
    state: dict[str, Any] = {}
    for file, of_file in by_file.items():
        with open_tensors(file) as get:
            for name in of_file:
                original = original_name(name, layout, config)
                assert original is not None  # only the vision tower has no place there
                tensor = get(name)
                state[original] = tensor[: config.image_token_id].clone() if name in VOCABULARY else tensor
    return state


def _frequencies(config: MglmmConfig) -> dict[str, torch.Tensor]:
    """The rotary frequencies, which the originals' transformers stored as if they were weights."""
    text: Any = config.text_config
    size = text.hidden_size // text.num_attention_heads
    theta = text.rope_parameters["rope_theta"]
    frequencies = 1.0 / (theta ** (torch.arange(0, size, 2).float() / size))
    return {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": frequencies.clone() for i in range(text.num_hidden_layers)
    }
