"""The layouts of LISA, GLaMM, MGLMM and LLaVA checkpoints: how they are told apart and what their tensors are called.

Facts are in the original repositories' model code. The map goes from a tensor of `MglmmForConditionalGeneration` to its
original name, so that importing and exporting read the same table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlavaConfig, PreTrainedConfig, SamConfig

from .configuration_mglmm import MglmmConfig
from .sam_checkpoint import convert_sam_state_dict, original_sam_name
from .weight_files import TensorInfo

GLAMM_TOKENS = ("<im_start>", "<im_end>", "<bbox>", "<point>", "[SEG]", "<p>", "</p>")


@dataclass(frozen=True)
class Layout:
    """
    Attributes:
        name: As users know it.
        architecture: Class that the original `config.json` names.
        sam_prefix: What precedes segment-anything's own names; empty where the checkpoint holds no SAM.
        image_tokens: Image tokens per picture that the original code has built in; 0 for any number.
        added_tokens: The vocabulary's additions to the base, in the order of their ids; where a base holds some of them
            already, these keep their places.
    """

    name: str
    architecture: str
    sam_prefix: str = ""
    image_tokens: int = 0
    added_tokens: tuple[str, ...] = ()


LISA = Layout("LISA", "LISAForCausalLM", "model.visual_model.", 256, ("[SEG]", "<im_start>", "<im_end>"))
GLAMM = Layout("GLaMM", "GLaMMForCausalLM", "model.grounding_encoder.", 576, GLAMM_TOKENS)
MGLMM = Layout("MGLMM", "MGLMMForCausalLM", "model.segment_encoder.", 0, GLAMM_TOKENS)
LLAVA = Layout("LLaVA", "LlavaLlamaForCausalLM", added_tokens=("[SEG]", "<p>", "</p>"))
LLAVA_HF = Layout("LLaVA (transformers)", "LlavaForConditionalGeneration", added_tokens=("[SEG]", "<p>", "</p>"))

# Ours -> theirs, by the beginning of the name.
RENAMES = (
    ("model.language_model.", "model."),
    ("model.mask_projector.linear_1.", "model.text_hidden_fcs.0.0."),
    ("model.mask_projector.linear_2.", "model.text_hidden_fcs.0.2."),
    ("model.region_encoder.fuse.input_conv.", "model.region_encoder.mlvl_fuse.input_conv."),
    ("model.region_encoder.fuse.convs.", "model.region_encoder.mlvl_fuse.fuse_convs."),
    ("model.region_encoder.roi.", "model.region_encoder.roi_align."),
)
SAM_PARTS = {
    "model.pixel_encoder.vision_encoder.": "vision_encoder.",
    "model.prompt_encoder.": "prompt_encoder.",
    "model.mask_decoder.": "mask_decoder.",
}
# Names that transformers' LLaVA had before version 5 -> today's, which are ours.
LLAVA_HF_RENAMES = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(?:model\.)?vision_tower\.(?:vision_model\.)?", "model.vision_tower."),
    (r"^multi_modal_projector\.", "model.multi_modal_projector."),
)
COMPUTED = "computed, no weight"
# What a file may hold without being needed: the reason why it is left out.
DROPPED = (
    (r"rotary_emb\.inv_freq$", COMPUTED),
    (r"position_ids$", COMPUTED),
    (r"^model\.vision_tower\.", "frozen in the original: taken from the named vision tower"),
)
LORA = re.compile(r"\.lora_([AB])(?:\.default)?\.weight$")
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
    "hidden_act",
    "initializer_range",
    "rope_theta",
    "rope_scaling",
)


def plain_name(name: str) -> str:
    """The name without what PEFT put around it while training."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def find_layout(names: Iterable[str]) -> Layout:
    """
    Which of the known layouts a checkpoint has, by the names of its tensors.

    Raises `ValueError` if it is none of them.
    """
    names = [plain_name(name) for name in names]
    for layout in (LISA, GLAMM, MGLMM):
        if any(name.startswith(layout.sam_prefix) for name in names):
            return layout
    if any(re.match(r"(model\.)?multi_modal_projector\.", name) for name in names):
        return LLAVA_HF
    if any(name.startswith("model.mm_projector.") for name in names):
        return LLAVA
    raise ValueError(
        f"its {len(names)} tensors belong to no layout that can be imported (LISA, GLaMM, MGLMM, LLaVA): there is no "
        f"{LISA.sam_prefix}*, {GLAMM.sam_prefix}*, {MGLMM.sam_prefix}*, model.mm_projector.* or multi_modal_projector.* "
        f"among {', '.join(names[:3])} …"
    )


