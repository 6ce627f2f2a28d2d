"""MGLMM: a LLaVA-style vision-language model whose `[SEG]` tokens prompt SAM's mask decoder."""

import functools
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModel, ConvNextConfig, PreTrainedModel, SamVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.sam.modeling_sam import (
    SamAttention,
    SamFeedForward,
    SamMaskDecoder,
    SamPositionalEmbedding,
    SamPromptEncoder,
    SamVisionNeck,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .assembly import MglmmAssemblyMixin
from .configuration_mglmm import MglmmConfig
from .generation_mglmm import MglmmGenerationMixin
from .image_features import MglmmImageFeatures, MglmmImageMixin
from .losses import MglmmLossMixin
from .outputs import MglmmModelOutput, MglmmOutput
from .region_encoder import MglmmRegionEncoder

BLOCK_SCALE = 1e-2  # of a fresh block's share in the sum: nearly none, so that it may join a trained neck
PRODUCTS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


class MglmmProjector(nn.Module):
    """Two linear layers with an activation between them, or without an activation a single one."""

    def __init__(self, in_features: int, hidden_features: int, out_features: int, hidden_act: str | None):
        super().__init__()
        self.linear_1 = nn.Linear(in_features, out_features if hidden_act is None else hidden_features)
        self.act = nn.Identity() if hidden_act is None else ACT2FN[hidden_act]
        self.linear_2 = nn.Identity() if hidden_act is None else nn.Linear(hidden_features, out_features)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(hidden_states)))


class MglmmPixelNeck(SamVisionNeck):
    """SAM's neck, `(images, h, w, in_channels)` to `(images, out_channels, h, w)`, and residual blocks after it."""

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int):
        super().__init__(SamVisionConfig(hidden_size=in_channels, output_channels=out_channels))
        block = ConvNextConfig(layer_scale_init_value=BLOCK_SCALE)
        self.blocks = nn.ModuleList([ConvNextLayer(block, out_channels) for _ in range(num_blocks)])

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = super().forward(hidden_states)
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


def _is_kept(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


# Checkpointing of the mask decoder keeps what is dear to compute again (about half of the memory) and recomputes the rest.
_keep_products = functools.partial(create_selective_checkpoint_contexts, _is_kept)


def num_layers(layers: int | list[int]) -> int:
    return 1 if isinstance(layers, int) else len(layers)


class MglmmPreTrainedModel(PreTrainedModel):
    config: MglmmConfig
    base_model_prefix = "model"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _no_split_modules = ["SamMaskDecoder", "MglmmPixelNeck", "MglmmRegionEncoder"]
    # By names from the root: no quantisation of transformers touches these.
    _keep_in_fp32_modules = {"model.mask_projector", "model.prompt_encoder", "model.mask_decoder", "model.pixel_neck"}
    _keep_in_fp32_modules_strict = {"mask_projector", "prompt_encoder", "mask_decoder", "pixel_neck"}
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SamPositionalEmbedding):
            # transformers' scale (half of the vision encoder's width) would give neighbouring cells unrelated codes;
            # SAM was trained with 1.
            init.normal_(module.positional_embedding)
        # A fresh mask decoder: transformers' 0.02 would leave its attention uniform for hundreds of steps. With one
        # projection for queries and keys, tokens attend from the start to the pixels that resemble them.
        elif isinstance(module, SamAttention):
            for projection in (module.q_proj, module.v_proj, module.out_proj):
                init.xavier_uniform_(projection.weight)
            init.copy_(module.k_proj.weight, module.q_proj.weight)
        elif isinstance(module, SamFeedForward):
            for layer in (module.proj_in, *module.layers, module.proj_out):
                init.xavier_uniform_(layer.weight)
        elif isinstance(module, ConvNextLayer):
            init.constant_(module.layer_scale_parameter, BLOCK_SCALE)
        elif isinstance(module, MglmmRegionEncoder):
            module.init_parameters()


