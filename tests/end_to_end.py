"""
`make e2e`: the whole way of a model in real processes, on a CPU, through the command line.

Drawn pictures become rows, two processes train the toy model, are killed, go on, and must end with the weights of a run
that was never killed; the adapter is merged, examined, measured, pushed to a hub on loopback, and answers a question in a
process that knows nothing but its hub id. Exit status 1 at the first thing that is not as it should be.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from transformers.utils.logging import disable_progress_bar

from mglmm.processing.rle import encode_mask
from mglmm.trainer.checkpoints import last_checkpoint
from tests.hub_server import TOKEN, hub_server
from tests.tiny import tiny_model, tiny_processor

ROOT = Path(__file__).resolve().parents[1]
PROCESSES, STEPS, SAVE_STEPS, KILL_AFTER = 2, 36, 3, 8
HEIGHT, WIDTH = 40, 60
THINGS = {"hat": (220, 40, 40), "dog": (120, 70, 20), "car": (40, 60, 200), "boat": (240, 240, 60)}
PARTS = {"dog": "head", "car": "wheel", "boat": "sail"}
MGLMM = [sys.executable, "-m", "mglmm.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
TRAIN = [*TORCHRUN, "-m", "mglmm.cli", "train"]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",  # two processes would else fight for the cores, and sums would depend on their number
    "PYTHONUNBUFFERED": "1",  # so that the output says at once how far a run is
    "TOKENIZERS_PARALLELISM": "false",
}
PUSH = """
import sys, mglmm
model = mglmm.MglmmForConditionalGeneration.from_pretrained(sys.argv[1])
model.push_to_hub("me/toy", processor=mglmm.MglmmProcessor.from_pretrained(sys.argv[1]))
"""
ASK = """
import json, sys, mglmm
from transformers import pipeline
picture, question, *models = sys.argv[1:]
pipes = [pipeline("image-segmentation-captioning", model=model) for model in models]
print(json.dumps([pipe(picture, question, max_new_tokens=48).to_dict() for pipe in pipes]))
"""
START = time.perf_counter()


class Failure(Exception):
    """What is not as it should be."""


def check(ok: bool, otherwise: str) -> None:
    if not ok:
        raise Failure(otherwise)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Says what is being done, then how long it took."""
    since = time.perf_counter()
    print(f"[{since - START:5.1f} s] {title}", flush=True)
    yield
    print(f"          done in {time.perf_counter() - since:.1f} s", flush=True)


def note(text: str) -> None:
    print(f"          {text}", flush=True)


