"""The benchmark's input has what it promises, and its tables say what it saw."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from mglmm.processing.rle import decode_mask


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("prepare")


def test_both_layouts_hold_the_same_twelve_masks(benchmark: ModuleType, tmp_path: Path) -> None:
    png = benchmark.write_source(tmp_path / "png", "PNG", 2)
    rle = benchmark.write_source(tmp_path / "rle", "RLE", 2)
    colours = np.asarray(Image.open(png / "annotations/panoptic_val2017/0.png"))
    assert colours.shape == (480, 640, 3) and np.unique(colours[..., 0]).tolist() == list(range(1, 13))
    content = json.loads((rle / "annotations/panoptic_val2017_detection_format.json").read_text())
    first = [segment for segment in content["annotations"] if segment["image_id"] == 0]
    for number, segment in enumerate(first, 1):
        assert np.array_equal(decode_mask(segment["segmentation"]), colours[..., 0] == number)


def test_preparing_and_reading_are_measured(benchmark: ModuleType, tmp_path: Path) -> None:
    source, output = benchmark.write_source(tmp_path / "source", "RLE", 4), tmp_path / "uscdf"
    measured = benchmark.run_preparation(source, output, "RLE", 4)
    assert measured.rows > 4 * 4 and measured.seconds > 0 and measured.peak_memory > 2**20
    ours, plain = benchmark.run_reading(output, tmp_path, repeats=2)
    assert len(ours) == len(plain) == 2 and min(ours + plain) > 0

    measured = benchmark.Preparation("RLE", 4, rows=30, seconds=2.0, peak_memory=3 * 2**20)
    # paired: 2/1, 3/2, 1/1 -> 1.5, where medians first would give 2/1
    tables = benchmark.render([measured], ([1.0, 2.0, 1.0], [2.0, 3.0, 1.0]), 10, "the command")
    assert "| RLE | 4 | 30 | 2.0 | 2 | 15 | 3 |\n" in tables
    assert "| 10 rows | 10 | 5 | 1.50 |\n" in tables
