"""The benchmark's images have what it promises, and its table says what it saw."""

import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mglmm.processing.rle import decode_mask


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("scoring")


@pytest.fixture
def small(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(benchmark, "MAPS", 2)
    monkeypatch.setattr(benchmark, "HEIGHT", 48)
    monkeypatch.setattr(benchmark, "WIDTH", 64)
    return benchmark


def test_images_are_made_as_they_are_asked_for(small: ModuleType) -> None:
    assert (small.MASKS, small.CASES[:2]) == (10, (("RLE", 1000), ("RLE", 5000)))
    source = small.Images("RLE")
    rows = list(islice(source(10**9), 4))
    for name, masks, phrases, scores, truth, labels in rows:
        assert name.startswith("sa_") and len(truth) == len(labels) == 10
        assert 8 <= len(masks) == len(phrases) == len(scores) <= 12
        covered = sum(decode_mask(mask).astype(int) for mask in truth)
        assert covered.shape == (48, 64) and (covered == 1).all()
    assert [row[1] for row in rows] == [row[1] for row in source(4)]  # the same at every call
    assert any(phrase == "a zebra" for row in rows for phrase in row[2])


def test_both_kinds_of_masks_are_scored(small: ModuleType) -> None:
    for masks_as in ("RLE", "bool"):
        measured = small.run_scoring(masks_as, 6)
        assert (measured.images, measured.masks_as) == (6, masks_as)
        assert measured.update_seconds > 0 and measured.compute_seconds > 0 and 0 < measured.recall < 1
        assert measured.peak_memory > 2**20 and 0 < measured.kept < 10_000


def test_the_table_says_what_was_seen(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = small.Scoring("RLE", 5000, 19.0, 1.0, 300 * 2**20, kept=1536, recall=0.75)
    line = "| RLE | 5,000 | 250 | 3.80 | 1.00 | 300 | 1.5 | 0.750 |\n"
    assert line in small.render([measured], "the command")

    readme = tmp_path / "README.md"
    tables = sys.modules[small.write_tables.__module__]
    readme.write_text("".join(tables.markers("scoring.py")))
    calls = []
    monkeypatch.setattr(small, "in_own_process", lambda function, *case: calls.append(case) or measured)
    monkeypatch.setattr(sys, "argv", ["scoring.py", "--quick", "--readme", str(readme)])
    small.main()
    assert calls == list(small.QUICK)
    assert readme.read_text().count(line) == 3
    assert "python benchmarks/scoring.py --quick`" in capsys.readouterr().out


def test_the_readme_has_the_markers(benchmark: ModuleType) -> None:
    text = benchmark.README.read_text(encoding="utf-8")
    for marker in sys.modules[benchmark.write_tables.__module__].markers("scoring.py"):
        assert text.count(marker) == 1


def test_true_masks_and_predictions_are_of_one_size(benchmark: ModuleType) -> None:
    label_map = benchmark._label_map(np.random.default_rng(0))
    assert label_map.shape == (480, 640) and np.unique(label_map).tolist() == list(range(10))
