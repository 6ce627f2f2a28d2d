"""Three pictures of one coloured thing each, as USCDF rows, and the toy model ready to be trained on them."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image

from mglmm.datasets_scripts.features import FEATURES
from mglmm.processing.rle import encode_mask
from mglmm.processing.uscdf import PHRASE_END, PHRASE_START, SEG_TOKEN, render_list
from mglmm.trainer.trainable import make_trainable
from mglmm.trainer.training_args import MglmmTrainingArguments
from tests.tiny import tiny_model, tiny_processor

BOXES = {"the hat": (5, 5, 25, 20), "the dog": (30, 10, 55, 35), "the car": (10, 15, 50, 38)}  # xyxy, exclusive
SIZE = (40, 60)  # height, width


def box_mask(name: str) -> np.ndarray:
    left, top, right, bottom = BOXES[name]
    mask = np.zeros(SIZE, dtype=bool)
    mask[top:bottom, left:right] = True
    return mask


def photo(seed: int) -> Image.Image:
    pixels = np.full((*SIZE, 3), 40 * seed + 20, dtype=np.uint8)
    for shift, name in enumerate(BOXES):
        pixels[box_mask(name)] = (200 - 30 * seed, 90 * shift, 60 * seed)
    return Image.fromarray(pixels)


def uscdf_row(seed: int, task: str, *turns: tuple[str, ...]) -> dict[str, Any]:
    """A row whose i-th answer points at the things named in `turns[i]`; an empty turn is answered with a refusal."""
    messages = []
    for i, names in enumerate(turns):
        question = f"Segment {' and '.join(names)}." if names else "Segment a bicycle."
        answer = f"Sure, {render_list(names)}." if names else "Sorry, I cannot find a bicycle."
        messages += [
            {"role": "user", "content": "<image>\n" * (i == 0) + question},
            {"role": "assistant", "content": answer},
        ]
    return {
        "image": photo(seed),
        "image_id": str(seed),
        "source": "test",
        "task": task,
        "messages": messages,
        "masks": [encode_mask(box_mask(name)) for names in turns for name in names],
        "regions": [],
        "ignore_mask": None,
    }


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Rows with 2, 0, 3 (over two turns) and 1 masks."""
    return [
        uscdf_row(0, "referring", ("the hat", "the dog")),
        uscdf_row(1, "absent", ()),
        uscdf_row(2, "referring", ("the car",), ("the dog", "the hat")),
        uscdf_row(0, "fine", ("the car",)),
    ]


def write_dataset(folder: Path, rows: list[dict[str, Any]]) -> str:
    """Writes rows as Parquet that `load_dataset` opens."""
    (folder / "default").mkdir(parents=True)
    encoded = []
    for row in rows:
        buffer = io.BytesIO()
        row["image"].save(buffer, "PNG")
        encoded.append({**row, "image": {"bytes": buffer.getvalue(), "path": None}})
    datasets.Dataset.from_list(encoded, features=FEATURES).to_parquet(folder / "default" / "photos-train-0.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: default/*-train-*.parquet}\n---\n"
    (folder / "README.md").write_text(card)
    return str(folder)


@pytest.fixture
def dataset_folder(tmp_path: Path, rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> str:
    """A dataset of `rows` twice over."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets_cache"))
    return write_dataset(tmp_path / "dataset", rows * 2)


def training_arguments(output_dir: Path, **kwargs: Any) -> MglmmTrainingArguments:
    """Quiet, on CPU, without dropout, 16 px labels (64 px mask frame of the toy model / 4)."""
    defaults = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "lora_dropout": 0.0,
        "mask_size": 16,
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    return MglmmTrainingArguments(**(defaults | kwargs))


@pytest.fixture
def adapted(tmp_path: Path) -> Callable[..., tuple[PeftModel, Any]]:
    """Makes `(model with adapter, processor)`; other keywords than these are training arguments."""

    def make(
        shared: bool = False,
        tie_word_embeddings: bool = False,
        language_model_dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> tuple[PeftModel, Any]:
        processor = tiny_processor(shared)
        model = tiny_model(processor, shared, tie_word_embeddings=tie_word_embeddings)
        model.model.language_model.to(language_model_dtype)
        model.lm_head.to(language_model_dtype)
        torch.manual_seed(0)  # for LoRA
        new_ids = processor.tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
        return make_trainable(model, training_arguments(tmp_path / "run", **kwargs), new_ids), processor

    return make
