"""
Memory of one GPU in a training step, from a model on the meta device.

Weights, gradients and optimizer states are counted parameter by parameter. Activations are estimated, in bytes, with `b` =
2 in half precision (autocast, or the language model's own dtype), else 4, for a micro-batch of `R` rows, `T` tokens with
padding, `S` supervised tokens and `M` masks:

    language model  layer = 8 h + 4 b q + 3 b f + sum over the linear layers with LoRA of (a + 1) inputs
                    h hidden size, q all query heads, f feed-forward size; 8 h: the two norms keep their input in float32;
                    4 q: queries, keys, values and what attention makes of them; a + 1: the input of LoRA behind its
                    dropout (a = 2 under autocast, else 4) and the dropout's mask (on a GPU; a CPU keeps 4 bytes). A language model that trains in full
                    keeps b (4 h + f) more for the gradients of its weights, and under autocast a half-precision copy of
                    them.
                    total = T layers layer; with activation checkpointing T (layers b h + layer)
    head            S vocabulary (2 b + 8): logits, their log-softmax in float32, and the gradients of both
    new rows        PEFT writes both tables of the vocabulary anew, and they get gradients, in the tables' dtype
    mask decoder    89 MiB a mask at SAM's size (64 x 64 cells, 256 channels, two blocks; float32, measured), for all M;
                    with checkpointing for `mask_chunk_size` of them, and 45 MiB for each of the others
                    of every one
    encoders        nothing is kept; R images in one layer of the larger one: b cells (6 h + 2 f), and in a layer of SAM
                    with global attention b heads cells^2, its position bias

The encoders run first and keep nothing, so that the peak is the larger of their need and of the sum of the rest.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal

from peft.tuners.lora import LoraLayer
from torch import nn

from mglmm.modeling_mglmm import MglmmConfig

from .training_args import MglmmTrainingArguments

Strategy = Literal["ddp", "fsdp2", "zero2", "zero3"]
STRATEGIES: tuple[Strategy, ...] = ("ddp", "fsdp2", "zero2", "zero3")
MODULES = (
    "vision_tower",
    "pixel_encoder",
    "pixel_neck",
    "multi_modal_projector",
    "language_model",
    "LoRA",
    "new-token rows",
    "lm_head",
    "mask_projector",
    "prompt_encoder",
    "mask_decoder",
    "untrained originals",  # PEFT keeps those of the modules that train in full
)
MIB = 2**20
DECODER_BYTES = 89 * MIB  # kept for the backward pass of one mask
PRODUCT_BYTES = 45 * MIB  # of these, what checkpointing keeps: image embedding, results of products and convolutions
CUDA_CONTEXT = 1024 * MIB  # assumed: context, workspaces, communication
REDUCE_BUCKET = 500_000_000  # parameters: DeepSpeed's reduce_bucket_size
LIVE_PARAMETERS = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters
QUANTIZED_BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}  # of a linear weight; 4 bit has a float32 scale for 64 of them


@dataclass
class ModuleCount:
    """Parameters of one part of the model, and their bytes on one GPU that shares them with nobody."""

    total: int = 0
    trainable: int = 0
    bytes: float = 0.0
    trainable_bytes: float = 0.0
    dtypes: set[str] = field(default_factory=set)


@dataclass
class Batch:
    """One micro-batch of one GPU: `R`, `T` (with padding), `S`, `M` and the number of images."""

    rows: int
    tokens: int
    supervised: int
    masks: int
    images: int


def count_parameters(model: nn.Module, quantization: str | None = None) -> dict[str, ModuleCount]:
    """By the names in `MODULES`, those that the model has; `quantization` is of the language model's linear layers."""
    counts: defaultdict[str, ModuleCount] = defaultdict(ModuleCount)
    quantized = set()
    if quantization is not None:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantized = {f"{name}.weight" for name in linear if ".language_model." in name}
    for name, parameter in model.named_parameters():
        size, dtype = float(parameter.numel() * parameter.element_size()), str(parameter.dtype).removeprefix("torch.")
        if name in quantized and not parameter.requires_grad and quantization is not None:
            size, dtype = parameter.numel() * QUANTIZED_BYTES[quantization], quantization
        count = counts[_module_of(name)]
        count.total += parameter.numel()
        count.bytes += size
        count.dtypes.add(dtype)
        if parameter.requires_grad:
            count.trainable += parameter.numel()
            count.trainable_bytes += size
    return {name: counts[name] for name in MODULES if name in counts}


def _module_of(name: str) -> str:
    parts = name.split(".")
    if "original_module" in parts:
        return "untrained originals"
    if any(part.startswith("lora_") for part in parts):
        return "LoRA"
    if any(part.startswith("trainable_tokens") for part in parts):
        return "new-token rows"
    return next(part for part in parts if part in MODULES)


