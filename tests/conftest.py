"""Settings of every test: one thread, no hub, no telemetry, no windows."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("tests", deadline=None)  # a busy machine is no defect
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared` beside the repository: photographs and reference outputs too large to be part of it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny():
    """A toy `(model, processor)` with CLIP, Llama and SAM; see `tests/tiny.py`. Do not change it: all tests share it."""
    from tests.tiny import Tiny, tiny_model, tiny_processor

    processor = tiny_processor()
    return Tiny(tiny_model(processor), processor)


@pytest.fixture(scope="session")
def tiny_shared():
    """Like `tiny`, with the vision tower as pixel encoder."""
    from tests.tiny import Tiny, tiny_model, tiny_processor

    processor = tiny_processor(shared=True)
    return Tiny(tiny_model(processor, shared=True), processor)
