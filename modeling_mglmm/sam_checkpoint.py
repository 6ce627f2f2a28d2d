"""Reads SAM weights in the layout of the original `segment_anything` package into transformers' `SamModel`.

The layout carries no configuration: every size is read off the tensor shapes, so that ViT-B, ViT-L, ViT-H and any
other size of the same architecture load through the same two functions.
"""

import os
import pickle
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import (
    AutoModel,
    SamConfig,
    SamMaskDecoderConfig,
    SamModel,
    SamPromptEncoderConfig,
    SamVisionConfig,
)
from transformers.initialization import no_init_weights

# Not visible in any tensor shape; the original package builds every decoder with 8 heads.
DECODER_ATTENTION_HEADS = 8

# transformers' name -> original name, applied to a key from top to bottom (specific fragments first).
RENAMES = (
    # Two tied tensors in transformers, one in the original.
    (
        "shared_image_embedding.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    (
        "prompt_encoder.shared_embedding.positional_embedding",
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    ),
    ("vision_encoder.layers.", "image_encoder.blocks."),
    ("vision_encoder.", "image_encoder."),
    ("patch_embed.projection", "patch_embed.proj"),
    ("neck.conv1", "neck.0"),
    ("neck.layer_norm1", "neck.1"),
    ("neck.conv2", "neck.2"),
    ("neck.layer_norm2", "neck.3"),
    ("mask_embed.conv1", "mask_downscaling.0"),
    ("mask_embed.layer_norm1", "mask_downscaling.1"),
    ("mask_embed.conv2", "mask_downscaling.3"),
    ("mask_embed.layer_norm2", "mask_downscaling.4"),
    ("mask_embed.conv3", "mask_downscaling.6"),
    ("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings."),
    ("upscale_conv1", "output_upscaling.0"),
    ("upscale_layer_norm", "output_upscaling.1"),
    ("upscale_conv2", "output_upscaling.3"),
    (".layer_norm", ".norm"),
)
MLP_LAYER = re.compile(r"(output_hypernetworks_mlps\.\d+|iou_prediction_head)\.(proj_in|proj_out|layers\.(\d+))\.")

# A fragment of a tensor name -> what a file with such a name is.
RELATIVES = (
    ("vision_encoder.layers.", "SAM in transformers' own layout: load it with SamModel.from_pretrained"),
    ("image_encoder.trunk.", "SAM 2, another architecture"),
    ("mask_decoder.hf_token", "HQ-SAM, whose mask decoder has extra layers"),
    ("image_encoder.patch_embed.seq.", "MobileSAM, whose image encoder is a TinyViT"),
)


