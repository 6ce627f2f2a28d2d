"""The cache of frozen features: what its keys depend on, and that it survives being killed."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mglmm.trainer import feature_cache
from mglmm.trainer.feature_cache import FeatureCache
from tests.tiny import picture


def test_the_same_picture_and_model_give_the_same_key(tiny, tmp_path):
    first = FeatureCache(tmp_path / "a", tiny.model, tiny.processor)
    second = FeatureCache(tmp_path / "a", copy.deepcopy(tiny.model), copy.deepcopy(tiny.processor))
    assert first.path_of(picture()) == second.path_of(picture())


def test_saving_and_loading_keeps_the_keys(tiny, tmp_path):
    """Features computed before a save serve the loaded model."""
    tiny.model.save_pretrained(tmp_path / "model")
    tiny.processor.save_pretrained(tmp_path / "model")
    model = type(tiny.model).from_pretrained(tmp_path / "model")
    processor = type(tiny.processor).from_pretrained(tmp_path / "model")
    before = FeatureCache(tmp_path / "cache", tiny.model, tiny.processor)
    assert FeatureCache(tmp_path / "cache", model, processor).path_of(picture()) == before.path_of(picture())


def changed_pixel(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putpixel((0, 0), (1, 2, 3))
    return image


def turned_by_exif(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.getexif()[0x0112] = 6
    return image


@pytest.mark.parametrize(
    "change",
    [
        changed_pixel,
        turned_by_exif,  # the same stored pixels, seen upright
        lambda image: image.resize((image.height, image.width)),
        lambda image: Image.fromarray(np.asarray(image).reshape(60, 40, 3)),  # the same bytes in another shape
    ],
)
def test_another_picture_gives_another_key(tiny, tmp_path, change):
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    assert cache.path_of(change(picture())) != cache.path_of(picture())


def scale_a_tower_weight(model, processor):
    next(model.model.vision_tower.parameters()).data.add_(0.001)


def scale_a_pixel_encoder_weight(model, processor):
    next(model.model.pixel_encoder.parameters()).data.add_(0.001)


def read_another_layer(model, processor):
    model.config.vision_feature_layer = -1


def normalise_features(model, processor):
    model.config.normalize_vision_features = True


def shift_the_mean(model, processor):
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]


def shift_sams_mean(model, processor):
    processor.sam_image_mean = [0.4, 0.5, 0.5]


@pytest.mark.parametrize(
    "change",
    [
        scale_a_tower_weight,
        scale_a_pixel_encoder_weight,
        read_another_layer,
        normalise_features,
        shift_the_mean,
        shift_sams_mean,
    ],
)
def test_another_encoder_gives_another_key(tiny, tmp_path, change):
    before = FeatureCache(tmp_path, tiny.model, tiny.processor).path_of(picture())
    model, processor = copy.deepcopy(tiny.model), copy.deepcopy(tiny.processor)
    change(model, processor)
    assert FeatureCache(tmp_path, model, processor).path_of(picture()) != before


def test_what_is_trained_leaves_the_key_alone(tiny, tmp_path):
    before = FeatureCache(tmp_path, tiny.model, tiny.processor).path_of(picture())
    model = copy.deepcopy(tiny.model)
    for module in (model.model.language_model, model.model.multi_modal_projector, model.model.mask_decoder):
        next(module.parameters()).data.add_(1.0)
    assert FeatureCache(tmp_path, model, tiny.processor).path_of(picture()) == before


@pytest.mark.parametrize("name", ["tiny", "tiny_shared"])
def test_features_come_back_in_half_precision(name, request, tmp_path):
    model, processor = request.getfixturevalue(name)
    pictures = [picture(seed=seed) for seed in range(3)]
    cache = FeatureCache(tmp_path, model, processor)
    assert cache.fill(model, processor, pictures, batch_size=2) == 3
    pixels = processor(images=pictures, return_tensors="pt")
    expected = model.encode_images(pixels["pixel_values"], pixels.get("sam_pixel_values"))
    loaded = cache.load(pictures)
    assert loaded.keys() == expected.keys()
    for key, value in expected.items():
        assert loaded[key].dtype == torch.float16
        torch.testing.assert_close(loaded[key].float(), value, atol=2e-3, rtol=2e-3)
    assert all(value.dtype == torch.float16 for value in load_file(cache.path_of(pictures[0])).values())


def test_each_picture_is_encoded_once(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    twice = [picture(seed=0), picture(seed=1), picture(seed=0)]
    assert cache.fill(tiny.model, tiny.processor, twice, batch_size=4) == 2
    assert cache.fill(tiny.model, tiny.processor, [*twice, picture(seed=2)]) == 1


def test_a_killed_fill_leaves_only_whole_files_and_is_taken_up(tiny, tmp_path, monkeypatch):
    pictures = [picture(seed=seed) for seed in range(3)]
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    save_file, calls = feature_cache.save_file, []

    def killed_in_the_second(tensors, path):
        calls.append(path)
        save_file(tensors, path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:100])  # what a kill in the middle of a write leaves
            raise KeyboardInterrupt

    monkeypatch.setattr(feature_cache, "save_file", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(tiny.model, tiny.processor, pictures, batch_size=1)
    monkeypatch.undo()
    assert [cache.path_of(image).is_file() for image in pictures] == [True, False, False]
    assert cache.fill(tiny.model, tiny.processor, pictures) == 2
    assert len(cache.load(pictures).vision_hidden_states) == 3


def test_no_partial_file_is_left(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    cache.fill(tiny.model, tiny.processor, [picture()])
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".safetensors"]


def test_a_picture_that_was_never_encoded_is_refused(tiny, tmp_path):
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    cache.fill(tiny.model, tiny.processor, [picture(seed=0)])
    with pytest.raises(FileNotFoundError, match=r"lacks the features of 2 of 3 pictures: call fill\(\)"):
        cache.load([picture(seed=0), picture(seed=1), picture(seed=2)])
