"""What the benchmark scripts share: a process of its own for each case, and the tables of `README.md`."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

README = Path(__file__).with_name("README.md")


def markers(script: str) -> tuple[str, str]:
    """The lines of `README.md` between which a script's tables go."""
    return f"<!-- tables of {script} -->\n", f"<!-- end of the tables of {script} -->\n"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [header, rule, *rows])


def write_tables(readme: Path, script: str, tables: str) -> None:
    """Raises `ValueError` if the file lacks the script's two markers."""
    text, (begin, finish) = readme.read_text(encoding="utf-8"), markers(script)
    before, start, rest = text.partition(begin)
    _, end, after = rest.partition(finish)
    if not start or not end:
        raise ValueError(f"{readme} lacks the lines between which the tables go: {begin!r} and {finish!r}")
    readme.write_text(f"{before}{start}\n{tables}\n{end}{after}", encoding="utf-8")


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    # Spawned, not forked, from a parent that never holds a model: a child's peak starts at its parent's size.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
