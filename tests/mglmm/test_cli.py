"""The command line: help, files written, bad input as one line."""

import copy
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AutoConfig
from transformers.pipelines import PIPELINE_REGISTRY

from mglmm import SegCap
from mglmm.cli import main
from tests.tiny import Tiny, picture

Run = Callable[..., int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `mglmm ARGUMENTS` in this process and gives its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setenv("MGLMM_DEBUG", "")
        monkeypatch.setattr(sys, "argv", ["mglmm", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        return exit_.value.code or 0

    return run


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy checkpoint that answers with nothing but `[SEG]`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = copy.deepcopy(tiny.model)
    model.generation_config.sequence_bias = [[[tiny.processor.seg_token_id], 1000.0]]
    model.save_pretrained(folder)
    processor = copy.deepcopy(tiny.processor)
    processor.keep_to_grammar = False  # which knows no [SEG] without a phrase
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    picture().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def patch(monkeypatch: pytest.MonkeyPatch, module: str, name: str, replacement: Any) -> None:
    monkeypatch.setattr(importlib.import_module(module), name, replacement)


# ------------------------------------------------------------------ start


def test_every_verb_explains_itself(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    verbs = ("segment", "assemble", "prepare", "lint", "push-dataset", "train", "evaluate", "gallery")
    assert run("--help") == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in verbs)
    for verb in verbs:
        assert run(verb, "--help") == 0


def test_import_registers_everything() -> None:
    import mglmm

    assert isinstance(AutoConfig.for_model("mglmm"), mglmm.MglmmConfig)
    assert PIPELINE_REGISTRY.supported_tasks["image-segmentation-captioning"]["impl"] is mglmm.MglmmPipeline


# ------------------------------------------------------------------ segment


def test_segment_prints_a_table_and_writes_three_files(
    run: Run, checkpoint: Path, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out"
    options = ("--model", checkpoint, "--output", out, "--max-new-tokens", 2, "--device", "cpu")
    assert run("segment", photo, "Find <it>", *options) == 0
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if "Find <it>" in line]
    assert [line.split()[0] for line in table] == ["1", "2"]
    assert all(name in printed for name in ("photo-answer.png", "photo-answer.html", "photo-answer.json"))
    assert {path.name for path in out.iterdir()} == {"photo-answer.png", "photo-answer.html", "photo-answer.json"}
    with Image.open(out / "photo-answer.png") as plot:
        assert plot.width >= 60
    assert "Find &lt;it&gt;" in (out / "photo-answer.html").read_text(encoding="utf-8")
    answer = SegCap.from_dict(json.loads((out / "photo-answer.json").read_text(encoding="utf-8")))
    assert [segment.phrase for segment in answer.segments] == ["Find <it>", "Find <it>"]
    assert answer.image_size == (40, 60)


def test_segment_uses_the_small_checkpoint_and_describes_everything_by_default(
    run: Run, checkpoint: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patch(monkeypatch, "mglmm.small.checkpoint", "assemble", lambda: checkpoint)
    monkeypatch.chdir(tmp_path)
    assert run("segment", photo, "--max-new-tokens", 1) == 0
    answer = json.loads((tmp_path / "out" / "photo-answer.json").read_text(encoding="utf-8"))
    assert [segment["phrase"] for segment in answer["segments"]] == [
        "Describe the image and mark everything you mention."
    ]


# ------------------------------------------------------------------ errors


def assert_one_line(captured: str, message: str) -> None:
    (line,) = captured.splitlines()
    assert line.startswith("mglmm: ") and message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["segment", "nowhere.png"], "image 'nowhere.png' cannot be read"),
        (["segment", "empty.png"], "is not a picture that Pillow can read"),
        (["segment", "photo.png", " "], "the instruction is empty"),
        (["segment", "photo.png", "Segment it.", "--target", "dog"], "either text or granularity"),
        (["segment", "photo.png", "--granularity", "object"], "needs the object to segment"),
        (["segment", "photo.png", "--model", "./nowhere"], "there is no folder './nowhere'"),
        (["segment", "photo.png", "--output", "empty.png"], "File exists: 'empty.png'"),
        (["prepare", "paintings", "--data-dir", ".", "--output", "rows"], "unknown dataset 'paintings'"),
        (["prepare", "photos", "--data-dir", ".", "--output", "."], ". is not empty"),
        (["prepare", "photos", "--data-dir", "nowhere", "--output", "rows"], "nowhere"),
        (["train", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_input_is_one_line_and_found_before_a_model_is_loaded(
    run: Run,
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    def assemble() -> Path:
        raise AssertionError("too late")

    patch(monkeypatch, "mglmm.small.checkpoint", "assemble", assemble)
    monkeypatch.chdir(tmp_path)
    Path("empty.png").touch()
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert_one_line(captured.err, message)
    assert captured.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],  # no such verb
        ["segment"],  # no image
        ["segment", "photo.png", "--granularity", "coarse"],
        ["segment", "photo.png", "--max-new-tokens", "0"],
        ["prepare", "photos", "--output", "rows"],  # no --data-dir
    ],
)
def test_wrong_usage_exits_with_2(run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(*arguments) == 2
    captured = capsys.readouterr().err
    assert "Usage: mglmm" in captured and "Traceback" not in captured


@pytest.mark.parametrize("by_option", [True, False])
def test_debug_shows_the_error(monkeypatch: pytest.MonkeyPatch, by_option: bool) -> None:
    monkeypatch.setenv("MGLMM_DEBUG", "" if by_option else "1")
    options = ["--debug"] if by_option else []
    monkeypatch.setattr(sys, "argv", ["mglmm", *options, "segment", "nowhere.png"])
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        main()


def test_a_message_of_many_lines_becomes_one(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def assemble(*args: Any, **kwargs: Any) -> Path:
        raise RuntimeError("pip could not fetch it:\n  see above\n")

    patch(monkeypatch, "mglmm.small.checkpoint", "assemble", assemble)
    assert run("assemble") == 2
    assert capsys.readouterr().err == "mglmm: pip could not fetch it: see above\n"


# ------------------------------------------------------------------ what the other verbs call


def test_assemble(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []

    def assemble(output: Path | None, *, trained: bool) -> Path:
        calls.append((output, trained))
        return Path("folder")

    patch(monkeypatch, "mglmm.small.checkpoint", "assemble", assemble)
    assert run("assemble") == 0
    assert run("assemble", "--output", tmp_path, "--untrained") == 0
    assert calls == [(None, True), (tmp_path, False)]
    assert capsys.readouterr().out == "folder\nfolder\n"


def test_train_passes_settings_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    patch(monkeypatch, "mglmm.trainer.train", "main", calls.append)
    assert run("train", "run.yaml", "--training.max_steps", "10", "--model", "folder") == 0
    assert run("train", "run.yaml", "--strict", "--training.max_steps", "3") == 0
    assert calls == [
        ["run.yaml", "--training.max_steps", "10", "--model", "folder"],
        ["run.yaml", "--training.max_steps", "3", "--strict", "true"],
    ]


def test_plan_says_what_would_train_and_trains_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch(monkeypatch, "mglmm.trainer.train", "main", None)
    recipes = Path(__file__).resolve().parents[2] / "trainer" / "recipes"
    files = ("--config_file", recipes / "accelerate" / "ddp.yaml")
    assert run("train", recipes / "joint.yaml", "--plan", *files, "--training.lora_r", "16") == 0
    printed = capsys.readouterr().out
    assert "memory per GPU, ddp on 16" in printed
    assert "LoRA                           8,388,608" in printed  # twice that of r = 8
    assert run("train", recipes / "joint.yaml", "--plan", "--num_processes", "4", "--strategy", "zero3") == 0
    assert "memory per GPU, zero3 on 4" in capsys.readouterr().out


def test_grpo_and_merge_pass_settings_on(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Any] = []
    patch(monkeypatch, "mglmm.trainer.grpo", "main", calls.append)
    assert run("grpo", "run.yaml", "--training.max_steps", "10") == 0
    patch(monkeypatch, "mglmm.trainer.merging", "merge", lambda *arguments: calls.append(arguments) or arguments[1])
    assert run("merge", "adapter", "plain") == 0
    assert run("merge", "adapter", "plain", "--base", "model") == 0
    assert calls == [
        ["run.yaml", "--training.max_steps", "10"],
        ("adapter", Path("plain"), None),
        ("adapter", Path("plain"), "model"),
    ]
    assert capsys.readouterr().out == "plain\nplain\n"


@pytest.mark.parametrize("sound", [True, False])
def test_doctor_tells_by_its_status(run: Run, monkeypatch: pytest.MonkeyPatch, sound: bool) -> None:
    calls: list[Any] = []

    def run_doctor(model: str, overfit: bool) -> bool:
        calls.append((model, overfit))
        return sound

    patch(monkeypatch, "mglmm.trainer.doctor", "run_doctor", run_doctor)
    assert run("doctor", "model", "--no-overfit") == (0 if sound else 1)
    assert calls == [("model", False)]


def test_prepare_passes_options_on(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    patch(
        monkeypatch, "mglmm.datasets_scripts.prepare", "prepare", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    options = ["--images", "path", "--variants", 3, "--seed", 7, "--limit", 5, "--num-proc", 2, "--format", "plain"]
    options += ["--augment", 1]
    assert run("prepare", "photos", "--data-dir", "raw", "--output", "rows", *options) == 0
    expected = {"images": "path", "variants": 3, "seed": 7, "limit": 5, "num_proc": 2, "answers": "plain"}
    expected["augment"] = 1
    assert calls == [(("photos", Path("raw"), Path("rows")), expected)]


def test_evaluate_prints_the_results(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[Any, ...]] = []
    pushed: list[tuple[Any, ...]] = []
    answers: list[dict[str, Any] | None] = [{"rows": 3}, {"rows": 4}, None]

    def evaluate(*args: Any, **kwargs: Any) -> dict[str, Any] | None:
        calls.append((args, kwargs))
        return answers.pop(0)

    patch(monkeypatch, "mglmm.evaluation.run", "evaluate", evaluate)
    patch(monkeypatch, "mglmm.evaluation.report", "to_markdown", lambda results: f"{results['rows']} rows")
    patch(monkeypatch, "mglmm.evaluation.push", "push_results", lambda *args: pushed.append(args) or "https://card")
    assert run("evaluate", "model", "--data", "rows", "--output", "metrics", "--limit", 3) == 0
    none: dict[str, Any] = {"predictions": None, "text_similarity": None}
    options = {"mode": "both", "limit": 3, "batch_size": 16, "dtype": "float32"} | none
    assert calls == [(("model", "rows", Path("metrics"), "photos", None), options)]
    assert capsys.readouterr().out == "3 rows\n" and not pushed

    more = ["--benchmark", "gcg", "--split", "test", "--mode", "parity", "--predictions", "p.jsonl", "--batch-size", 2]
    more += ["--text-similarity", "exact", "--push", "me/hats", "--dtype", "bfloat16"]
    assert run("evaluate", "--data", "rows", "--output", "metrics", *more) == 0
    expected = {"mode": "parity", "limit": None, "batch_size": 2, "dtype": "bfloat16", "predictions": Path("p.jsonl")}
    assert calls[1] == ((None, "rows", Path("metrics"), "gcg", "test"), expected | {"text_similarity": "exact"})
    assert pushed == [({"rows": 4}, "me/hats")] and capsys.readouterr().out == "4 rows\nhttps://card\n"

    assert run("evaluate", "model", "--data", "rows", "--output", "metrics", "--push", "me/hats") == 0
    assert capsys.readouterr().out == "" and len(pushed) == 1  # a process that is not the main one


# ------------------------------------------------------------------ the demo


def test_demo_answers_six_questions(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch(monkeypatch, "mglmm.small.demo", "MAX_NEW_TOKENS", 1)
    importlib.import_module("mglmm.small.demo").main(model=str(checkpoint), output=tmp_path)
    printed = capsys.readouterr().out
    names = [f"{name}-{topic}" for name in ("astronaut", "hopper") for topic in ("everything", "person")]
    names += ["astronaut-hair", "hopper-hat"]
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{x}.{kind}" for x in names for kind in ("png", "html", "json")
    }
    assert "hopper-hat: Segment the hat." in printed and printed.count("box x1 y1 x2 y2") == 6
    assert str(tmp_path / "astronaut-hair.html") in printed and printed.rstrip().endswith("seconds")
