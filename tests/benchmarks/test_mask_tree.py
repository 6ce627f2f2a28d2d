"""The benchmark's masks are what it promises, and its table says what it saw."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("mask_tree")


def test_a_tree_is_measured(benchmark: ModuleType) -> None:
    assert benchmark.CASES == (50, 100, 200, 500, 1000)
    measured = benchmark.run_tree(20, 1)
    assert measured.masks == measured.nodes == 20 and 0 < measured.children < 20 < measured.pairs < 190
    assert measured.seconds > 0 and measured.matmul_seconds > 0 and measured.tree_memory > 10_000
    assert benchmark.blobs(5) == benchmark.blobs(20)[:5]


def test_the_table_says_what_was_seen(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = benchmark.Tree(1000, 998, 900, 40_000, 0.5, 0.1, 2.0, 300 * 2**20, 2**20)
    line = "| 1,000 | 998 | 900 | 40,000 | 0.500 | 0.100 | 2.000 | 0.250 | 12.5 | 10.0 | 300 | 1.0 |\n"
    assert line in benchmark.render([measured], "the command")

    readme = tmp_path / "README.md"
    tables = sys.modules[benchmark.write_tables.__module__]
    readme.write_text("".join(tables.markers("mask_tree.py")))
    calls = []
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *case: calls.append(case) or measured)
    monkeypatch.setattr(sys, "argv", ["mask_tree.py", "--quick", "--readme", str(readme)])
    for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(threads, "2")  # put back after the test
    benchmark.main()
    assert calls == [(10, 3), (20, 3)]
    assert readme.read_text().count(line) == 2
    assert "python benchmarks/mask_tree.py --quick --repeats 3`" in capsys.readouterr().out


def test_the_readme_has_the_markers(benchmark: ModuleType) -> None:
    text = benchmark.README.read_text(encoding="utf-8")
    for marker in sys.modules[benchmark.write_tables.__module__].markers("mask_tree.py"):
        assert text.count(marker) == 1
