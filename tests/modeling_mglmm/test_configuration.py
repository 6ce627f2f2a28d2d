"""The configuration: sub-configurations of any form, JSON, and errors that say what contradicts what."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Dinov2Config,
    GPT2Config,
    LlamaConfig,
    SamConfig,
)

import mglmm
from mglmm import MglmmConfig, MglmmForConditionalGeneration, MglmmModel
from tests.tiny import tiny_config, tiny_model


def test_default_is_the_model_of_the_paper() -> None:
    config = MglmmConfig()
    vision, sam = config.vision_config, config.sam_config.vision_config
    assert isinstance(vision, CLIPVisionConfig) and isinstance(config.text_config, LlamaConfig)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (1024, 24, 336, 14)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers) == (4096, 32)
    assert (sam.hidden_size, sam.num_hidden_layers, sam.num_attention_heads) == (1280, 32, 16)
    assert sam.global_attn_indexes == [7, 15, 23, 31]
    assert (config.ce_loss_weight, config.bce_loss_weight, config.dice_loss_weight) == (1.0, 2.0, 0.5)
    assert config.pixel_config is None and not config.share_vision_tower


@pytest.mark.parametrize(
    "fields",
    [
        {},  # everything by default
        {"vision_config": {"model_type": "siglip_vision_model", "hidden_size": 384}},  # a dict of another kind
        {"vision_config": {"image_size": 224}},  # a dict without model_type: the default's
        {"text_config": GPT2Config(n_layer=3)},  # an instance
        {"sam_config": SamConfig(mask_decoder_config={"layer_norm_eps": 1e-5})},
        {"sam_config": {"prompt_encoder_config": {"image_size": 512}, "vision_config": {"image_size": 512}}},
        {"pixel_config": {"model_type": "dinov2", "hidden_size": 384}, "pixel_feature_layer": [2, -1]},
        {"share_vision_tower": True, "vision_feature_layer": [4, 8], "image_token_stride": 4},
        {"vision_feature_select_strategy": "full", "bce_loss_weight": 1, "mask_chunk_size": 4},
        {"text_config": {"model_type": "qwen2", "tie_word_embeddings": True}},
    ],
)
def test_json_round_trip(fields: dict, tmp_path) -> None:
    config = MglmmConfig(**fields)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mglmm"
    for loaded in (MglmmConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is MglmmConfig
        loaded._name_or_path = ""
        assert loaded.to_dict() == config.to_dict()
    for name in fields:
        part = getattr(config, name)
        assert type(getattr(loaded, name)) is type(part)


def test_dicts_and_instances_give_the_same() -> None:
    as_dicts = MglmmConfig(
        vision_config={"model_type": "dinov2", "hidden_size": 384}, text_config={"model_type": "gpt2", "n_embd": 96}
    )
    as_instances = MglmmConfig(vision_config=Dinov2Config(hidden_size=384), text_config=GPT2Config(n_embd=96))
    assert as_dicts.to_dict() == as_instances.to_dict()
    assert as_dicts.get_text_config() is as_dicts.text_config


def test_tied_embeddings_of_the_language_model_count() -> None:
    assert not MglmmConfig().tie_word_embeddings
    assert MglmmConfig(text_config={"model_type": "gemma", "tie_word_embeddings": True}).tie_word_embeddings


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_token_id": "<image>"}, "image_token_id"),  # wrong type
        ({"vision_feature_select_strategy": "cls"}, "vision_feature_select_strategy"),  # none of the choices
        ({"bce_loss_weight": None}, "bce_loss_weight"),
        ({"vision_config": 3}, "vision_config"),
        ({"share_vision_tower": True, "pixel_config": {"model_type": "dinov2"}}, "leave pixel_config unset"),
        ({"share_vision_tower": True, "vision_feature_select_strategy": "full"}, "needs patch tokens only"),
        ({"pixel_detail_layers": [1]}, "layers of a shared tower"),
        ({"share_vision_tower": True, "pixel_detail_layers": []}, "name at least one"),
        ({"pixel_neck_blocks": 1}, r"pixel_neck_blocks \(1\) belong to the neck"),
        ({"image_token_stride": 0}, r"image_token_stride \(0\) and mask_chunk_size \(8\) must be >= 1"),
        ({"image_token_stride": 2, "vision_feature_select_strategy": "full"}, "pools patch tokens"),
        ({"vision_feature_layer": []}, "at least one layer"),
        ({"sam_config": {"mask_decoder_config": {"hidden_size": 128}}}, r"mask decoder \(128\)"),
        ({"sam_config": {"vision_config": {"num_pos_feats": 64}}}, r"positional encoding \(2 x 64\)"),
        ({"sam_config": {"vision_config": {"image_size": 512}}}, "grid of side 32 with 256 channels"),
        ({"sam_config": {"vision_config": {"output_channels": 128}}}, "side 64 with 128 channels"),
    ],
)
def test_contradictions_are_refused(fields: dict, message: str) -> None:
    with pytest.raises((StrictDataclassError, TypeError), match=message):
        MglmmConfig(**fields)


def test_assignments_are_checked_too() -> None:
    config = MglmmConfig()
    with pytest.raises(StrictDataclassError, match="seg_token_id"):
        config.seg_token_id = "[SEG]"


def test_sams_own_grid_does_not_matter_for_another_pixel_encoder() -> None:
    sam = {"prompt_encoder_config": {"image_size": 448, "patch_size": 14}}
    assert MglmmConfig(sam_config=sam, share_vision_tower=True).share_vision_tower
    with pytest.raises(StrictDataclassError, match="its mask decoder needs side 32"):
        MglmmConfig(sam_config=sam)


def test_auto_classes_know_the_model(tiny, tmp_path) -> None:
    config = tiny_config(tiny.processor)
    assert mglmm.MglmmConfig is MglmmConfig
    assert type(AutoModelForImageTextToText.from_config(config)) is MglmmForConditionalGeneration
    assert type(AutoModel.from_config(config)) is MglmmModel
    tiny_model(tiny.processor).save_pretrained(tmp_path)
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is MglmmForConditionalGeneration
    assert type(AutoModel.from_pretrained(tmp_path)) is MglmmModel
