"""Frozen image features on disk: the encoders run once per picture, whatever the number of epochs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.processing import MglmmProcessor
from mglmm.processing.images import load_image


class FeatureCache:
    """
    One half-precision safetensors file per picture, named by the picture's pixels and by the encoders' weights and
    preprocessing, so that neither a renamed file nor another model can be mistaken.

    Args:
        folder: Where the files lie; made if missing.
        model, processor: Whose `encode_images` is cached.
    """

    def __init__(self, folder: str | Path, model: MglmmForConditionalGeneration, processor: MglmmProcessor):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.fingerprint = _fingerprint(model, processor)

    def path_of(self, image: Image.Image) -> Path:
        rgb = load_image(image)  # as the processor sees it
        digest = hashlib.sha256(self.fingerprint + repr(rgb.size).encode() + rgb.tobytes()).hexdigest()
        return self.folder / digest[:2] / f"{digest[:32]}.safetensors"

    def fill(
        self,
        model: MglmmForConditionalGeneration,
        processor: MglmmProcessor,
        images: Iterable[Image.Image],
        batch_size: int = 4,
        total: int | None = None,
    ) -> int:
        """Encodes the pictures that are not there yet; can be killed and started again. Returns how many it encoded."""
        count = 0
        batch: list[tuple[Path, Image.Image]] = []
        for image in tqdm(images, total=total, desc="image features", unit="image"):
            try:
                processor.frame_of(image.size[::-1])
            except ValueError:  # too thin for the encoders; the collator names its row
                continue
            path = self.path_of(image)
            if not path.is_file() and all(path != other for other, _ in batch):
                batch.append((path, image))
            if len(batch) == batch_size:
                count += self._encode(model, processor, batch)
                batch = []
        return count + self._encode(model, processor, batch)

    def _encode(
        self, model: MglmmForConditionalGeneration, processor: MglmmProcessor, batch: list[tuple[Path, Image.Image]]
    ) -> int:
        if not batch:
            return 0
        inputs = processor(images=[image for _, image in batch], return_tensors="pt")
        pixels = {k: inputs[k].to(model.device) for k in ("pixel_values", "sam_pixel_values") if k in inputs}
        features = model.encode_images(**pixels)
        for i, (path, _) in enumerate(batch):
            self.write(path, {name: value[i] for name, value in features.items()})
        return len(batch)

    @staticmethod
    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({name: value.half().contiguous().cpu() for name, value in tensors.items()}, partial)
        partial.replace(path)

    def load(self, images: Iterable[Image.Image]) -> MglmmImageFeatures:
        """Features of a batch, float16. Raises `FileNotFoundError` for pictures that were never encoded."""
        paths = [self.path_of(image) for image in images]
        if missing := [path for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{self.folder} lacks the features of {len(missing)} of {len(paths)} pictures: call fill() with them first, "
                "and again after any change of the encoders' weights or of the preprocessing"
            )
        loaded: list[dict[str, Any]] = [load_file(path) for path in paths]
        return MglmmImageFeatures(**{name: torch.stack([item[name] for item in loaded]) for name in loaded[0]})


def _fingerprint(model: MglmmForConditionalGeneration, processor: MglmmProcessor) -> bytes:
    """Hash of everything the features depend on besides the picture."""
    config = model.config
    digest = hashlib.sha256()
    encoders = [encoder for encoder in (model.model.vision_tower, model.model.pixel_encoder) if encoder is not None]
    for encoder in encoders:
        for name, value in sorted(encoder.state_dict().items()):
            digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    preprocessing = processor.image_processor.to_dict()
    preprocessing.pop("auto_map", None)  # where the code lies; written by a save, so that it comes and goes
    settings = [
        config.vision_feature_layer,
        config.vision_feature_select_strategy,
        config.normalize_vision_features,
        config.pixel_feature_layer,
        preprocessing,
        processor.sam_image_size,
        processor.sam_image_mean,
        processor.sam_image_std,
    ]
    settings += [layers for layers in (config.region_feature_layers, config.pixel_detail_layers) if layers]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    return digest.digest()
