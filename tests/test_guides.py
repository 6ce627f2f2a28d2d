"""The guides are true: their blocks run from top to bottom, and every dataset has its line."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from peft import PeftModel
from PIL import Image
from torch.distributed.run import get_args_parser

from mglmm import MglmmForConditionalGeneration, MglmmProcessor
from mglmm.cli import main
from mglmm.datasets_scripts.annotation.config import AnnotationConfig
from mglmm.datasets_scripts.families import BUILDERS
from mglmm.evaluation import caption_scorers, java
from mglmm.evaluation.benchmarks import BENCHMARKS
from mglmm.evaluation.java import JavaError
from mglmm.trainer.config import DataConfig, RunConfig, read_config
from mglmm.trainer.training_args import MglmmTrainingArguments
from tests.chat_server import chat_server
from tests.hub_server import TOKEN, hub_server
from tests.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).resolve().parents[1]
OWN_DATA, DATA, TRAINING, PUBLISHED_WEIGHTS, EVALUATION, ANNOTATION = (
    (ROOT / "docs" / name).read_text(encoding="utf-8")
    for name in ("own_data.md", "data.md", "training.md", "published_weights.md", "evaluation.md", "annotation.md")
)


def push(arguments: list[str], home: Path) -> dict[str, bytes]:
    """Runs a command against an empty hub; the files of the one repository that it makes."""
    with hub_server() as server:
        environment = {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        env = {**os.environ, **environment, "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "mglmm.cli", *arguments]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-5000:]
        ((name, repository),) = server.repositories.items()
    assert name == "datasets/me/hats" and repository.private
    return repository.files


def launched(program: str, arguments: list[str]) -> RunConfig:
    """The run that a launcher is told to start, as its own parser and ours understand the command; nothing is started."""
    if program == "torchrun":
        args = get_args_parser().parse_args(arguments)
    else:
        assert arguments.pop(0) == "launch"
        args = launch_command_parser().parse_args(arguments)
        assert Path(args.config_file).is_file()
    assert args.module and args.training_script == "mglmm.cli"
    verb, config, *overrides = args.training_script_args
    assert verb == "train"
    return read_config(config, overrides)


def run_guide(text: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict, dict[str, bytes]]:
    """
    Runs the blocks in `home`; the names that they define and the files that they push. A block of YAML is written to the
    file that its first line names; what a launcher would start is read only.
    """
    monkeypatch.chdir(home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(home / "cache"))
    names: dict = {}
    pushed: dict[str, bytes] = {}
    for language, block in re.findall(r"```(\w+)\n(.*?)```", text, flags=re.DOTALL):
        if language == "python":
            exec(block, names)
            continue
        if language == "yaml":
            Path(block.splitlines()[0].removeprefix("# ")).write_text(block)
            continue
        assert language == "bash"
        for line in block.strip().splitlines():
            program, *arguments = shlex.split(line)
            if program in ("torchrun", "accelerate"):
                assert launched(program, arguments).model == "checkpoints/mglmm-small"
                continue
            assert program == "mglmm"
            if arguments[0] == "push-dataset":
                pushed = push(arguments, home)
                continue
            monkeypatch.setattr(sys, "argv", [program, *arguments])
            with pytest.raises(SystemExit) as exit_:
                main()
            assert not exit_.value.code, line
    return names, pushed


def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names, pushed = run_guide(OWN_DATA, tmp_path, monkeypatch)
    tagged = [row for row in names["rows"] if row["masks"]]
    assert tagged and all(row["image"].size == (120, 80) for row in tagged)
    assert any("the red hat" in message["content"] for row in tagged for message in row["messages"])
    assert "skipped" not in capsys.readouterr().out
    assert datasets.get_dataset_config_names("my_rows") == ["default", "benchmark", "paraphrases"]
    (row,) = datasets.load_dataset("my_question_rows", split="train").to_list()
    assert (row["task"], len(row["masks"])) == ("reasoning", 2)
    assert "<article" in Path("my_rows.html").read_text(encoding="utf-8")
    assert "license: cc-by-4.0" in pushed["README.md"].decode() and len(pushed) == 5


@pytest.fixture
def coco(tmp_path: Path) -> None:
    """COCO 2017 of one picture a split, in the folder COCO: a dog on the left, and two captions."""
    for number, split in enumerate(("train", "val"), 1):
        name, folder = f"{number:012d}.jpg", tmp_path / "COCO"
        (folder / f"{split}2017").mkdir(parents=True)
        (folder / "annotations").mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (90 * number, 120, 30)).save(folder / f"{split}2017" / name)
        images = [{"id": number, "file_name": name, "height": 40, "width": 60}]
        dog = {
            "id": 1,
            "image_id": number,
            "category_id": 18,
            "segmentation": [[0, 0, 20, 0, 20, 40, 0, 40]],
            "iscrowd": 0,
        }
        texts = ("A dog.", "A dog in a field.")
        captions = [{"id": i, "image_id": number, "caption": text} for i, text in enumerate(texts)]
        instances = {"images": images, "annotations": [dog], "categories": [{"id": 18, "name": "dog"}]}
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(instances))
        content = {"images": images, "annotations": captions}
        (folder / "annotations" / f"captions_{split}2017.json").write_text(json.dumps(content))


@pytest.mark.usefixtures("coco")
def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names, _ = run_guide(DATA, tmp_path, monkeypatch)
    assert names["row"]["source"] in ("coco_instances", "coco_captions") and names["row"]["image"].size == (60, 40)


def test_annotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with chat_server() as server:
        names, _ = run_guide(ANNOTATION.replace("http://localhost:8000/v1", server.url), tmp_path, monkeypatch)
        assert {received.body["model"] for received in server.requests} == {"Qwen/Qwen2.5-VL-7B-Instruct"}
        assert {received.status for received in server.requests} == {200}
    assert len(names["rows"]) == 4 and names["rows"]["task"].count("fine") == 2
    assert "[SEG]" in names["rows"][0]["messages"][1]["content"]
    printed = capsys.readouterr().out
    assert f"requests: about {len(server.requests):,}\n" in printed and "images: 2 done, 0 failed" in printed
    objects = datasets.load_dataset("my_mgsc", "objects", split="train")
    assert sorted(set(objects["label"])) == ["door", "house", "tree", "window"]
    assert "<svg" in Path("run_rules.html").read_text(encoding="utf-8")
    # The settings shown are the defaults, but for the ones that the comments call a choice.
    settings = AnnotationConfig.from_dict(yaml.safe_load(Path("settings.yaml").read_text()))
    shown = replace(settings, merging=replace(settings.merging, no_merge_labels=()))
    assert shown == AnnotationConfig()


@pytest.fixture
def training_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guide on training finds where it starts: the rows of the guide on own data, recipes, and the toy model as small one."""
    run_guide(OWN_DATA.partition("## Check it")[0], tmp_path, monkeypatch)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")

    def assemble(output: Path, trained: bool) -> Path:
        assert trained
        processor = tiny_processor()
        tiny_model(processor).save_pretrained(output)
        processor.save_pretrained(output)
        return output

    monkeypatch.setattr("mglmm.small.checkpoint.assemble", assemble)
    return tmp_path