def load_sam_checkpoint(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> SamModel:
    """Loads an original SAM checkpoint such as `sam_vit_h_4b8939.pth`.

    The file is read with `weights_only=True`: nothing in it is executed. The weights are copied out of it, so it may be
    moved or deleted afterwards.

    Args:
        path (`str` or `os.PathLike`):
            A file written by `torch.save` that holds one flat dictionary of tensors.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            The floating-point type of all parameters of the model, whatever that of the file.

    Returns:
        `SamModel`: on the CPU, in evaluation mode. Its outputs equal those of the `segment_anything` package.

    Raises:
        ValueError: if the file is no such dictionary, or as described in [`convert_sam_state_dict`].
    """
    state_dict = load_pickle(path)
    try:
        config, weights = convert_sam_state_dict(state_dict)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    with no_init_weights():
        model = AutoModel.from_config(config, dtype=dtype)
    model.load_state_dict(weights)
    model.tie_weights()
    return model.eval()


def load_pickle(file: str | os.PathLike[str]) -> Mapping[str, Any]:
    """
    The dictionary in a file of `torch.save`, its tensors mapped into memory; nothing in it is executed.

    Raises:
        ValueError: it is anything else.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{os.fspath(file)} cannot be read as plain tensors in torch.save's zip format: it may be an incomplete "
            "download, another kind of file, or one that would execute code when loaded. Download it again from its "
            "publisher, or save the bare state dictionary of a model you trust with torch.save"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(
            f"{os.fspath(file)} holds a {type(state).__name__}, not a dictionary of tensors by their names"
        )
    return state


def convert_sam_state_dict(
    state_dict: Mapping[str, Any], prefix: str = ""
) -> tuple[SamConfig, dict[str, torch.Tensor]]:
    """Renames the tensors of an original SAM to those of transformers' `SamModel` and infers its configuration.

    Args:
        state_dict (`Mapping[str, torch.Tensor]`):
            Tensors of any dtype by their original names. Only names and shapes are looked at, so tensors on the meta
            device will do.
        prefix (`str`, *optional*, defaults to `""`):
            What precedes the original names, for a SAM inside a bigger checkpoint, such as `"model.visual_model."`.
            Tensors without it are ignored.

    Returns:
        `tuple[SamConfig, dict[str, torch.Tensor]]`: the configuration, and the same tensors, not copied, under the
        names of `SamModel(config).state_dict()`, complete and of the right shapes.

    Raises:
        ValueError: if tensors are missing, unexpected or of the wrong shape. The message counts and names them (by
            their original names) and says what the dictionary seems to be instead.
    """
    tensors = {
        name.removeprefix(prefix): value
        for name, value in state_dict.items()
        if name.startswith(prefix) and isinstance(value, torch.Tensor)
    }
    try:
        config = _infer_config(tensors)
        with torch.device("meta"), no_init_weights():
            expected = SamModel(config).state_dict()
    except (KeyError, ValueError) as error:
        reason = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"not a SAM in segment-anything's layout: {reason}. {_describe(state_dict, prefix)}"
        ) from error

    # transformers annotates sub-configurations as optional dictionaries.
    assert isinstance(config.vision_config, SamVisionConfig)
    assert isinstance(config.mask_decoder_config, SamMaskDecoderConfig)
    originals = {name: original_sam_name(name, config.mask_decoder_config.iou_head_depth) for name in expected}
    missing = {original for original in originals.values() if original not in tensors}
    unexpected = tensors.keys() - originals.values()
    mismatched = {
        f"{original} {tuple(tensors[original].shape)} instead of {tuple(expected[name].shape)}"
        for name, original in originals.items()
        if original in tensors and tensors[original].shape != expected[name].shape
    }
    problems = list_problems(missing, unexpected, mismatched)
    if problems:
        raise ValueError(
            f"not a SAM in segment-anything's layout: of {len(set(originals.values()))} tensors, "
            f"{'; '.join(problems)}. {_describe(state_dict, prefix, config.vision_config)}"
        )
    return config, {name: tensors[original] for name, original in originals.items()}


def _infer_config(tensors: Mapping[str, torch.Tensor]) -> SamConfig:
    """Reads the sizes off the shapes; raises KeyError for a tensor it needs, ValueError for sizes that contradict."""

    def shape(name: str, dimensions: int) -> torch.Size:
        found = tensors[name].shape
        if len(found) != dimensions or 0 in found:
            raise ValueError(f"{name} has shape {tuple(found)}, not {dimensions} dimensions of at least 1")
        return found

    def count(pattern: str) -> int:
        return len({match[1] for name in tensors if (match := re.match(pattern, name))})

    _, grid, grid_width, hidden_size = shape("image_encoder.pos_embed", 4)
    _, num_channels, patch_size, patch_width = shape("image_encoder.patch_embed.proj.weight", 4)
    if grid != grid_width or patch_size != patch_width:
        raise ValueError(
            f"image and patches must be square, not {grid}x{grid_width} patches of {patch_size}x{patch_width} px"
        )
    depth = count(r"image_encoder\.blocks\.(\d+)\.")
    vision_mlp_dim = shape("image_encoder.blocks.0.mlp.lin1.weight", 2)[0]
    # A table holds one row per distance between two patches of a window (2 * side - 1); global blocks have no window.
    tables = [shape(f"image_encoder.blocks.{i}.attn.rel_pos_h", 2) for i in range(depth)]
    table_lengths, head_dim = [length for length, _ in tables], tables[0][1]
    window_sizes = {(length + 1) // 2 for length in table_lengths} - {grid}
    if len(window_sizes) > 1:
        raise ValueError(f"the attention blocks use several window sizes: {sorted(window_sizes)}")
    if hidden_size % head_dim:
        raise ValueError(f"hidden size {hidden_size} is no multiple of the head size {head_dim}")

    prompt_dim = shape("prompt_encoder.no_mask_embed.weight", 2)[1]
    decoder_dim = shape("mask_decoder.iou_token.weight", 2)[1]
    output_channels = shape("image_encoder.neck.0.weight", 4)[0]
    num_pos_feats = shape("prompt_encoder.pe_layer.positional_encoding_gaussian_matrix", 2)[1]
    if not output_channels == prompt_dim == decoder_dim == 2 * num_pos_feats:
        raise ValueError(
            f"neck, prompt encoder, mask decoder and positional encoding differ in width: {output_channels}, "
            f"{prompt_dim}, {decoder_dim} and {2 * num_pos_feats}"
        )
    cross_attention_dim = shape("mask_decoder.transformer.final_attn_token_to_image.q_proj.weight", 2)[0]
    return SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=hidden_size,
            output_channels=output_channels,
            num_hidden_layers=depth,
            num_attention_heads=hidden_size // head_dim,
            num_channels=num_channels,
            image_size=grid * patch_size,
            patch_size=patch_size,
            qkv_bias="image_encoder.blocks.0.attn.qkv.bias" in tensors,
            mlp_ratio=vision_mlp_dim / hidden_size,
            mlp_dim=vision_mlp_dim,
            window_size=next(iter(window_sizes), 0),
            global_attn_indexes=[i for i, length in enumerate(table_lengths) if length == 2 * grid - 1],
            num_pos_feats=num_pos_feats,
        ),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=prompt_dim,
            image_size=grid * patch_size,
            patch_size=patch_size,
            mask_input_channels=shape("prompt_encoder.mask_downscaling.3.weight", 4)[0],
            num_point_embeddings=count(r"prompt_encoder\.point_embeddings\.(\d+)\."),
        ),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=decoder_dim,
            mlp_dim=shape("mask_decoder.transformer.layers.0.mlp.lin1.weight", 2)[0],
            num_hidden_layers=count(r"mask_decoder\.transformer\.layers\.(\d+)\."),
            num_attention_heads=DECODER_ATTENTION_HEADS,
            attention_downsample_rate=max(decoder_dim // cross_attention_dim, 1),
            num_multimask_outputs=shape("mask_decoder.mask_tokens.weight", 2)[0] - 1,
            iou_head_depth=count(r"mask_decoder\.iou_prediction_head\.layers\.(\d+)\."),
            iou_head_hidden_dim=shape("mask_decoder.iou_prediction_head.layers.0.weight", 2)[0],
            # The original's two-way blocks use nn.LayerNorm's default; transformers' default is 1e-6.
            layer_norm_eps=1e-5,
        ),
    )


def original_sam_name(name: str, iou_head_depth: int = 3) -> str:
    """The original package's name of a tensor of `SamModel`."""

    def number_mlp_layer(match: re.Match[str]) -> str:
        mlp, layer, inner = match.groups()
        depth = iou_head_depth if mlp == "iou_prediction_head" else 3
        index = 0 if layer == "proj_in" else depth - 1 if layer == "proj_out" else int(inner) + 1
        return f"{mlp}.layers.{index}."

    for new, original in RENAMES:
        name = name.replace(new, original)
    return MLP_LAYER.sub(number_mlp_layer, name)


def _describe(state_dict: Mapping[str, Any], prefix: str, vision: SamVisionConfig | None = None) -> str:
    """One sentence on what a dictionary that was refused seems to be."""
    nested = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    names = [*state_dict, *(name for key in nested for name in state_dict[key] if isinstance(name, str))]
    for fragment, description in RELATIVES:
        if any(fragment in name for name in names):
            return f"It seems to be {description}."
    if nested:
        return f"Its entries are dictionaries ({_enumerate(nested)}), one of which may hold the weights."
    anchor = "image_encoder.pos_embed"
    prefixes = {name.removesuffix(anchor) for name in state_dict if name.endswith(anchor)} - {prefix}
    if prefixes:
        return (
            f"It holds a SAM under the prefix {_enumerate(map(repr, prefixes))}; convert_sam_state_dict takes a prefix."
        )
    if vision is not None:
        return (
            f"It seems to be a changed or damaged SAM with {vision.num_hidden_layers} image encoder blocks of width "
            f"{vision.hidden_size} and images of {vision.image_size} px."
        )
    return f"It has {len(state_dict)} entries: {_enumerate(state_dict)}."


def list_problems(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> list[str]:
    """What is wrong with the tensors of a file, counted, the first of each kind by name; empty if nothing is."""
    kinds = {"missing": list(missing), "unexpected": list(unexpected), "of the wrong shape": list(mismatched)}
    return [f"{len(names)} {kind} ({_enumerate(names)})" for kind, names in kinds.items() if names]


def _enumerate(names: Iterable[str], limit: int = 5) -> str:
    ordered = sorted(map(str, names))
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")
