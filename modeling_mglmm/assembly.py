"""Building an MGLMM from pretrained parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, SamConfig, SamModel
from transformers.initialization import no_init_weights

from .sam_checkpoint import load_sam_checkpoint

Part = str | Path | PreTrainedModel


class MglmmAssemblyMixin:
    """Adds `from_parts` to the model class."""

    @classmethod
    def from_parts(
        cls,
        vision: Part,
        text: Part,
        sam: Part | SamConfig,
        processor: Any,
        *,
        pixel_encoder: Part | None = None,
        dtype: torch.dtype = torch.float32,
        **config_kwargs: Any,
    ) -> Any:
        """
        A model whose towers, language model and SAM are pretrained and whose projectors (and neck) are fresh.

        Args:
            vision: Vision tower: folder, hub id or model (a CLIP checkpoint gives its vision model).
            text: Causal language model: folder, hub id or model. Parts given as models become parts of the result.
            sam: SAM: folder, hub id, `SamModel`, a Meta `.pth` file, or a `SamConfig` for fresh SAM parts.
            processor: The `MglmmProcessor` to be used with it; its tokenizer already knows the control tokens, whose
                embedding rows start as the mean of the old rows.
            pixel_encoder: Backbone that replaces SAM's vision encoder. The same name (or object) as `vision` shares
                one frozen backbone.
            dtype: Of everything but the mask path, which is float32.
            config_kwargs: Any other field of `MglmmConfig`.

        Returns:
            The model in eval mode, towers and SAM's prompt encoder frozen (`requires_grad=False`).

        Raises:
            ValueError: if the language model's logits are more than one linear layer of its last hidden state, or a
                part is not what `AutoModel` makes of its configuration.
        """
        share = pixel_encoder is not None and (
            pixel_encoder is vision or (isinstance(vision, str | Path) and str(vision) == str(pixel_encoder))
        )
        vision_model = _load_vision(vision, dtype)
        pixel_model = _load_vision(pixel_encoder, dtype) if pixel_encoder is not None and not share else None
        sam_model = _load_sam(sam)
        text_model = text
        if not isinstance(text, PreTrainedModel):
            text_model = AutoModelForCausalLM.from_pretrained(text, dtype=dtype)
        _resize_for(text_model, processor)
        _check_head(text_model.eval())

        config = cls.config_class(
            vision_config=vision_model.config,
            text_config=text_model.config,
            sam_config=sam if sam_model is None else sam_model.config,
            pixel_config=None if pixel_model is None else pixel_model.config,
            share_vision_tower=share,
            image_token_id=processor.image_token_id,
            seg_token_id=processor.seg_token_id,
            region_token_id=processor.region_token_id,
            **config_kwargs,
        )
        with no_init_weights():  # the big parts are about to be replaced: their memory is not even touched
            model: Any = cls(config)  # type: ignore[call-arg]
        body = model.model
        parts = {"vision_tower": vision_model, "language_model": text_model.base_model, "pixel_encoder": pixel_model}
        for name, part in parts.items():
            if part is not None:
                expected = type(getattr(body, name))
                if type(part) is not expected:
                    raise ValueError(f"the {name} must be a {expected.__name__}, got a {type(part).__name__}")
                setattr(body, name, part)
        model.lm_head = text_model.get_output_embeddings()
        fresh = [body.multi_modal_projector, body.mask_projector, body.pixel_neck, body.region_encoder]
        if sam_model is None:
            fresh += [body.prompt_encoder, body.mask_decoder]
        else:
            body.prompt_encoder, body.mask_decoder = sam_model.prompt_encoder, sam_model.mask_decoder
        if pixel_encoder is None and sam_model is None:
            body.pixel_encoder.init_weights()
        elif pixel_encoder is None:
            body.pixel_encoder.vision_encoder = sam_model.vision_encoder
        for module in fresh:
            if module is not None:
                module.apply(model._init_weights)
        model.tie_weights()

        # Parameters only: `model.to(dtype)` would also round buffers such as rotary frequencies, and the mask path.
        for name, parameter in model.named_parameters():
            keep = any(part in name for part in model._keep_in_fp32_modules_strict)
            parameter.data = parameter.data.to(torch.float32 if keep else dtype)
        for frozen in (body.vision_tower, body.pixel_encoder, body.prompt_encoder):
            if frozen is not None:
                frozen.requires_grad_(False)
        model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.generation_config.bos_token_id = processor.tokenizer.bos_token_id
        model.generation_config.do_sample = False
        return model.eval()


def _load_vision(part: Part, dtype: torch.dtype) -> PreTrainedModel:
    if not isinstance(part, PreTrainedModel):
        part = AutoModel.from_pretrained(part, dtype=dtype)
    return getattr(part, "vision_model", part)


def _load_sam(part: Part | SamConfig) -> SamModel | None:
    if isinstance(part, SamConfig):
        return None
    if isinstance(part, PreTrainedModel):
        return part
    return load_sam_checkpoint(part) if Path(part).is_file() else SamModel.from_pretrained(part, dtype=torch.float32)


@torch.no_grad()
def _resize_for(model: PreTrainedModel, processor: Any) -> None:
    """Grows the vocabulary to the tokenizer's and sets new rows, and the control tokens', to the mean of the old ones."""
    old_size, size = model.get_input_embeddings().weight.shape[0], len(processor.tokenizer)
    new_ids = sorted({*processor.control_token_ids, *range(old_size, size)})
    old_ids = sorted(set(range(min(old_size, size))) - set(new_ids))  # rows beyond the tokenizer are padding, untrained
    if size > old_size:
        with no_init_weights():
            model.resize_token_embeddings(size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight: torch.Tensor = layer.weight  # type: ignore[assignment]
        weight[new_ids] = weight[old_ids].float().mean(0).to(weight.dtype)
    model.config.get_text_config().pad_token_id = processor.tokenizer.pad_token_id


@torch.no_grad()
def _check_head(model: PreTrainedModel) -> None:
    tokens = torch.arange(4, device=model.device)[None]
    expected = model(tokens, use_cache=False).logits
    states = model.base_model(tokens, use_cache=False).last_hidden_state
    found = nn.functional.linear(states, model.get_output_embeddings().weight)
    if not torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
        raise ValueError(
            f"{type(model).__name__} does more than one linear layer without bias after its last hidden state (logits "
            "differ), which MGLMM does not reproduce: use another language model"
        )
