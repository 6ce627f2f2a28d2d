"""Images to features: what the frozen encoders say, and what the trainable layers make of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs


@dataclass
class MglmmImageFeatures(ModelOutput):
    """
    What the frozen encoders say about images, before any trainable layer: compute it once with
    `model.encode_images(...)`, pass it to `forward` or `generate` as `image_features` as often as you like, or store it.

    Args:
        vision_hidden_states (`torch.Tensor` of shape `(images, tokens, channels)`):
            Selected and concatenated hidden states of the vision tower.
        pixel_hidden_states (`torch.Tensor`, *optional*):
            `(images, hidden, h, w)` from SAM's vision encoder or `(images, h * w, channels)` from another backbone.
            `None` when the vision tower is shared: its hidden states then serve both.
    """

    vision_hidden_states: torch.Tensor | None = None
    pixel_hidden_states: torch.Tensor | None = None


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
        strategy = config.vision_feature_select_strategy
        vision = self._hidden_states(self.vision_tower, pixel_values, config.vision_feature_layer, strategy == "full")
        pixel = None
        if sam_pixel_values is not None and self.pixel_encoder is not None:
            if len(sam_pixel_values) != len(pixel_values):
                raise ValueError(
                    f"{len(pixel_values)} images in pixel_values but {len(sam_pixel_values)} in sam_pixel_values"
                )
            if config.pixel_config is not None:
                pixel = self._hidden_states(self.pixel_encoder, sam_pixel_values, config.pixel_feature_layer, False)
            else:
                pixel = self.pixel_encoder(sam_pixel_values.to(self.pixel_encoder.dtype)).last_hidden_state
        return MglmmImageFeatures(vision_hidden_states=vision, pixel_hidden_states=pixel)

    def _hidden_states(
        self, encoder: PreTrainedModel, pixel_values: torch.Tensor, layers: int | list[int], keep_prefix: bool
    ) -> torch.Tensor:
        layers = [layers] if isinstance(layers, int) else layers
        # A list asks for these layers only, so that the others are not kept in memory.
        outputs = encoder(pixel_values.to(encoder.dtype), output_hidden_states=layers, return_dict=True)
        states = [outputs.hidden_states[layer] for layer in layers]
        if not keep_prefix:  # class and register tokens stand before the patches
            patch = encoder.config.patch_size
            num_patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
            states = [state[:, -num_patches:] for state in states]
        if self.config.normalize_vision_features:
            states = [F.layer_norm(state.float(), state.shape[-1:]).to(state.dtype) for state in states]
        return torch.cat(states, dim=-1)

    def blank_image_features(self) -> MglmmImageFeatures:
        """Zeros of the shape of one image's features, to keep trainable layers in the graph of an image-less batch."""
        config, size = self.config, self.prompt_encoder.image_embedding_size
        device = self.multi_modal_projector.linear_1.weight.device
        tokens = size[0] * size[1] if config.share_vision_tower else config.image_token_stride**2
        vision = torch.zeros((1, tokens, self.multi_modal_projector.linear_1.in_features), device=device)
        pixel = None
        if self.pixel_neck is None:
            pixel = torch.zeros((1, config.sam_config.prompt_encoder_config.hidden_size, *size), device=device)
        elif not config.share_vision_tower:
            pixel = torch.zeros((1, size[0] * size[1], self.pixel_neck.conv1.in_channels), device=device)
        return MglmmImageFeatures(vision_hidden_states=vision, pixel_hidden_states=pixel)

    # ------------------------------------------------------------------ trainable part

    def tokens_per_image(self, image_features: MglmmImageFeatures) -> int:
        """How many `<image>` tokens stand for one image."""
        return image_features.vision_hidden_states.shape[1] // self.config.image_token_stride**2

    def has_pixels(self, image_features: MglmmImageFeatures | None) -> bool:
        """Whether masks can be decoded from these features."""
        return image_features is not None and (
            self.config.share_vision_tower or image_features.pixel_hidden_states is not None
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

    def get_image_embeddings(self, image_features: MglmmImageFeatures) -> torch.Tensor:
        """SAM's image embeddings, float32 `(images, hidden, h, w)`."""
        if not self.has_pixels(image_features):
            raise ValueError("masks need sam_pixel_values (or image_features made with them)")
        shared = self.config.share_vision_tower
        states = image_features.vision_hidden_states if shared else image_features.pixel_hidden_states
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
