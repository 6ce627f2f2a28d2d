"""The benchmark compares like with like: its bare parts lead to the masks of the whole, and its tables say what it saw."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def inference(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("inference")


@pytest.mark.parametrize(
    ("fixture", "names"),
    [
        # a pixel encoder of its own
        ("tiny", ["vision tower", "pixel encoder", "projector", "language model", "mask decoder"]),
        # the vision tower serves both, through a neck
        ("tiny_shared", ["vision tower", "pixel neck", "projector", "language model", "mask decoder"]),
    ],
)
def test_parts_lead_to_the_masks_of_the_whole(
    inference: ModuleType, fixture: str, names: list[str], request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(fixture).model
    inputs = inference.random_inputs(model, 2)
    seg = model.config.seg_token_id
    whole = model.generate(**inputs, output_masks=True, **inference.generation_kwargs(seg))
    answer = [seg if step in (10, 22, 34, 46, 58) else 100 for step in range(64)]
    assert whole.generated_ids.tolist() == [answer, answer]
    assert [len(masks) for masks in whole.pred_masks] == [5, 5]

    parts, masks = inference.bare_parts(model, inputs)
    assert list(parts) == names
    assert parts["language model"]().tolist() == [answer, answer]  # new tokens only: it was given embeddings
    torch.testing.assert_close(masks, torch.cat(whole.pred_masks), atol=1e-4, rtol=1e-4)
    spread = masks.std()  # masks that were all alike would agree whatever the parts did
    assert (masks[:5] - masks[5:]).abs().max() > 0.1 * spread
    assert (masks[0] - masks[4]).abs().max() > 0.1 * spread


def test_parts_that_lead_to_other_masks_are_refused(
    inference: ModuleType, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare_parts = inference.bare_parts

    def shifted(*arguments):
        parts, masks = bare_parts(*arguments)
        return parts, masks.roll(1, dims=0)

    monkeypatch.setattr(inference, "bare_parts", shifted)
    with pytest.raises(AssertionError, match="not close"):
        inference.measure(tiny.model, inference.random_inputs(tiny.model, 2), repeats=1)


def test_measure_times_every_part_in_every_repetition(inference: ModuleType, tiny, capsys) -> None:
    figures = inference.measure(tiny.model, inference.random_inputs(tiny.model, 1), repeats=2)
    assert [len(times) for times in figures.parts.values()] == [2] * 5
    assert len(figures.whole) == len(figures.second) == 2
    assert min(*figures.whole, *figures.second, *figures.sum_of_parts) > 0
    assert figures.peak_memory > 100 * 2**20  # bytes, not the kilobytes of the system call
    assert "2/2: whole" in capsys.readouterr().out


def test_tables_say_what_was_measured(inference: ModuleType) -> None:
    figures = inference.Figures(
        whole=[4.0, 2.0, 9.0],
        parts={"vision tower": [1.0, 0.5, 2.0], "mask decoder": [3.0, 1.0, 4.0]},
        second=[1.0, 1.0, 1.0],
        peak_memory=3 * 2**29,
    )
    # paired: 4/4, 2/1.5, 9/6 -> 1.33 and 1/4, 1/2, 1/9 -> 0.25, where medians first would give 4/4 and 1/4
    case = inference.Case("mid-size", None, 8, repeats=3, threads=2)
    tables = inference.render({case: figures}, ["A note."], "the command", threads=2, repeats=3)
    assert "| mid-size | 8 | 2.000 | 4.00 | 4.00 | 1.33 | 0.25 | 1.5 |\n" in tables
    assert "| mid-size | 8 | 1.000 | – | – | – | – | 3.000 |\n" in tables
    assert "`the command`: 3 repetitions, 2 threads on" in tables and "A note.\n" in tables
