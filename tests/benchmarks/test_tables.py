"""The tables of `benchmarks/README.md` are replaced where they are, and nothing else is."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def tables(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("tables")


def test_only_the_tables_of_the_script_are_replaced(tables: ModuleType, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    (start, end), (start_b, end_b) = tables.markers("a.py"), tables.markers("b.py")
    readme.write_text(f"before\n{start}old figures\n{end}between\n{start_b}others\n{end_b}after\n", encoding="utf-8")
    tables.write_tables(readme, "a.py", "new figures\n")
    tables.write_tables(readme, "a.py", "newer figures\n")
    expected = f"before\n{start}\nnewer figures\n\n{end}between\n{start_b}others\n{end_b}after\n"
    assert readme.read_text(encoding="utf-8") == expected
    with pytest.raises(ValueError, match="lacks the lines"):
        tables.write_tables(readme, "c.py", "figures\n")


@pytest.mark.parametrize("name", ["inference.py", "prepare.py", "train_step.py"])
def test_readme_has_the_markers(tables: ModuleType, name: str) -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert [text.count(marker) for marker in tables.markers(name)] == [1, 1]
