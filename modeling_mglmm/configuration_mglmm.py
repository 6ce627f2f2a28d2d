"""Configuration of MGLMM: a vision tower, a causal language model and SAM's mask decoder in one model."""

import copy
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, SamConfig
from transformers.configuration_utils import SubConfigSpec

CLIP_VIT_LARGE_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
SAM_VIT_HUGE = {
    "hidden_size": 1280,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "global_attn_indexes": [7, 15, 23, 31],
}
# Written to `config.json` for `pipeline(..., trust_remote_code=True)` where the package is not installed.
CUSTOM_PIPELINES = {
    "image-segmentation-captioning": {
        "impl": "pipeline_mglmm.MglmmPipeline",
        "pt": ["AutoModelForImageTextToText"],
        "type": "multimodal",
    }
}


@strict
class MglmmConfig(PreTrainedConfig):
    r"""
    The default is the paper's model: CLIP ViT-L/14-336, a Llama-family language model (Vicuna-7B), SAM ViT-H.

    Parameters that name the parts:
        vision_config (`dict` or `PreTrainedConfig`, *optional*, defaults to CLIP ViT-L/14-336):
            The vision tower: any vision model of transformers that returns patch tokens.
        text_config (`dict` or `PreTrainedConfig`, *optional*, defaults to Llama):
            The language model: any causal language model of transformers.
        sam_config (`dict` or `SamConfig`, *optional*, defaults to SAM ViT-H):
            SAM's prompt encoder and mask decoder, and its vision encoder when that is the pixel encoder. The prompt
            encoder's `image_size // patch_size` is the grid of the image embeddings.
        pixel_config (`dict` or `PreTrainedConfig`, *optional*):
            A transformers backbone used as pixel encoder in place of SAM's vision encoder; a trainable SAM neck
            turns its patch tokens into image embeddings.
        share_vision_tower (`bool`, *optional*, defaults to `False`):
            Use the (frozen) vision tower as pixel encoder too, through the same neck. It then runs once per image
            and `pixel_values` is the only image input.

    Parameters that say how image features are read:
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Index into the tower's hidden states (0 = embeddings, i = output of block i); several are concatenated.
        vision_feature_select_strategy (`"default"` or `"full"`, *optional*, defaults to `"default"`):
            `"default"` keeps the patch tokens only, `"full"` also class and register tokens (language model only).
        normalize_vision_features (`bool`, *optional*, defaults to `False`):
            Layer-normalise (no parameters) each selected layer; needed where layers of very different scale meet.
        image_token_stride (`int`, *optional*, defaults to 1):
            Average each stride x stride square of patch tokens into one image token of the language model.
        pixel_feature_layer (`int` or `list[int]`, *optional*, defaults to -1):
            Like `vision_feature_layer`, for a pixel encoder given by `pixel_config`. A shared tower is read at
            `vision_feature_layer`.
        pixel_detail_layers (`list[int]`, *optional*):
            Hidden states of a shared tower that the masks see beside those of `vision_feature_layer` and the language
            model does not: an early block still knows what lies where within a patch.
        pixel_neck_blocks (`int`, *optional*, defaults to 0):
            Residual ConvNeXt blocks (https://arxiv.org/abs/2201.03545) after SAM's neck, for a frozen encoder that was
            not trained to segment: SAM's neck itself is linear but for its normalisation.

    Parameters of the region encoder (GLaMM), which turns boxes into tokens of the language model:
        region_feature_layers (`list[int]`, *optional*):
            Hidden states of the vision tower that regions are read from, the first enlarged most: `[14, 17, 20, 23]` for
            the 24 blocks of GLaMM's, the last four of every third up to the last but one for others. `None`: no region
            encoder.
        region_hidden_size (`int`, *optional*, defaults to 1024):
            Width of a region before it is widened for the language model.
        region_scale (`int`, *optional*):
            Side, in pixels of the vision tower, of what a box is normalised to. `None` is right: the side of the
            tower's pictures. GLaMM's weights depend on 224, though its tower sees 336 pixels: there a box of the
            whole picture covers the upper left 2/3 x 2/3 only.

    Parameters of what is trained:
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the two-layer projector from image features to the language model; `None`: one linear layer
            (LISA).
        mask_projector_hidden_act (`str`, *optional*, defaults to `"relu"`):
            Activation of the two-layer projector from `[SEG]` states to SAM prompts.
        ce_loss_weight, bce_loss_weight, dice_loss_weight (`float`, *optional*, default to 1.0, 2.0, 0.5):
            Weights of the total loss (reference: paper, section on training objectives).
        mask_chunk_size (`int`, *optional*, defaults to 8):
            Most masks decoded in one decoder call; bounds memory (about 90 MiB a mask in training at 64 x 64); on a CPU
            few at a time are faster, too.

    Special tokens:
        image_token_id, seg_token_id (`int`): ids of `<image>` and `[SEG]` in the tokenizer.
        region_token_id (`int`, *optional*): id of the token that stands for a region; needed with a region encoder.
    """

    model_type = "mglmm"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(AutoConfig, model_type="clip_vision_model", init_kwargs=CLIP_VIT_LARGE_336),
        "text_config": SubConfigSpec(AutoConfig, model_type="llama"),
        "sam_config": SubConfigSpec(SamConfig, init_kwargs={"vision_config": SAM_VIT_HUGE}),
        "pixel_config": SubConfigSpec(AutoConfig, model_type="dinov2", optional=True),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    sam_config: dict | PreTrainedConfig | None = None
    pixel_config: dict | PreTrainedConfig | None = None
    share_vision_tower: bool = False
    image_token_id: int = 32000
    seg_token_id: int = 32001
    vision_feature_layer: int | list[int] = -2
    vision_feature_select_strategy: Literal["default", "full"] = "default"
    normalize_vision_features: bool = False
    image_token_stride: int = 1
    pixel_feature_layer: int | list[int] = -1
    pixel_detail_layers: list[int] | None = None
    pixel_neck_blocks: int = 0
    region_feature_layers: list[int] | None = None
    region_hidden_size: int = 1024
    region_scale: int | None = None
    region_token_id: int | None = None
    projector_hidden_act: str | None = "gelu"
    mask_projector_hidden_act: str = "relu"
    ce_loss_weight: float | int = 1.0
    bce_loss_weight: float | int = 2.0
    dice_loss_weight: float | int = 0.5
    mask_chunk_size: int = 8
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if __name__.startswith("mglmm."):
            # The installed package has registered its pipeline; with this entry transformers would insist on the copy.
            kwargs.pop("custom_pipelines", None)
        super().__post_init__(**kwargs)
        if self.text_config.tie_word_embeddings:
            self.tie_word_embeddings = True

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()
        output["custom_pipelines"] = copy.deepcopy(CUSTOM_PIPELINES)
        if "AutoModelForImageTextToText" in (output.get("auto_map") or {}):
            # transformers only lists the class that was saved, though its checkpoint holds the base model too.
            output["auto_map"]["AutoModel"] = "modeling_mglmm.MglmmModel"
        return output

    def validate_architecture(self):
        sam = self.sam_config
        prompt, decoder = sam.prompt_encoder_config, sam.mask_decoder_config
        if not prompt.hidden_size == decoder.hidden_size == 2 * sam.vision_config.num_pos_feats:
            raise ValueError(
                f"SAM's prompt encoder ({prompt.hidden_size}), mask decoder ({decoder.hidden_size}) and positional encoding "
                f"(2 x {sam.vision_config.num_pos_feats}) need one hidden_size"
            )
        if self.share_vision_tower and self.pixel_config is not None:
            raise ValueError("share_vision_tower=True uses the vision tower as pixel encoder: leave pixel_config unset")
        if self.share_vision_tower and self.vision_feature_select_strategy == "full":
            raise ValueError(
                "share_vision_tower=True needs patch tokens only: use vision_feature_select_strategy='default'"
            )
        if self.pixel_config is None and not self.share_vision_tower:
            grid = sam.vision_config.image_size // sam.vision_config.patch_size, sam.vision_config.output_channels
            if grid != (prompt.image_embedding_size, prompt.hidden_size):
                raise ValueError(
                    f"SAM's vision encoder gives a grid of side {grid[0]} with {grid[1]} channels but its mask decoder needs "
                    f"side {prompt.image_embedding_size} with {prompt.hidden_size} channels"
                )
        if self.pixel_detail_layers is not None and not (self.share_vision_tower and self.pixel_detail_layers):
            raise ValueError(
                "pixel_detail_layers are layers of a shared tower: name at least one with share_vision_tower=True, or leave "
                "them unset"
            )
        if self.pixel_neck_blocks < 0 or self.pixel_neck_blocks and not (self.share_vision_tower or self.pixel_config):
            raise ValueError(
                f"pixel_neck_blocks ({self.pixel_neck_blocks}) belong to the neck of a shared tower or of pixel_config; SAM's "
                "own encoder has none"
            )
        if self.vision_feature_layer == [] or self.pixel_feature_layer == []:
            raise ValueError("vision_feature_layer and pixel_feature_layer must name at least one layer")
        if self.region_feature_layers is not None:
            self._validate_regions()
        if self.image_token_stride < 1 or self.mask_chunk_size < 1:
            raise ValueError(
                f"image_token_stride ({self.image_token_stride}) and mask_chunk_size ({self.mask_chunk_size}) must be >= 1"
            )
        if self.image_token_stride > 1 and self.vision_feature_select_strategy == "full":
            raise ValueError("image_token_stride > 1 pools patch tokens: use vision_feature_select_strategy='default'")

    def _validate_regions(self):
        if not self.region_feature_layers:
            raise ValueError("region_feature_layers must name at least one layer; None leaves the region encoder out")
        if self.region_token_id is None:
            raise ValueError(
                "region_feature_layers needs region_token_id, the token that stands for a region: that of a processor made "
                "with region_token='<region>'"
            )
        if self.region_hidden_size < 1 or (self.region_scale is not None and self.region_scale < 1):
            raise ValueError(
                f"region_hidden_size ({self.region_hidden_size}) and region_scale ({self.region_scale}) must be >= 1"
            )
        if self.vision_config.hidden_size % 4:
            raise ValueError(
                f"the region encoder mixes quarters of the vision tower's channels, of which there are "
                f"{self.vision_config.hidden_size}: use a tower with a multiple of 4"
            )


__all__ = ["MglmmConfig"]