def test_training(training_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []
    # Training by rewards has tests of its own, and trl takes long to import.
    monkeypatch.setitem(sys.modules, "mglmm.trainer.grpo", SimpleNamespace(main=asked.append))
    names, _ = run_guide(TRAINING, training_home, monkeypatch)
    printed = capsys.readouterr().out

    ((recipe,),) = asked
    assert set(yaml.safe_load(Path(recipe).read_text())["rewards"]) <= set(re.findall(r"`(\w+)`", TRAINING))
    assert isinstance(names["model"], PeftModel) and isinstance(names["processor"], MglmmProcessor)
    merged = MglmmForConditionalGeneration.from_pretrained("checkpoints/hats")
    assert sum(p.numel() for p in merged.parameters()) == sum(
        p.numel() for p in tiny_model(tiny_processor()).parameters()
    )
    assert "bad rows left out" not in printed and printed.count("all is well") == 2
    assert "memory per GPU, zero3 on 4" in printed and "memory per GPU, fsdp2 on 16" in printed
    assert {path.name for path in Path("runs").iterdir()} == {"hats", "mixture", "strict", "features"}

    run = Path("runs/hats")
    log = [json.loads(line) for line in (run / "training_log.jsonl").read_text().splitlines()]
    table = TRAINING[TRAINING.index("## What it prints") : TRAINING.index("A run that was measured")]
    said = {
        name for cell in re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE) for name in re.findall(r"\w+", cell)
    }
    logged = {key for entry in log if "loss" in entry for key in entry}
    assert logged == said | {"step", "ce_loss", "mask_bce_loss", "mask_dice_loss"}
    assert {"eval_loss", "eval_mask_iou", "eval_ce_loss"} <= {key for entry in log for key in entry}
    for file in ("training_curves.png", "adapter_model.safetensors", "processor_config.json", "checkpoint-12"):
        assert (run / file).exists()