class Commands:
    """Runs commands in `home`, the caches of Hugging Face libraries included."""

    def __init__(self, home: Path):
        self.home = home
        self.environment = {**os.environ, **ENVIRONMENT, "HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}

    def start(self, command: list[str], log: Path, **environment: str) -> subprocess.Popen[str]:
        """The command as a process whose standard output is read here, and whose errors go to `log`."""
        with log.open("w") as errors:
            return subprocess.Popen(
                command,
                cwd=self.home,
                env=self.environment | environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def run(self, *command: str, **environment: str) -> str:
        """Standard output of a command that must succeed."""
        log = self.home / "errors.log"
        process = self.start(list(command), log, **environment)
        output, _ = process.communicate()
        check(process.returncode == 0, f"exit status {process.returncode} of {command}:\n{output}\n{log.read_text()}")
        return output


# ---------------------------------------------------------------------- what the run is made of


def draw_photographs(folder: Path, train: int, validation: int) -> Path:
    """Pictures of two of `THINGS` with their `PARTS`, and masks in the layout that `mglmm prepare photos` reads."""
    rng = random.Random(0)
    (folder / "images").mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(train + validation):
        pixels = np.full((HEIGHT, WIDTH, 3), rng.randrange(120, 200), dtype=np.uint8)
        name = f"{number}.png"
        for column, thing in enumerate(rng.sample(list(THINGS), 2)):
            left, top = 30 * column + rng.randrange(2, 8), rng.randrange(2, 14)
            box = (left, top, left + rng.randrange(14, 20), top + rng.randrange(14, 22))
            whole = _annotate(annotations, pixels, number, thing, box, THINGS[thing])
            if thing in PARTS:
                part = (left + 2, box[3] - 6, left + 8, box[3])
                _annotate(annotations, pixels, number, PARTS[thing], part, (10, 10, 10), whole)
        Image.fromarray(pixels).save(folder / "images" / name)
        split = "train" if number < train else "val"
        size = {"width": WIDTH, "height": HEIGHT}
        images.append({"id": number, "file_name": name, "source": "drawn", "split": split, **size})
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


def _annotate(
    annotations: list[dict[str, Any]],
    pixels: np.ndarray,
    image: int,
    label: str,
    box: tuple[int, int, int, int],
    colour: tuple[int, int, int],
    parent: int | None = None,
) -> int:
    left, top, right, bottom = box
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[top:bottom, left:right] = True
    pixels[mask] = colour
    level = "object" if parent is None else "part"
    entry = {"id": len(annotations), "image_id": image, "label": label, "level": level, "parent_id": parent}
    annotations.append({**entry, "segmentation": encode_mask(mask)})
    return entry["id"]


def write_run(path: Path, model: Path, rows: Path) -> None:
    values = {
        "model": str(model),
        "data": {"path": str(rows), "task_weights": {"referring": 4, "absent": 1, "panoptic": 1, "fine": 1}},
        "rows_per_epoch": 28,  # of 4 a step, so that the run goes over several epochs
        "eval_data": {"path": str(rows), "split": "validation"},
        "training": {
            "output_dir": "runs/killed",
            "max_steps": STEPS,
            "save_steps": SAVE_STEPS,
            "eval_strategy": "steps",
            "eval_steps": 12,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.005,
            "lora_dropout": 0.1,  # random numbers in every step, which must go on where they were
            "mask_size": 64,
            "strict": True,
            "use_cpu": True,
            "disable_tqdm": True,
        },
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))


# ---------------------------------------------------------------------- training


def losses_of(output: str) -> int:
    """How many optimizer steps a run has printed."""
    return output.count("'mask_dice_loss'")


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL for a process and all it started: torchrun's workers are in sessions of their own."""
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        os.kill(one.pid, signal.SIGKILL)
    process.communicate()


def train_and_kill(commands: Commands, config: Path) -> int:
    """Kills a run after `KILL_AFTER` steps; the step of its last complete checkpoint."""
    log = commands.home / "killed.log"
    process = commands.start([*TRAIN, str(config)], log)
    output = ""
    assert process.stdout is not None
    for line in process.stdout:
        output += line
        if losses_of(output) == KILL_AFTER:
            break
    check(losses_of(output) == KILL_AFTER, f"the run ended by itself:\n{output}\n{log.read_text()}")
    kill(process)
    check(f"processes: {PROCESSES}" in output, f"not the wanted number of processes:\n{output}")
    run = commands.home / "runs" / "killed"
    check(not (run / "adapter_model.safetensors").exists(), "the run had ended before it was killed")
    checkpoint = last_checkpoint(run)
    check(checkpoint is not None, f"no checkpoint after {KILL_AFTER} steps, though one every {SAVE_STEPS}")
    return int(str(checkpoint).rpartition("-")[2])


def main(home: Path) -> None:
    commands = Commands(home)
    base, rows, config = home / "base", home / "rows", home / "run.yaml"
    with step("toy model, and rows from drawn pictures (mglmm prepare, lint)"):
        disable_progress_bar()
        processor = tiny_processor()
        tiny_model(processor).save_pretrained(base)
        processor.save_pretrained(base)
        photographs = draw_photographs(home / "photographs", train=10, validation=4)
        prepare = ["--data-dir", str(photographs), "--output", str(rows), "--variants", "3", "--num-proc", "2"]
        commands.run(*MGLMM, "prepare", "photos", *prepare)
        commands.run(*MGLMM, "lint", str(rows), "--model", str(base))
        write_run(config, base, rows)

    with step(f"training in {PROCESSES} processes (mglmm train), killed after {KILL_AFTER} of {STEPS} steps"):
        checkpoint = train_and_kill(commands, config)
        note(f"its last whole checkpoint is that of step {checkpoint}")

    with step("the same command again"):
        output = commands.run(*TRAIN, str(config))
        done = losses_of(output)
        check(done == STEPS - checkpoint, f"{done} steps in place of {STEPS - checkpoint}:\n{output}")
        log = [json.loads(line) for line in (home / "runs/killed/training_log.jsonl").read_text().splitlines()]
        steps = [entry["step"] for entry in log if "loss" in entry]
        check(steps == list(range(1, STEPS + 1)), f"the log has steps {steps}")
        held_out = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        check(held_out[-1] < held_out[0], f"the held-out loss does not fall: {held_out}")
        note(f"it did the other {done}; held-out loss {' -> '.join(f'{loss:.3f}' for loss in held_out)}")

    with step("the same run, never killed"):
        commands.run(*TRAIN, str(config), "--training.output_dir", "runs/straight")
        killed, straight = (
            load_file(home / "runs" / name / "adapter_model.safetensors") for name in ("killed", "straight")
        )
        check(killed.keys() == straight.keys(), "the two runs trained different weights")
        different = [name for name in straight if not torch.equal(killed[name], straight[name])]
        check(not different, f"{len(different)} of {len(straight)} weights differ, such as {different[:3]}")
        note(f"all {len(straight)} weights are equal, bit by bit")

    merged = home / "merged"
    with step("adapter into a plain checkpoint (mglmm merge), examined (mglmm doctor)"):
        commands.run(*MGLMM, "merge", "runs/killed", str(merged))
        note(commands.run(*MGLMM, "doctor", str(merged), "--no-overfit").splitlines()[-1])

    with step("held-out questions (mglmm evaluate)"):
        commands.run(*MGLMM, "evaluate", str(merged), "--data", str(rows), "--output", "metrics", "--limit", "16")
        results = json.loads((home / "metrics" / "results.json").read_text())
        scores = results["groups"]["all"]
        check(results["rows_answered"] == 16, f"{results['rows_answered']} answers to 16 questions")
        note(f"object gIoU {scores['object']['gIoU']:.3f}, well-formed answers {scores['well_formed']:.0%}")

    with step("pushed to a hub on loopback, and asked there by a fresh process"), hub_server() as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        commands.run(sys.executable, "-c", PUSH, str(merged), **online)
        picture, question = photographs / "images" / "13.png", "Segment the car."
        asked = commands.run(sys.executable, "-c", ASK, str(picture), question, "me/toy", str(merged), **online)
        answers = json.loads(asked.splitlines()[-1])
        check(answers[0] == answers[1], f"the pushed model answers otherwise than the folder: {answers}")
        note(f"{question} -> {answers[0]['text']}")


if __name__ == "__main__":
    scratch = Path(tempfile.mkdtemp(prefix="mglmm-e2e-"))
    print(f"in {scratch}", flush=True)
    try:
        main(scratch)
    except Failure as failure:
        sys.exit(f"make e2e failed after {time.perf_counter() - START:.0f} s, see {scratch}: {failure}")
    shutil.rmtree(scratch)
    print(f"all is well, in {time.perf_counter() - START:.0f} s")