def estimate_memory(
    model: nn.Module,
    config: MglmmConfig,
    counts: dict[str, ModuleCount],
    args: MglmmTrainingArguments,
    batch: Batch,
    strategy: Strategy,
    num_processes: int,
) -> dict[str, int]:
    """Bytes on each GPU, by what they hold. The trainable part is float32, as `make_trainable` leaves it."""
    weights = sum(count.bytes for count in counts.values())
    gradients = sum(count.trainable_bytes for count in counts.values())
    states = 8.0 * sum(count.trainable for count in counts.values())  # AdamW's two, in float32
    buffers = {"gradient buckets": gradients if num_processes > 1 else 0.0}
    if strategy == "fsdp2":
        layer, rest = _layers(model)
        buffers = {"gathered: two layers, and all outside layers": 2 * layer + rest}
    elif strategy in ("zero2", "zero3"):
        states += 4.0 * sum(count.trainable for count in counts.values())  # DeepSpeed's own copy of the weights
        buffers = {"reduce bucket": 4.0 * REDUCE_BUCKET}
    if strategy == "zero3":
        total = sum(count.total for count in counts.values())
        buffers["gathered weights"] = min(1.0, LIVE_PARAMETERS / total) * weights
    if strategy in ("fsdp2", "zero3"):
        weights /= num_processes
    if strategy != "ddp":
        gradients, states = gradients / num_processes, states / num_processes
    sizes = {"weights": weights, "gradients": gradients, "optimizer states": states, **buffers}
    sizes["activations"] = _activations(model, config, counts, args, batch)
    sizes["CUDA context (assumed)"] = CUDA_CONTEXT
    return {name: round(size) for name, size in sizes.items()}


def _layers(model: nn.Module) -> tuple[float, float]:
    """Bytes of the largest transformer layer, and of everything outside of all of them."""
    layers: defaultdict[str, int] = defaultdict(int)
    outside = 0
    for name, parameter in model.named_parameters():
        head, _, rest = name.partition(".layers.")
        size = parameter.numel() * parameter.element_size()
        if rest and _module_of(name) in ("vision_tower", "pixel_encoder", "language_model", "LoRA"):
            layers[f"{head}.{rest.partition('.')[0]}"] += size
        else:
            outside += size
    return max(layers.values()), outside


def _activations(
    model: nn.Module,
    config: MglmmConfig,
    counts: dict[str, ModuleCount],
    args: MglmmTrainingArguments,
    batch: Batch,
) -> float:
    text: Any = config.text_config
    autocast, checkpointing = bool(args.bf16 or args.fp16), bool(args.activation_checkpointing)
    half = autocast or "float32" not in counts["language_model"].dtypes
    adapted: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    kept = language_model_bytes(
        text,
        bytes_per_value=2 if half else 4,
        lora_inputs=sum(module.in_features for module in adapted),
        lora_bytes=2 if autocast else 4,
        full=counts["language_model"].trainable > 0,
        tokens=batch.tokens,
        checkpointing=checkpointing,
    )
    if autocast:  # of weights that train; those of frozen ones are made and dropped one by one
        kept += 2 * counts["language_model"].trainable
    kept += batch.supervised * text.vocab_size * (12 if half else 16)
    if "new-token rows" in counts:
        table = counts["lm_head"].bytes if "lm_head" in counts else text.vocab_size * text.hidden_size * 4
        kept += (2 if "lm_head" in counts else 1) * 2 * table
    kept += _mask_decoder(config, batch.masks, checkpointing)
    half = autocast or "float32" not in counts["vision_tower"].dtypes
    return max(kept, 0.0 if args.cache_image_features else _encoders(config, batch.images, 2 if half else 4))


def language_model_bytes(
    text: Any,
    *,
    bytes_per_value: int,
    lora_inputs: int,
    lora_bytes: int,
    full: bool,
    tokens: int,
    checkpointing: bool,
) -> float:
    """What the language model keeps for its backward pass; `lora_inputs` over all its layers."""
    hidden, layers, b = text.hidden_size, text.num_hidden_layers, bytes_per_value
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or hidden // text.num_attention_heads)
    layer = 8 * hidden + 4 * b * heads + 3 * b * text.intermediate_size + (lora_bytes + 1) * lora_inputs / layers
    if full:
        layer += b * (4 * hidden + text.intermediate_size)
    return tokens * ((layers * b * hidden + layer) if checkpointing else layers * layer)


def _mask_decoder(config: MglmmConfig, masks: int, checkpointing: bool) -> float:
    sam: Any = config.sam_config
    prompt, decoder = sam.prompt_encoder_config, sam.mask_decoder_config
    cells = prompt.image_embedding_size**2
    scale = cells / 64**2 * decoder.hidden_size / 256 * decoder.num_hidden_layers / 2
    if not checkpointing:
        return masks * DECODER_BYTES * scale
    return (min(masks, config.mask_chunk_size) * (DECODER_BYTES - PRODUCT_BYTES) + masks * PRODUCT_BYTES) * scale


def _encoders(config: MglmmConfig, images: int, bytes_per_value: int) -> float:
    sam: Any = config.sam_config
    towers: list[tuple[Any, bool]] = [(config.vision_config, False)]
    if config.pixel_config is not None:
        towers.append((config.pixel_config, False))
    elif not config.share_vision_tower:
        towers.append((sam.vision_config, True))
    needs = []
    for tower, is_sam in towers:
        cells = (tower.image_size // tower.patch_size) ** 2
        values = cells * (6 * tower.hidden_size + 2 * _feed_forward(tower))
        if is_sam and tower.global_attn_indexes:
            values += tower.num_attention_heads * cells**2
        needs.append(images * values * bytes_per_value)
    return max(needs)


def _feed_forward(tower: Any) -> int:
    """Its name differs between vision models; four times the width where there is none."""
    for name in ("intermediate_size", "mlp_dim"):
        if isinstance(getattr(tower, name, None), int):
            return getattr(tower, name)
    return 4 * tower.hidden_size