class MglmmModel(MglmmImageMixin, MglmmPreTrainedModel):
    """Encoders, projectors, language model and mask decoder; no language-model head and no losses."""

    def __init__(self, config: MglmmConfig):
        super().__init__(config)
        vision, text, sam = config.vision_config, config.text_config, config.sam_config
        # SAM knows eager and sdpa attention only, and its mask decoder does not choose one by itself.
        for part in (sam.vision_config, sam.mask_decoder_config):
            wanted = part._attn_implementation or config._attn_implementation
            part._attn_implementation = wanted if wanted in ("eager", "sdpa") else "sdpa"
        self.vision_tower = AutoModel.from_config(vision)  # first, so that its dtype counts as the model's
        vision_channels = vision.hidden_size * num_layers(config.vision_feature_layer)
        # The mask path comes early: an automatic device map offloads what comes last, and SAM's decoder reads its
        # weights in a way that offloading does not see.
        self.mask_projector = MglmmProjector(
            text.hidden_size, text.hidden_size, sam.prompt_encoder_config.hidden_size, config.mask_projector_hidden_act
        )
        self.prompt_encoder = SamPromptEncoder(sam)
        self.mask_decoder = SamMaskDecoder(sam.mask_decoder_config)
        self.pixel_neck: nn.Module | None = None
        self.pixel_encoder: nn.Module | None = None
        if config.share_vision_tower or config.pixel_config is not None:
            channels = vision_channels
            if config.pixel_config is not None:
                self.pixel_encoder = AutoModel.from_config(config.pixel_config)
                channels = config.pixel_config.hidden_size * num_layers(config.pixel_feature_layer)
            elif config.pixel_detail_layers is not None:
                channels += vision.hidden_size * num_layers(config.pixel_detail_layers)
            self.pixel_neck = MglmmPixelNeck(channels, sam.prompt_encoder_config.hidden_size, config.pixel_neck_blocks)
        else:
            self.pixel_encoder = AutoModel.from_config(sam.vision_config)
        self.multi_modal_projector = MglmmProjector(
            vision_channels, text.hidden_size, text.hidden_size, config.projector_hidden_act
        )
        self.region_encoder: nn.Module | None = None
        if config.region_feature_layers is not None:
            self.region_encoder = MglmmRegionEncoder(
                vision.hidden_size, len(config.region_feature_layers), config.region_hidden_size, text.hidden_size
            )
        self.language_model = AutoModel.from_config(text)
        self.gradient_checkpointing = False
        self.post_init()

    def train(self, mode: bool = True) -> "MglmmModel":
        super().train(mode)
        for encoder in (self.vision_tower, self.pixel_encoder):
            if encoder is not None:
                encoder.eval()  # frozen: no dropout, no gradient checkpointing
        return self

    # ------------------------------------------------------------------ masks

    def decode_masks(
        self, seg_states: torch.Tensor, image_index: torch.Tensor, image_embeddings: torch.Tensor
    ) -> torch.Tensor:
        """
        One mask per `[SEG]` state, for any number of masks per image, without a loop over images.

        Args:
            seg_states: `(total_masks, text_hidden)`, last hidden states that predict `[SEG]`.
            image_index: `(total_masks,)` long, row of `image_embeddings` each mask belongs to.
            image_embeddings: `(images, hidden, h, w)` from `get_image_embeddings`.

        Returns:
            float32 logits `(total_masks, 4 h, 4 w)` in the pixel encoder's frame.
        """
        height, width = image_embeddings.shape[-2:]
        if len(seg_states) == 0:
            return image_embeddings.new_zeros((0, 4 * height, 4 * width))
        with torch.autocast(image_embeddings.device.type, enabled=False):  # float32 whatever surrounds it
            dense = self.prompt_encoder(None, None, None, None)[1]  # SAM's "no mask" prompt
            device = dense.device
            image_embeddings = image_embeddings.to(device, torch.float32)
            prompts = self.mask_projector(seg_states.to(device, torch.float32))[:, None, None, :]
            axis_y = (torch.arange(height, device=device) + 0.5) / height
            axis_x = (torch.arange(width, device=device) + 0.5) / width
            coordinates = torch.stack(torch.meshgrid(axis_x, axis_y, indexing="xy"), dim=-1)
            positional = self.prompt_encoder.shared_embedding(coordinates).permute(2, 0, 1)[None]
            masks = []
            size = self.config.mask_chunk_size
            for prompt, index in zip(prompts.split(size), image_index.to(device).split(size), strict=True):
                arguments = (image_embeddings[index], positional, prompt, dense, False)
                if self.training and torch.is_grad_enabled() and self.gradient_checkpointing:
                    kept = checkpoint(self.mask_decoder, *arguments, use_reentrant=False, context_fn=_keep_products)
                    masks.append(kept[0])
                else:
                    masks.append(self.mask_decoder(*arguments)[0])
        return torch.cat(masks)[:, 0, 0]

    # ------------------------------------------------------------------ everything

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        image_features: MglmmImageFeatures | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        region_boxes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MglmmModelOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if image_features is None and pixel_values is not None:
            image_features = self.encode_images(pixel_values, sam_pixel_values)
        image_tokens = None
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is not None:
            image_tokens = torch.stack(list(encoded.pooler_output))
        elif image_features is not None:
            image_tokens = self.project_image_features(image_features)
        if image_tokens is not None:
            image_tokens = image_tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_tokens)
            inputs_embeds = inputs_embeds.masked_scatter(mask, image_tokens)
        regions = None
        encoded = (mm_encoder_outputs or {}).get("region")
        if encoded is not None:
            regions = torch.cat(list(encoded.pooler_output))
        elif region_boxes is not None:
            regions = self.get_region_features(input_ids, region_boxes, image_features)
        elif self.region_encoder is not None and (past_key_values is None or past_key_values.get_seq_length() == 0):
            # Not behind a prompt: there the model itself may have written the token.
            regions = inputs_embeds.new_zeros((0, inputs_embeds.shape[-1]))
        if regions is not None:
            inputs_embeds = self.insert_regions(input_ids, inputs_embeds, regions)
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        return MglmmModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_features=image_features,
        )


