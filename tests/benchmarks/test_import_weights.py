"""The benchmark's checkpoint has GLaMM's published sizes; its table says what it saw."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from mglmm.processing.original_tokenizer import load_original_tokenizer


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("import_weights")


def test_layout_is_that_of_the_published_files(benchmark: ModuleType) -> None:
    """GLaMM-GCG's two files hold 9.98 and 6.78 GB."""
    shards = list(benchmark.layout(32))
    sizes = [sum(benchmark.size_of(*item) for item in shard.items()) / 1e9 for shard in shards]
    assert sum(sizes) == pytest.approx(16.753, abs=0.001)
    assert sizes == pytest.approx([9.98, 6.78], abs=0.2)


def test_zeros_are_holes(benchmark: ModuleType, tmp_path: Path) -> None:
    file = benchmark.HolesForZeros(tmp_path / "file.bin")
    torch.save({"a": torch.zeros(2**20), "b": torch.arange(5000)}, file)
    file.close()
    state = torch.load(tmp_path / "file.bin", weights_only=True, mmap=True)
    assert not state["a"].any() and state["b"].tolist() == list(range(5000))
    stat = (tmp_path / "file.bin").stat()
    assert stat.st_size > 2**22 and stat.st_blocks * 512 < 2**20


def test_vocabulary_is_of_llamas_kind(benchmark: ModuleType, tmp_path: Path) -> None:
    benchmark.write_sentencepiece(tmp_path / "tokenizer.model")
    tokenizer = load_original_tokenizer(tmp_path, added_tokens=("[SEG]",))
    assert tokenizer.convert_tokens_to_ids("[SEG]") == 32000


def test_table(benchmark: ModuleType) -> None:
    measured = benchmark.Import(
        tensors=1234, bytes=4 * 10**9, largest_file=3 * 10**9, seconds=8.0, peak_memory=5 * 10**9
    )
    assert "| 1,234 | 4.00 | 3.00 | 5.00 | 2.00 | 8 | 0.50 |\n" in benchmark.render(measured, "command")
