"""The benchmark compares like with like: its parts are those of the step, which is one of the trainer, in full."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("train_step")


def test_quick_prints_finite_ratios_for_every_cell(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    benchmark.main("--quick --batch-sizes 1 2 --masks 3 --checkpoint-above 3 --repeats 1 --threads 1".split())
    printed = capsys.readouterr().out
    rows = [
        [cell.strip() for cell in line.strip("| \n").split("|")] for line in printed.splitlines() if line[:1] == "|"
    ]
    summary, details = rows[2:4], rows[6:8]
    assert len(rows) == 8 and [len(row) for row in rows] == [10] * 4 + [6] * 4
    assert [row[:3] for row in summary] == [["1", "3", "no"], ["2", "3", "yes"]]
    for row in [*(row[3:7] for row in summary), *(row[2:] for row in details)]:
        assert all(math.isfinite(float(cell)) and float(cell) >= 0 for cell in row)
    assert all(float(cell) > 0 for row in summary for cell in row[5:7])  # the two ratios
    assert all(row[7:] == ["–", "–", "–"] for row in summary)  # memory needs a process for each figure
    assert (
        "`python benchmarks/train_step.py --quick --batch-sizes 1 2 --masks 3 --repeats 1 --threads 1 --check"
        in printed
    )
    assert "written to" not in printed


@pytest.mark.parametrize(
    ("checkpointing", "masks"),
    [
        (False, 2),  # all activations are kept
        (True, 33),  # run twice in the step, and 66 masks are more than the bare decoder takes at once
    ],
)
def test_a_step_trains_what_the_parts_are_made_of(
    benchmark: ModuleType, tmp_path: Path, checkpointing: bool, masks: int
) -> None:
    case = benchmark.Case(2, masks, checkpointing, repeats=1, threads=1, toy=True)
    trainer, batch = benchmark.prepared(case, str(tmp_path))
    parts = benchmark.BareParts(trainer, batch)
    parts.check()  # the same CE and the same masks

    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    calls = parts.calls()
    calls["language model"]()
    reached = {name for name, p in trained.items() if p.grad is not None}
    assert reached and all("lora_" in name or "lm_head" in name for name in reached)
    trainer.model.zero_grad()
    calls["mask decoder"]()
    reached = {name for name, p in trained.items() if p.grad is not None}
    assert reached == {name for name in trained if ".mask_decoder." in name}
    trainer.model.zero_grad()
    for name in ("vision tower", "pixel encoder"):
        assert not calls[name]().last_hidden_state.requires_grad  # frozen: forward only

    before = copy.deepcopy(trained)
    assert math.isfinite(benchmark.training_step(trainer, batch))
    moved = [name for name, p in trained.items() if not torch.equal(p, before[name])]
    for part in ("lora_B", "embed_tokens", "lm_head", "multi_modal_projector", "mask_projector", "mask_decoder"):
        assert any(part in name for name in moved), part  # the optimizer holds all of the default recipe
    assert all(p.grad is None for p in trained.values())  # the next step starts afresh


def test_tables_go_to_the_readme_and_name_cells_that_did_not_fit(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        benchmark,
        "mid_size_model",
        lambda: benchmark.MglmmForConditionalGeneration(benchmark.MglmmConfig(**benchmark.TOY_CONFIG)),
    )
    measured = []

    def here(function: Callable, case, *arguments):  # in place of a process for each figure
        if case.masks == 2:
            raise benchmark.BrokenProcessPool
        measured.append((function.__name__, *arguments))
        return function(case, *arguments)

    monkeypatch.setattr(benchmark, "in_own_process", here)
    readme = tmp_path / "README.md"
    readme.write_text("<!-- tables of train_step.py -->\n<!-- end of the tables of train_step.py -->\n")
    benchmark.main(f"--batch-sizes 1 --masks 1 2 --repeats 1 --threads 1 --readme {readme}".split())
    assert measured == [("measure",), *(("memory", name) for name in ("step", *benchmark.PARTS))]
    text = readme.read_text()
    assert "| 1 | 1 | no |" in text and "| 1 | 2 |" not in text
    assert "Batch 1 with 2 masks per image did not fit into memory.\n" in text
    assert "ended by the system" in capsys.readouterr().out


def test_parts_that_are_not_those_of_the_step_are_refused(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, batch = benchmark.prepared(benchmark.Case(2, 2, False, repeats=1, threads=1, toy=True), str(tmp_path))
    parts = benchmark.BareParts(trainer, batch)
    monkeypatch.setattr(parts, "masks", lambda *arguments: benchmark.BareParts.masks(parts, *arguments).roll(1, dims=0))
    with pytest.raises(AssertionError, match="not close"):
        parts.check()


def test_tables_say_what_was_measured(benchmark: ModuleType) -> None:
    figures = benchmark.Figures(
        whole=[4.0, 2.0, 9.0],
        parts={
            "vision tower": [0.5] * 3,
            "pixel encoder": [0.5] * 3,
            "language model": [1.0] * 3,
            "mask decoder": [1.0] * 3,
        },
        second=[1.0, 1.0, 1.0],
    )
    # before and after: the step adds 3 GiB, the parts 0.5 + 0.5 + 0 + 1 GiB
    gib = 2**30
    peaks = {"step": (gib, 4 * gib)} | {
        "vision tower": (gib, 3 * gib // 2),
        "pixel encoder": (gib, 3 * gib // 2),
        "language model": (gib, gib),
        "mask decoder": (gib, 2 * gib),
    }
    case = benchmark.Case(8, 30, True, repeats=3, threads=2)
    tables = benchmark.render({case: (figures, peaks)}, ["A note."], "the command", threads=2, repeats=3)
    # paired: 4/3, 2/3, 9/3 -> 1.33 and 1/4, 1/2, 1/9 -> 0.25
    assert "| 8 | 30 | yes | 4.00 | 3.00 | 1.33 | 0.25 | 4.0 | 3.00 / 2.00 | 1.50 |\n" in tables
    assert "| 8 | 30 | 0.500 | 0.500 | 1.000 | 1.000 |\n" in tables
    assert "`the command`: 3 repetitions, 2 threads on" in tables and "A note.\n" in tables


def test_memory_is_read_before_and_after_the_part(benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([100, 250])
    monkeypatch.setattr(benchmark, "peak_memory", lambda: next(peaks))
    case = benchmark.Case(1, 1, False, repeats=1, threads=1, toy=True)
    assert benchmark.memory(case, "language model") == (100, 250)