class MglmmForConditionalGeneration(MglmmLossMixin, MglmmGenerationMixin, MglmmAssemblyMixin, MglmmPreTrainedModel):
    """MGLMM with its language-model head: losses in training, text with masks in generation."""

    def __init__(self, config: MglmmConfig):
        super().__init__(config)
        self.model = MglmmModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()  # each language model has its own name for them
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def encode_images(
        self, pixel_values: torch.Tensor, sam_pixel_values: torch.Tensor | None = None
    ) -> MglmmImageFeatures:
        """See `MglmmModel.encode_images`."""
        return self.model.encode_images(pixel_values, sam_pixel_values)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        sam_pixel_values: torch.Tensor | None = None,
        image_features: MglmmImageFeatures | None = None,
        mask_labels: torch.Tensor | list[torch.Tensor] | None = None,
        mask_image_index: torch.LongTensor | None = None,
        num_masks_in_batch: torch.Tensor | int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        region_boxes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MglmmOutput:
        r"""
        Masks are decoded when `mask_labels` is given, or `sam_pixel_values` / full `image_features` outside generation.

        Args:
            input_ids: `(batch, length)`; `<image>` repeated once per image token.
            pixel_values: `(images, 3, H, W)` for the vision tower, in reading order of the `<image>`s.
            labels: `(batch, length)`, -100 where unsupervised. `num_items_in_batch` (supervised tokens of the global
                batch) may come in `kwargs`.
            sam_pixel_values: `(images, 3, S, S)` for the pixel encoder.
            image_features: result of `encode_images`, in place of both pixel inputs.
            mask_labels: `(total_masks, h, w)` in {0, 1, 255 = ignored}, in the pixel encoder's frame, in the order of
                the `[SEG]`s of the batch. Or a list of one `(H, W)` per mask, at the pictures' own sizes: the losses
                are then those of LISA, GLaMM and MGLMM, which upscale every mask to its picture.
            mask_image_index: `(total_masks,)` image of each mask; by default the last image before the `[SEG]`.
            num_masks_in_batch: masks of the global batch, the denominator of the mask losses.
            region_boxes: `(total_regions, 4)` x1, y1, x2, y2 in [0, 1], in reading order of the region tokens of the batch,
                each a box in the last image before its token; see `get_region_features`.

        Raises:
            ValueError: if image tokens and features, or `[SEG]`s and mask labels, differ in number (both are named).
        """
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        if region_boxes is None and labels is not None and self.model.region_encoder is not None:
            # An empty batch of regions: all ranks of a distributed run must see gradients for the same parameters.
            region_boxes = torch.zeros((0, 4), device=labels.device)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            sam_pixel_values=sam_pixel_values,
            image_features=image_features,
            mm_encoder_outputs=mm_encoder_outputs,
            region_boxes=region_boxes,
            return_dict=True,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        # `<image>` stands for a picture and is never an answer: no probability, in any loss or decoding.
        logits[..., self.config.image_token_id] = torch.finfo(logits.dtype).min
        ce = bce = dice = loss = None
        if labels is not None:
            ce = self._ce_loss(logits, labels, logits_to_keep, num_items_in_batch)
            loss = self.config.ce_loss_weight * ce
        image_features = outputs.image_features
        masks = self._masks(input_ids, hidden_states, image_features, mask_labels, mask_image_index)
        if mask_labels is not None:
            bce, dice = self._mask_losses(masks[0], mask_labels, num_masks_in_batch, hidden_states, image_features)
            mask_loss = self.config.bce_loss_weight * bce + self.config.dice_loss_weight * dice
            loss = mask_loss if loss is None else loss + mask_loss.to(loss.device)
        return MglmmOutput(
            loss=loss,
            ce_loss=ce,
            mask_bce_loss=bce,
            mask_dice_loss=dice,
            logits=logits,
            pred_masks=masks[0],
            mask_image_index=masks[1],
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


__all__ = [
    "MglmmForConditionalGeneration",
    "MglmmImageFeatures",
    "MglmmModel",
    "MglmmOutput",
    "MglmmPreTrainedModel",
]