def check_known(
    layout: Layout, original: Mapping[str, Any], vision: PreTrainedConfig, base_size: int, rows: int
) -> None:
    """
    Refuses a checkpoint that resembles a layout without being of it.

    Args:
        original: Its `config.json`.
        vision: Configuration of its vision tower.
        base_size: Pieces of its SentencePiece model.
        rows: Of its embedding matrix.

    Raises:
        ValueError: naming everything that differs.
    """
    differences = []
    named = (original.get("architectures") or [layout.architecture])[0]
    if named not in (layout.architecture, LLAVA.architecture):  # the base's own, in training folders
        differences.append(f"config.json names {named}, not {layout.architecture}")
    if original.get("with_spi"):
        differences.append("it was made with 'with_spi', an older region encoder")
    if not original.get("mm_use_im_start_end", True):
        differences.append("mm_use_im_start_end is false: its prompts hold no <im_start> and <im_end>")
    if original.get("tie_word_embeddings"):
        differences.append("its word embeddings are tied")
    tokens = (vision.image_size // vision.patch_size) ** 2
    if layout.image_tokens not in (0, tokens):
        differences.append(
            f"its vision tower gives {tokens} image tokens (images of {vision.image_size} px), {layout.name} has "
            f"{layout.image_tokens}"
        )
    added = rows - base_size
    # A base may hold `<im_patch>`, which nothing uses.
    known = {len(layout.added_tokens)} | ({len(layout.added_tokens) + 1} if layout is LISA else set())
    if added not in known:
        differences.append(
            f"its vocabulary has {rows} entries, {added} more than its SentencePiece model; {layout.name} adds "
            f"{' or '.join(map(str, sorted(known)))} ({' '.join(layout.added_tokens)})"
        )
    if differences:
        older = " It may be an older version, such as GLaMM-FullScope_v0." if layout in (LISA, GLAMM) else ""
        raise ValueError(f"this is almost {layout.name}, but not quite: {'; '.join(differences)}.{older}")


def read_sam_config(layout: Layout, tensors: Mapping[str, TensorInfo]) -> SamConfig:
    """Configuration of the SAM in a checkpoint; raises `ValueError` if that is incomplete or damaged."""
    on_meta = {name: torch.empty(info.shape, device="meta") for name, info in tensors.items()}
    return convert_sam_state_dict(on_meta, layout.sam_prefix)[0]


def sees_regions(layout: Layout, original: Mapping[str, Any], tensors: Iterable[str]) -> bool:
    """Whether a checkpoint has a region encoder, or says so and has lost it."""
    present = any(name.startswith("model.region_encoder.") for name in tensors)
    return layout is GLAMM and bool(present or original.get("with_region"))


def mglmm_config(
    layout: Layout,
    original: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    vision: PreTrainedConfig,
    sam: SamConfig,
    *,
    vocab_size: int,
    **fields: Any,
) -> MglmmConfig:
    """
    The configuration of the imported model, with every quirk that the weights depend on.

    Args:
        original: `config.json` of the checkpoint.
        tensors: All its tensors, by plain names.
        vision: Configuration of the vision tower.
        sam: Configuration of SAM.
        vocab_size: Rows of the embedding matrix to come.
        fields: `image_token_id`, `seg_token_id` and, with a region encoder, `region_token_id`.
    """
    if layout is LLAVA_HF:
        llava = LlavaConfig(**original)
        text = llava.text_config.to_dict()
        fields["vision_feature_layer"] = llava.vision_feature_layer
        fields["vision_feature_select_strategy"] = llava.vision_feature_select_strategy
        fields["projector_hidden_act"] = llava.projector_hidden_act
    else:
        text = {name: original[name] for name in LLAMA_FIELDS if original.get(name) is not None}
        text |= {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        fields["vision_feature_layer"] = original.get("mm_vision_select_layer", -2)
        whole = original.get("mm_vision_select_feature") == "cls_patch"
        fields["vision_feature_select_strategy"] = "full" if whole else "default"
        fields["projector_hidden_act"] = None if "model.mm_projector.weight" in tensors else "gelu"
    if sees_regions(layout, original, tensors):
        # Every third hidden state from the one that the language model sees downwards, the last four, shallow first.
        states = range(vision.num_hidden_layers + 1)
        fields["region_feature_layers"] = list(reversed(states[-2::-3][:4]))
        updims = tensors.get("model.region_encoder.roi_align.updims.weight")
        fields["region_hidden_size"] = 1024 if updims is None else updims.shape[1]
        # The original scales boxes to 224 pixels for a tower that sees 336; the weights have learnt to live with it.
        fields["region_scale"] = 224
    return MglmmConfig(vision_config=vision, text_config=text | {"vocab_size": vocab_size}, sam_config=sam, **fields)


def original_name(name: str, layout: Layout, config: MglmmConfig) -> str | None:
    """The original name of a tensor of ours; `None` if the checkpoint does not hold it (vision tower, LLaVA's SAM)."""
    if layout is LLAVA_HF:
        theirs = ("lm_head.", "model.vision_tower.", "model.language_model.", "model.multi_modal_projector.")
        return name if name.startswith(theirs) else None
    if name.startswith("model.vision_tower."):
        return None
    for ours, part in SAM_PARTS.items():
        if name.startswith(ours):
            if not layout.sam_prefix:
                return None
            depth = config.sam_config.mask_decoder_config.iou_head_depth
            return layout.sam_prefix + original_sam_name(part + name.removeprefix(ours), depth)
    if name.startswith("model.multi_modal_projector."):
        linear = config.projector_hidden_act is None
        name = name.replace("multi_modal_projector.linear_1.", "mm_projector." if linear else "mm_projector.0.")
        return name.replace("multi_modal_projector.linear_2.", "mm_projector.2.")
    if name.startswith("model.mask_projector.") and not layout.sam_prefix:
        return None
    for ours, original in RENAMES:
        if name.startswith(ours):
            name = original + name.removeprefix(ours)
            break
    if name.startswith("model.region_encoder.mlvl_fuse.fuse_convs."):
        name = name.replace(".norm.", ".gn.")
    return name


def today_name(name: str, layout: Layout) -> str:
    """A tensor's plain name; of transformers' LLaVA in today's form."""
    name = plain_name(name)
    if layout is LLAVA_HF:
        for pattern, new in LLAVA_HF_RENAMES:
            name = re.sub(pattern, new, name)
    return name


def reason_to_drop(name: str, layout: Layout) -> str | None:
    """Why a tensor of a checkpoint is left out; `None` if it must not be."""
    for pattern, reason in DROPPED:
        if re.search(pattern, name) and not (layout is LLAVA_HF and "vision_tower" in pattern):
            return reason
    return None
