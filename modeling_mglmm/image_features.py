"""Images to features: what the frozen encoders say, and what the trainable layers make of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .seg_states import image_index_of_seg


@dataclass
class MglmmImageFeatures(ModelOutput):
    """
    What the frozen encoders say about images, before any trainable layer: compute it once with
    `model.encode_images(...)`, pass it to `forward` or `generate` as `image_features` as often as you like, or store it.

    Args:
        vision_hidden_states (`torch.Tensor` of shape `(images, tokens, channels)`):
            Selected and concatenated hidden states of the vision tower.
        pixel_hidden_states (`torch.Tensor`, *optional*):
            `(images, hidden, h, w)` from SAM's vision encoder or `(images, h * w, channels)` from another backbone. When
            the vision tower is shared its hidden states serve both, and these are those of `pixel_detail_layers`, or
            `None`.
        region_hidden_states (`torch.Tensor` of shape `(images, levels, tokens, channels)`, *optional*):
            Patch tokens of the layers that regions are read from, where the model has a region encoder.
    """

    vision_hidden_states: torch.Tensor | None = None
    pixel_hidden_states: torch.Tensor | None = None
    region_hidden_states: torch.Tensor | None = None


class MglmmImageMixin:
    """The image side of `MglmmModel`."""

    # ------------------------------------------------------------------ frozen part

    @torch.no_grad()
    def encode_images(
        self, pixel_values: torch.Tensor, sam_pixel_values: torch.Tensor | None = None
    ) -> MglmmImageFeatures:
        """
        Runs the frozen encoders once.

        Args:
            pixel_values: `(images, 3, H, W)`, preprocessed for the vision tower.
            sam_pixel_values: `(images, 3, S, S)`, preprocessed for the pixel encoder; leave it out for a text-only
                answer or when the tower is shared.
        """
        config = self.config
        layers = _as_list(config.vision_feature_layer)
        detail_layers, region_layers = config.pixel_detail_layers or [], config.region_feature_layers or []
        states = self._hidden_states(self.vision_tower, pixel_values, [*layers, *detail_layers, *region_layers])
        vision, states = torch.cat(states[: len(layers)], dim=-1), states[len(layers) :]
        if config.vision_feature_select_strategy == "default":
            vision = _patches_of(vision, self.vision_tower, pixel_values)
        pixel = region = None
        if detail_layers:
            pixel = _patches_of(torch.cat(states[: len(detail_layers)], dim=-1), self.vision_tower, pixel_values)
        if region_layers:
            region = _patches_of(torch.stack(states[len(detail_layers) :], dim=1), self.vision_tower, pixel_values)
        if sam_pixel_values is not None and self.pixel_encoder is not None:
            if len(sam_pixel_values) != len(pixel_values):
                raise ValueError(
                    f"{len(pixel_values)} images in pixel_values but {len(sam_pixel_values)} in sam_pixel_values"
                )
            if config.pixel_config is not None:
                states = self._hidden_states(self.pixel_encoder, sam_pixel_values, _as_list(config.pixel_feature_layer))
                pixel = _patches_of(torch.cat(states, dim=-1), self.pixel_encoder, sam_pixel_values)
            else:
                pixel = self.pixel_encoder(sam_pixel_values.to(self.pixel_encoder.dtype)).last_hidden_state
        return MglmmImageFeatures(vision_hidden_states=vision, pixel_hidden_states=pixel, region_hidden_states=region)

    def _hidden_states(
        self, encoder: PreTrainedModel, pixel_values: torch.Tensor, layers: list[int]
    ) -> list[torch.Tensor]:
        """The selected hidden states `(images, tokens, channels)`, from one run."""
        # A list asks for these layers only, so that the others are not kept in memory.
        outputs = encoder(pixel_values.to(encoder.dtype), output_hidden_states=layers, return_dict=True)
        states = [outputs.hidden_states[layer] for layer in layers]
        if self.config.normalize_vision_features:
            states = [F.layer_norm(state.float(), state.shape[-1:]).to(state.dtype) for state in states]
        return states

    def blank_image_features(self) -> MglmmImageFeatures:
        """Zeros of the shape of one image's features, to keep trainable layers in the graph of an image-less batch."""
        config, size = self.config, self.prompt_encoder.image_embedding_size
        device = self.multi_modal_projector.linear_1.weight.device
        tokens = size[0] * size[1] if config.share_vision_tower else config.image_token_stride**2
        vision = torch.zeros((1, tokens, self.multi_modal_projector.linear_1.in_features), device=device)
        pixel = None
        if self.pixel_neck is None:
            pixel = torch.zeros((1, config.sam_config.prompt_encoder_config.hidden_size, *size), device=device)
        else:
            own = self.pixel_neck.conv1.in_channels - (vision.shape[-1] if config.share_vision_tower else 0)
            pixel = torch.zeros((1, size[0] * size[1], own), device=device) if own else None
        return MglmmImageFeatures(vision_hidden_states=vision, pixel_hidden_states=pixel)

    # ------------------------------------------------------------------ trainable part

    def tokens_per_image(self, image_features: MglmmImageFeatures) -> int:
        """How many `<image>` tokens stand for one image."""
        return image_features.vision_hidden_states.shape[1] // self.config.image_token_stride**2

    def has_pixels(self, image_features: MglmmImageFeatures | None) -> bool:
        """Whether masks can be decoded from these features."""
        config = self.config
        return image_features is not None and (
            image_features.pixel_hidden_states is not None
            or config.share_vision_tower
            and config.pixel_detail_layers is None
        )

    def project_image_features(self, image_features: MglmmImageFeatures) -> torch.Tensor:
        """Image tokens of the language model, `(images, image_tokens, text_hidden)`."""
        states = image_features.vision_hidden_states
        stride = self.config.image_token_stride
        if stride > 1:
            side = round(states.shape[1] ** 0.5)
            if side * side != states.shape[1] or side % stride:
                raise ValueError(
                    f"image_token_stride={stride} needs a square grid divisible by it, got {states.shape[1]} patch tokens"
                )
            grid = states.transpose(1, 2).unflatten(2, (side, side))
            states = F.avg_pool2d(grid, stride).flatten(2).transpose(1, 2)
        return self.multi_modal_projector(states.to(self.multi_modal_projector.linear_1.weight.dtype))

    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` is the list of image tokens per image, as transformers' vision-language models return it."""
        features = self.encode_images(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=features.vision_hidden_states,
            pooler_output=list(self.project_image_features(features)),
        )

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, image_tokens: torch.Tensor
    ) -> torch.Tensor:
        """Where image tokens go, as `(batch, length, 1)` bool; raises `ValueError` if their numbers differ."""
        if input_ids is None:
            token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
            mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
        else:
            mask = input_ids == self.config.image_token_id
        positions, features = int(mask.sum()), image_tokens.shape[0] * image_tokens.shape[1]
        if positions != features:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {positions}, features: {features} "
                f"({image_tokens.shape[0]} images of {image_tokens.shape[1]} tokens)"
            )
        return mask.unsqueeze(-1)

    def get_region_features(
        self,
        input_ids: torch.LongTensor | None,
        region_boxes: torch.Tensor,
        image_features: MglmmImageFeatures | None,
    ) -> torch.Tensor:
        """
        What the language model reads in place of each region token.

        Args:
            input_ids: `(batch, length)`; a region is one of the last image before its token.
            region_boxes: `(total_regions, 4)` x1, y1, x2, y2 in [0, 1] of what the vision tower sees, in reading order
                of the region tokens. With no box the result is empty, but depends on every parameter of the encoder.
            image_features: Result of `encode_images`.

        Returns:
            `(total_regions, text_hidden)`.

        Raises:
            ValueError: no region encoder, no image, or another number of boxes than of region tokens (where GLaMM drops
                the boxes that are too many).
        """
        config = self.config
        if self.region_encoder is None:
            raise ValueError(
                f"{len(region_boxes)} region_boxes, but this model has no region encoder: use one that has, such as an "
                "imported GLaMM, or say in words where to look"
            )
        if region_boxes.ndim != 2 or region_boxes.shape[1] != 4:
            raise ValueError(f"region_boxes must be (total_regions, 4), got {tuple(region_boxes.shape)}")
        count = 0 if input_ids is None else int((input_ids == config.region_token_id).sum())
        if count != len(region_boxes):
            raise ValueError(
                f"{count} region tokens in input_ids but {len(region_boxes)} region_boxes; they are matched in order, so "
                "every region token needs exactly one box"
            )
        if input_ids is None or count == 0:
            return self.region_encoder(None, region_boxes, region_boxes.new_zeros(0, dtype=torch.long), 1.0)
        if image_features is None or image_features.region_hidden_states is None:
            raise ValueError(
                f"{count} region_boxes need the pictures: pass pixel_values, or image_features of this very model"
            )
        rows, positions = (input_ids == config.region_token_id).nonzero(as_tuple=True)
        has_image = (input_ids == config.image_token_id).cumsum(1)[rows, positions] > 0
        if not bool(has_image.all()):
            row = int(rows[~has_image][0])
            raise ValueError(f"row {row} holds a region token but no image before it: a region is one of an image")
        image_index = image_index_of_seg(
            input_ids, config.image_token_id, self.tokens_per_image(image_features), rows, positions
        )
        states, vision = image_features.region_hidden_states, config.vision_config
        cells = math.sqrt(states.shape[2])
        if config.region_scale is not None:
            cells = config.region_scale / vision.patch_size
        elif vision.image_size // vision.patch_size == cells:
            cells = vision.image_size / vision.patch_size  # patches need not cover the picture to its border
        return self.region_encoder(states, region_boxes, image_index, cells)

    def insert_regions(
        self, input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor, regions: torch.Tensor
    ) -> torch.Tensor:
        """`inputs_embeds` with `regions` `(total_regions, text_hidden)` in place of the region tokens, in their order."""
        if input_ids is None:
            mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
        else:
            mask = input_ids == self.config.region_token_id
        count = int(mask.sum())
        if count != len(regions):
            raise ValueError(
                f"{count} region tokens in input_ids but {len(regions)} regions: pass region_boxes, one box for each region "
                "token (the processor makes them from `regions`)"
            )
        regions = regions.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(mask.unsqueeze(-1), regions)

    def get_image_embeddings(self, image_features: MglmmImageFeatures) -> torch.Tensor:
        """SAM's image embeddings, float32 `(images, hidden, h, w)`."""
        if not self.has_pixels(image_features):
            raise ValueError("masks need sam_pixel_values (or image_features that this very model made with them)")
        states = image_features.pixel_hidden_states
        if self.config.share_vision_tower:
            parts = (image_features.vision_hidden_states, states)
            states = torch.cat([part for part in parts if part is not None], dim=-1)
        states = states.float()
        size = self.prompt_encoder.image_embedding_size
        grid = states.shape[1] if self.pixel_neck is not None else states.shape[-2] * states.shape[-1]
        if grid != size[0] * size[1]:
            raise ValueError(
                f"the mask decoder works on a {size[0]} x {size[1]} grid but the features of an image have {grid} cells: "
                "use the image size this model was configured for"
            )
        if self.pixel_neck is not None:
            with torch.autocast(states.device.type, enabled=False):  # the mask path is float32 whatever surrounds it
                states = self.pixel_neck(states.unflatten(1, size))
        return states


def _as_list(layers: int | list[int]) -> list[int]:
    return [layers] if isinstance(layers, int) else layers


def _patches_of(states: torch.Tensor, encoder: PreTrainedModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Without class and register tokens, which stand before the patches on the last axis but one."""
    patch = encoder.config.patch_size
    return states[..., -(pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch) :, :]
