"""Generation that also returns the masks of the `[SEG]`s it wrote, from the hidden states of the generation itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput

from .image_features import MglmmImageFeatures
from .seg_states import gather_seg_states, image_index_of_seg

ASSISTED_DECODING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


@dataclass
class MglmmGenerateOutput(ModelOutput):
    """
    Args:
        sequences (`torch.LongTensor` of shape `(rows, length)`): prompt and generated ids.
        generated_ids (`torch.LongTensor` of shape `(rows, new_tokens)`): the generated part of `sequences`.
        pred_masks (`tuple[torch.Tensor]`):
            Per row, float32 mask logits `(n_i, h, w)` in the pixel encoder's frame, one per generated `[SEG]`, in order;
            none for a row whose prompt has no image.
        mask_scores (`tuple[torch.Tensor]`):
            Per row, `(n_i,)` in [0, 1]: `p([SEG]) * mean(sigmoid(logits) where logits > 0)`, the probability the language
            model gave to `[SEG]` there times the mean confidence of the mask's own foreground (0 for an empty mask).
        sequences_scores (`torch.Tensor` of shape `(rows,)`, *optional*): beam scores, with `output_scores=True`.
    """

    sequences: torch.LongTensor | None = None
    generated_ids: torch.LongTensor | None = None
    pred_masks: tuple[torch.Tensor, ...] | None = None
    mask_scores: tuple[torch.Tensor, ...] | None = None
    sequences_scores: torch.Tensor | None = None


def mask_confidence(mask_logits: torch.Tensor) -> torch.Tensor:
    """Mean foreground probability of each mask, `(n,)` from logits `(n, h, w)`; 0 for an empty mask."""
    foreground = mask_logits > 0
    total = (mask_logits.sigmoid() * foreground).flatten(1).sum(1)
    return total / foreground.flatten(1).sum(1).clamp_min(1)


class MglmmGenerationMixin(GenerationMixin):
    """Adds `output_masks`, `image_features` and `region_boxes` to transformers' `generate`."""

    def prepare_inputs_for_generation(
        self, input_ids: torch.LongTensor, sam_pixel_values: torch.Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        # The mask decoder never runs inside the decoding loop, so its inputs stay out of `forward`.
        kwargs.pop("image_features", None)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        regions = (model_kwargs.get("mm_encoder_outputs") or {}).get("region")
        if regions is not None and expand_size > 1:  # transformers knows of images and videos only
            counts = (input_ids == self.config.region_token_id).sum(1).tolist()
            rows = torch.cat(list(regions.pooler_output)).split(counts)
            regions.pooler_output = [row for row in rows for _ in range(expand_size)]
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        *args: Any,
        pixel_values: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_features: MglmmImageFeatures | None = None,
        output_masks: bool = False,
        original_sizes: Any = None,
        region_boxes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        transformers' `generate` (greedy, sampling, beams, caches, left-padded batches), each encoder run at most once.

        Args:
            pixel_values: `(images, 3, H, W)`.
            sam_pixel_values: `(images, 3, S, S)`; needed for masks unless the vision tower is shared.
            image_features: result of `encode_images`, in place of both: ask many times, encode once.
            output_masks: return a `MglmmGenerateOutput` with the mask and score of every generated `[SEG]`.
            region_boxes: `(total_regions, 4)` x1, y1, x2, y2 in [0, 1], as in `forward`; read once, before decoding.
            original_sizes: not used; lets `generate(**processor(...))` pass what only post-processing needs.

        Raises:
            ValueError: if masks are asked for without what they need, or of assisted decoding.
        """
        if pixel_values is not None and image_features is not None:
            raise ValueError("pass either pixel_values or image_features, not both")
        if pixel_values is not None:
            image_features = self.encode_images(pixel_values, sam_pixel_values if output_masks else None)
        if image_features is not None:
            tokens = self.model.project_image_features(image_features)
            encoded = BaseModelOutputWithPooling(pooler_output=list(tokens))
            kwargs["mm_encoder_outputs"] = {"image": encoded}
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        if region_boxes is not None:
            vectors = self.model.get_region_features(input_ids, region_boxes, image_features)
            if len(vectors):
                kwargs["mm_encoder_outputs"]["region"] = BaseModelOutputWithPooling(pooler_output=[vectors])
        if not output_masks:
            return super().generate(inputs, *args, **kwargs)

        if input_ids is None:
            raise ValueError("output_masks=True needs input_ids: they say which image each row speaks of")
        if not self.model.has_pixels(image_features):
            raise ValueError(
                "output_masks=True needs images: pass pixel_values and sam_pixel_values, or image_features made with both"
            )
        if any(kwargs.get(name) is not None for name in ASSISTED_DECODING):
            raise ValueError(
                "masks come from the states of the generation itself, which assisted decoding does not keep"
            )
        kwargs |= {"return_dict_in_generate": True, "output_hidden_states": -1}
        outputs = super().generate(inputs, *args, **kwargs)
        generated = outputs.sequences[:, input_ids.shape[1] :]
        states = _generated_states(outputs, generated.shape[1])

        seg_id = self.config.seg_token_id
        seg_states, rows, _ = gather_seg_states(states, generated, seg_id)
        prompt_rows = rows // (len(generated) // len(input_ids))
        has_image = (input_ids == self.config.image_token_id).any(1)[prompt_rows]
        masks, scores = self._masks_of(seg_states[has_image], prompt_rows[has_image], input_ids, image_features)
        counts = torch.bincount(rows[has_image], minlength=len(generated)).tolist()
        return MglmmGenerateOutput(
            sequences=outputs.sequences,
            generated_ids=generated,
            pred_masks=masks.split(counts),
            mask_scores=scores.split(counts),
            sequences_scores=outputs.get("sequences_scores"),
        )

    def _masks_of(
        self,
        seg_states: torch.Tensor,
        prompt_rows: torch.LongTensor,
        input_ids: torch.LongTensor,
        image_features: MglmmImageFeatures,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits `(total_masks, h, w)` and scores `(total_masks,)` of `[SEG]`s generated after `input_ids`."""
        size = self.model.prompt_encoder.image_embedding_size
        if len(seg_states) == 0:
            empty = torch.zeros((0, 4 * size[0], 4 * size[1]), device=seg_states.device)
            return empty, empty.new_zeros(0)
        tokens_per_image = self.model.tokens_per_image(image_features)
        last = torch.full_like(prompt_rows, input_ids.shape[1] - 1)
        image_index = image_index_of_seg(input_ids, self.config.image_token_id, tokens_per_image, prompt_rows, last)
        embeddings = self.model.get_image_embeddings(image_features)
        masks = self.model.decode_masks(seg_states, image_index, embeddings)
        logits = self.lm_head(seg_states).float()
        logits[:, self.config.image_token_id] = torch.finfo(logits.dtype).min  # as in `forward`
        probability = logits.softmax(-1)[:, self.config.seg_token_id]
        return masks, probability.to(masks.device) * mask_confidence(masks)


def _generated_states(outputs: ModelOutput, num_tokens: int) -> torch.Tensor:
    """States `(rows, num_tokens, hidden)` that predicted each generated token (after the final norm)."""
    states = torch.stack([step[-1][:, -1] for step in outputs.hidden_states[:num_tokens]], dim=1)
    beams = outputs.get("beam_indices")
    if beams is not None:  # the row that produced token t of the returned sequence changes from step to step
        rows = beams[:, :num_tokens].long().clamp_min(0)
        states = states[rows, torch.arange(num_tokens, device=states.device)]
    return states