def test_what_the_guide_on_training_names_is_there() -> None:
    """Settings, options, recipes and files; a renamed one must be renamed in the guide, too."""
    known = {field.name for kind in (RunConfig, DataConfig, MglmmTrainingArguments) for field in fields(kind)}
    for name in re.findall(r"^- `(\w+)(?:: [\w ]+)?`", TRAINING, flags=re.MULTILINE):
        assert name in known, name
    recipes = ROOT / "trainer" / "recipes"
    table = set(re.findall(r"`(\w+\.yaml)`", TRAINING[TRAINING.index("| recipe |") : TRAINING.index("Copy one")]))
    assert table == {path.name for path in recipes.glob("*.yaml")} - {"mglmm_small_grpo.yaml"}


def test_every_dataset_has_its_line() -> None:
    table = DATA[DATA.index("## The names") : DATA.index('"All kinds"')]
    listed = [
        (name, module)
        for names, module in re.findall(r"^\| (`.*?`) \|.*?\| `(\w+)` \|", table, flags=re.MULTILINE)
        for name in re.findall(r"`(.*?)`", names)
    ]
    assert listed and sorted(listed) == sorted((n, b.__module__.rpartition(".")[2]) for n, b in BUILDERS.items())


@pytest.mark.parametrize(
    ("guide", "lines"), [(OWN_DATA, 150), (DATA, 150), (TRAINING, 265), (EVALUATION, 110), (PUBLISHED_WEIGHTS, 125)]
)
def test_a_guide_is_short_enough_to_be_read(guide: str, lines: int) -> None:
    assert len(guide.splitlines()) <= lines


def test_published_weights(
    shared_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The guide's hub ids are folders here: tiny checkpoints in the same layouts."""
    golden = shared_dir / "golden"
    for name, repository in (("glamm", "MBZUAI/GLaMM-GCG"), ("lisa", "xinlai/LISA-7B-v1")):
        shutil.copytree(golden / name / "ckpt", tmp_path / repository)
        shutil.copytree(golden / name / "openai", tmp_path / "openai", dirs_exist_ok=True)
        (tmp_path / "openai").chmod(0o755)
    Image.open(golden / "images" / "A.png").convert("RGB").save(tmp_path / "photo.jpg")
    names, _ = run_guide(PUBLISHED_WEIGHTS, tmp_path, monkeypatch)
    assert names["answer"].clean_text
    out = capsys.readouterr().out
    assert "glamm-gcg: tensors" in out and "lisa-7b: tensors" in out and "glamm-old: 286 tensors" in out


def test_evaluation(training_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_java() -> str:
        raise JavaError("left out, for its start takes long")

    for module in (java, caption_scorers):
        monkeypatch.setattr(module, "find_java", no_java)
    names, _ = run_guide(EVALUATION, training_home, monkeypatch)
    assert {path.name for path in Path("metrics").iterdir()} == {"held_out", "gallery", "mgsc", "questions", "again"}
    assert names["made"]["numbers"]["clean"]["mIoU_gt"] == names["again"]["numbers"]["clean"]["mIoU_gt"]
    table = EVALUATION[EVALUATION.index("| `--benchmark`") : EVALUATION.index("`--split` chooses")]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    assert {name for cell in cells for name in re.findall(r"`([\w+]+)`", cell)} == set(BENCHMARKS)
