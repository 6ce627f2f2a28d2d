"""
The cache of frozen features: what its keys depend on, and that it survives being killed. As a program it is one process
of filling a cache from a dataset, for torchrun to start:

    python -m tests.trainer.test_feature_cache FOLDER DATASET [KILLED_AT]

It notes what it wrote in FOLDER/written.RANK.json, or kills itself in the middle of writing file number KILLED_AT.
"""

import copy
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file, save_file

from mglmm.trainer import feature_cache
from mglmm.trainer.config import DataConfig
from mglmm.trainer.feature_cache import FeatureCache
from mglmm.trainer.mixture import load_mixture
from mglmm.trainer.train import fill_cache
from tests.tiny import picture, tiny_model, tiny_processor
from tests.trainer.conftest import uscdf_row, write_dataset

REPOSITORY = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


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


def test_another_encoder_leaves_the_old_features_alone(tiny, tmp_path):
    """One folder may serve several models, in turn."""
    pictures = [picture(seed=0), picture(seed=1)]
    cache = FeatureCache(tmp_path, tiny.model, tiny.processor)
    cache.fill(tiny.model, tiny.processor, pictures)
    before = cache.load(pictures).vision_hidden_states
    model = copy.deepcopy(tiny.model)
    for parameter in model.model.vision_tower.parameters():
        parameter.data.mul_(1.1)
    other = FeatureCache(tmp_path, model, tiny.processor)
    with pytest.raises(FileNotFoundError, match="lacks the features of 2 of 2 pictures"):
        other.load(pictures)
    assert other.fill(model, tiny.processor, pictures) == 2
    assert not torch.equal(other.load(pictures).vision_hidden_states, before)
    assert torch.equal(cache.load(pictures).vision_hidden_states, before)


class NoPicture:
    """Stands for the picture of a row whose file is damaged."""

    def save(self, file, format):
        file.write(b"\x89PNG, but no picture")


@pytest.fixture
def dataset(tmp_path, monkeypatch) -> str:
    """Eight pictures and a damaged one, in two rows each."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    rows = [{**uscdf_row(0, "absent", ()), "image_id": f"{i}", "image": picture(seed=i)} for i in range(8)]
    rows.insert(0, {**uscdf_row(0, "absent", ()), "image_id": "0 damaged", "image": NoPicture()})
    return write_dataset(tmp_path / "dataset", rows * 2)


def keys(cache: FeatureCache) -> set[str]:
    return {cache.path_of(picture(seed=seed)).stem for seed in range(8)}


def test_bad_pictures_do_not_stop_filling(tiny, tmp_path, dataset):
    thin = Image.new("RGB", (1, 200))  # for the pixel encoder; the collator leaves its row out
    other = write_dataset(tmp_path / "other", [{**uscdf_row(0, "absent", ()), "image": thin}])
    cache = FeatureCache(tmp_path / "features", tiny.model, tiny.processor)
    mixture = load_mixture([DataConfig(path=other), DataConfig(path=dataset)], 0)
    fill_cache(cache, tiny.model, tiny.processor, [mixture])
    assert {path.stem for path in (tmp_path / "features").rglob("*.safetensors")} == keys(cache)


def run(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *launcher, "-m", "tests.trainer.test_feature_cache", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)


def test_a_killed_fill_is_finished_by_two_processes_that_share_the_rest(tiny, tmp_path, dataset):
    """Real processes: SIGKILL in the middle of the fourth file, then two over gloo in the same folder."""
    killed = run([], str(tmp_path), dataset, "3")
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-4000:]
    files = tmp_path / "features"
    first = {path.stem for path in files.rglob("*.safetensors")}
    assert len(first) == 3 and len(list(files.rglob("*.partial"))) == 1

    done = run(TORCHRUN, str(tmp_path), dataset)
    assert done.returncode == 0, done.stderr[-4000:]
    shares = [json.loads((tmp_path / f"written.{rank}.json").read_text()) for rank in (0, 1)]
    cache = FeatureCache(files, tiny.model, tiny.processor)
    assert min(map(len, shares)) > 0 and len(shares[0]) + len(shares[1]) == 5  # none of them twice
    assert first | set(shares[0]) | set(shares[1]) == keys(cache)
    pictures = [picture(seed=seed) for seed in range(8)]
    assert cache.fill(tiny.model, tiny.processor, pictures) == 0
    assert len(cache.load(pictures).vision_hidden_states) == 8


def fill_as_one_process(folder: Path, dataset: str, killed_at: int = -1) -> None:
    processor = tiny_processor()
    model = tiny_model(processor)
    written: list[str] = []

    def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if len(written) == killed_at:
            path.write_bytes(b"half a file")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(tensors, path)
        written.append(path.name.partition(".")[0])

    feature_cache.save_file = save
    state = PartialState(cpu=True)
    mixture = load_mixture([DataConfig(path=dataset)], 0)
    fill_cache(FeatureCache(folder / "features", model, processor), model, processor, [mixture])
    (folder / f"written.{state.process_index}.json").write_text(json.dumps(written))


if __name__ == "__main__":
    fill_as_one_process(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
