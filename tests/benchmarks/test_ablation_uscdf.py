"""Both formats are trained on data of their own and asked the same; the page says what came out."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture(scope="module")
def benchmark(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("ablation_uscdf")


def group(value: float) -> dict[str, Any]:
    """A group of `results.json`, with other numbers in every place."""
    numbers = {"object gIoU": value, "part gIoU": value / 2}
    return {
        "object": {"questions": 30, "gIoU": numbers["object gIoU"], "cIoU": 0.25},
        "part": {"questions": 50, "gIoU": numbers["part gIoU"], "cIoU": 0.5},
        "absent": 20,
        "refused": 0.75,
        "false_refusals": 0.125,
        "panoptic": {"images": 6, "mask_recall": 0.875, "mIoU_gt": 0.625},
        "fine": {"images": 4, "mask_recall": 0.375, "mIoU_gt": 0.0625},
    }


def option(arguments: list[str], name: str) -> str:
    return arguments[arguments.index(name) + 1]


def test_formats_differ_in_what_they_are_trained_on_and_in_nothing_else(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    calls: list[list[str]] = []

    def command(*given: object) -> None:
        arguments = [str(value) for value in given]
        calls.append(arguments)
        if arguments[0] == "train":
            folder = Path(option(arguments, "--output_dir"))
            folder.mkdir(exist_ok=True)
            if "--seed" in arguments:
                (folder / "adapter_model.safetensors").touch()
                lines = [{"step": step, "mask_iou": step / 100} for step in range(10, 90, 10)] + [
                    {"step": 80, "loss": 1}
                ]
                (folder / "training_log.jsonl").write_text("\n".join(map(json.dumps, lines)))
            else:
                (folder / benchmark.WARMUP).write_text(folder.name)
            return
        folder = Path(option(arguments, "--output"))
        folder.mkdir()
        kind, seed, _ = folder.parent.name.split("-")
        results = {"groups": {benchmark.GROUP: group((0.5 if kind == "uscdf" else 0.25) + int(seed) / 8)}}
        (folder / "results.json").write_text(json.dumps(results))

    def prepare(dataset: str, data_dir: Path, folder: Path, **options: Any) -> None:
        calls.append(["prepare", str(folder), options["answers"]])
        folder.mkdir(parents=True)
        (folder / "README.md").touch()

    class Processor:
        @classmethod
        def from_pretrained(cls, folder: Path, **options: Any) -> "Processor":
            assert options == {"keep_to_grammar": False}
            return cls()

        def save_pretrained(self, folder: Path) -> None:
            calls.append(["free answers", str(folder)])

    monkeypatch.setattr(benchmark, "command", command)
    monkeypatch.setattr(benchmark, "prepare", prepare)
    monkeypatch.setattr(benchmark, "assemble", lambda folder, trained: folder)
    monkeypatch.setattr(benchmark, "MglmmProcessor", Processor)
    monkeypatch.setattr(benchmark, "cider", lambda predictions, data: 1.5)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    given = ["ablation_uscdf.py", "--data-dir", "photos", "--work", str(work), "--seeds", "0", "1"]
    monkeypatch.setattr("sys.argv", given)
    benchmark.main()

    assert ["free answers", str(work / "base")] in calls
    assert [call[1:] for call in calls if call[0] == "prepare"] == [
        [str(work / "uscdf"), "uscdf"],
        [str(work / "plain"), "plain"],
    ]
    trained = [dict(zip(call[2::2], call[3::2], strict=True)) for call in calls if call[0] == "train"]
    warm, runs = trained[:2], trained[2:]
    assert [settings["--mask_warmup.answers"] for settings in warm] == ["uscdf", "plain"]
    assert [settings["--data.path"] for settings in warm] == [str(work / "uscdf")] * 2
    own = [tuple(settings.pop(name) for name in ("--data.path", "--seed", "--output_dir")) for settings in runs]
    order = [("uscdf", 0), ("plain", 0), ("uscdf", 1), ("plain", 1)]
    assert own == [(str(work / kind), str(seed), str(work / f"{kind}-{seed}-240")) for kind, seed in order]
    assert runs == [runs[0]] * 4 and runs[0]["--max_steps"] == "240"
    for kind, seed in order:
        assert (work / f"{kind}-{seed}-240" / benchmark.WARMUP).read_text() == f"{kind}-warmup"
    asked = [call for call in calls if call[0] == "evaluate"]
    assert [option(call, "--data") for call in asked] == [str(work / "uscdf")] * 4

    page = (tmp_path / "docs" / "ablation_uscdf.md").read_text(encoding="utf-8")
    assert "the same for all:\n30 objects, 50 parts, 20 absent things, 10 descriptions;" in page
    assert "| object gIoU | 0.562 ± 0.088 | 0.312 ± 0.088 | +0.250 |" in page  # 0.5, 0.625 and 0.25, 0.375
    assert (
        "| plain | 1 | 0.375 | 0.250 | 0.188 | 0.500 | 0.750 | 0.125 | 0.875 | 0.375 | 0.625 | 0.062 | 1.500 | 0.750 |"
        in page
    )
    assert (tmp_path / "docs" / "images" / "ablation_uscdf.png").stat().st_size > 10_000
    behind = [json.loads(line) for line in (tmp_path / "docs" / "ablation_uscdf.jsonl").read_text().splitlines()]
    assert [(run["kind"], run["seed"]) for run in behind] == order

    calls.clear()
    benchmark.main()  # what is there is not made again
    assert [call[0] for call in calls] == ["free answers"]
    assert (tmp_path / "docs" / "ablation_uscdf.md").read_text(encoding="utf-8") == page

    monkeypatch.setattr("sys.argv", [*given, "--steps", "100", "--limit", "50"])
    benchmark.main()  # other settings, other runs
    assert [option(call, "--max_steps") for call in calls if call[0] == "train"] == ["100"] * 4
    assert [option(call, "--limit") for call in calls if call[0] == "evaluate"] == ["50"] * 4
