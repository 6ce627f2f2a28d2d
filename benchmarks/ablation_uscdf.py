"""
What the phrases of USCDF are worth (paper, Table 7): the same training with them and without, three seeds each.

```shell
python benchmarks/ablation_uscdf.py --data-dir PHOTOS --work runs/ablation
```

Prepares the photographs in both formats (`mglmm prepare --format uscdf|plain`: the same pictures, questions and masks;
answers that point at something say `Sure, <p> the hat </p> [SEG].` or `Sure, [SEG].`), warms the mask path of the small
model up on phrases in both formats, trains it from there on each with every seed (`trainer/recipes/ablation_uscdf.yaml`),
asks all the same held-out questions, and writes `docs/ablation_uscdf.md` with its plot. A run that was stopped goes on
where it was; one that was scored is kept in `runs.jsonl` of the work folder. About three hours on two CPU cores; `--quick`
takes a few steps and writes into the work folder: it shows that the script works, not what the format is worth.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import datasets
from tables import markdown_table

from mglmm.datasets_scripts.prepare import prepare
from mglmm.evaluation.metrics.captioning import CaptioningScore
from mglmm.processing import MglmmProcessor
from mglmm.small.checkpoint import assemble

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "trainer" / "recipes" / "ablation_uscdf.yaml"
FORMATS = {"uscdf": "USCDF", "plain": "plain"}
GROUP = "fashion+cars"
WARMUP = "mask_warmup.safetensors"
RUNS = "runs.jsonl"
DESCRIPTIONS = ("panoptic", "fine")
# Name: where it stands in the results of a group.
METRICS = {
    "object gIoU": ("object", "gIoU"),
    "object cIoU": ("object", "cIoU"),
    "part gIoU": ("part", "gIoU"),
    "part cIoU": ("part", "cIoU"),
    "absent refused": ("refused",),
    "present refused": ("false_refusals",),
    "panoptic mask recall": ("panoptic", "mask_recall"),
    "fine mask recall": ("fine", "mask_recall"),
    # Mask recall asks for the right phrase, too; these are of the masks alone.
    "panoptic mIoU": ("panoptic", "mIoU_gt"),
    "fine mIoU": ("fine", "mIoU_gt"),
}
CIDER = "CIDEr of the descriptions"
LEARNED = "mask IoU in training"  # mean over the last quarter of the steps
NAMES = (*METRICS, CIDER, LEARNED)


class Run(NamedTuple):
    """
    A trained and evaluated run.

    Attributes:
        kind, seed, steps, limit: Format and settings.
        figures: Of `NAMES`.
        curve: (step, mask IoU of the rows trained on) along its training.
        questions: How many of each kind stand behind the figures.
    """

    kind: str
    seed: int
    steps: int
    limit: int
    figures: dict[str, float]
    curve: list[tuple[int, float]]
    questions: dict[str, int]


def command(*arguments: object) -> None:
    """The command line of this package in a process of its own."""
    subprocess.run([sys.executable, "-m", "mglmm.cli", *map(str, arguments)], check=True)


def train(work: Path, data: Path, folder: Path, *settings: object) -> None:
    """One run of the recipe; from its own mask warm-up if `folder` holds none yet."""
    common = ["--model", work / "base", "--data.path", data, "--output_dir", folder]
    command("train", RECIPE, *common, "--cache_image_features", work / "image_features", *settings)


def warm_up(work: Path, kind: str, *settings: object) -> Path:
    """The mask path after its warm-up in a format. It reads the phrases of the USCDF rows; plain ones have none."""
    folder = work / f"{kind}-warmup"
    if not (folder / WARMUP).is_file():
        train(work, work / "uscdf", folder, "--mask_warmup.answers", kind, "--max_steps", 1, *settings)
    return folder / WARMUP


def cider(predictions: Path, data: Path) -> float:
    """CIDEr of the held-out descriptions, as text without tags, against the one prepared description of each."""
    texts = datasets.load_dataset(str(data), "benchmark", split="validation")["messages"]
    score = CaptioningScore(metrics=["CIDEr"])
    for line in predictions.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["task"] in DESCRIPTIONS:
            score.update(record["row"], record["text"], [texts[record["row"]][-1]["content"]])
    return score.compute()["clean"]["CIDEr"]


def finished_run(work: Path, kind: str, seed: int, steps: int, limit: int) -> Run | None:
    """The run as `runs.jsonl` has it, if it was ever scored."""
    path = work / RUNS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    runs = [Run(**json.loads(line)) for line in lines]
    return next((run for run in runs if run[:4] == (kind, seed, steps, limit)), None)


def score(work: Path, kind: str, seed: int, steps: int, limit: int) -> Run:
    """Asks a trained run the held-out questions, and keeps what came out in `runs.jsonl`."""
    folder, data = work / f"{kind}-{seed}-{steps}", work / "uscdf"
    evaluation = folder / f"evaluation-{limit}"
    command("evaluate", folder, "--data", data, "--output", evaluation, "--limit", limit)
    history = [json.loads(line) for line in (folder / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]
    curve = [(entry["step"], float(entry["mask_iou"])) for entry in history if "mask_iou" in entry]
    group: Any = json.loads((evaluation / "results.json").read_text(encoding="utf-8"))["groups"][GROUP]
    figures = {}
    for name, path in METRICS.items():
        value = group
        for key in path:
            value = value[key]
        figures[name] = float(value)
    figures[CIDER] = cider(evaluation / "predictions.jsonl", data)
    figures[LEARNED] = mean(iou for _, iou in curve[-max(len(curve) // 4, 1) :])
    questions = {
        "objects": group["object"]["questions"],
        "parts": group["part"]["questions"],
        "absent things": group["absent"],
        "descriptions": sum(group[name]["images"] for name in DESCRIPTIONS),
    }
    run = Run(kind, seed, steps, limit, figures, curve, questions)
    with (work / RUNS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(run._asdict()) + "\n")
    return run


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    return f"{mean(values):.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def plot(runs: dict[str, list[Run]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 3.8), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(5, 2))
    for offset, color, (kind, of_format) in zip((-0.18, 0.18), ("C0", "C1"), runs.items(), strict=True):
        for place, name in enumerate(NAMES):
            values = [run.figures[name] for run in of_format]
            bars.bar(place + offset, mean(values), 0.34, color=color, label=FORMATS[kind] if place == 0 else None)
            bars.plot([place + offset] * len(values), values, "k.", markersize=4)
        for run in of_format:
            curves.plot(*zip(*run.curve, strict=True), color=color, linewidth=1)
    bars.set_xticks(range(len(NAMES)), ["\n".join(name.split()) for name in NAMES], fontsize=8)
    bars.set_title("Held-out fashion and car photographs: mean over the seeds (bars), each run (dots)", fontsize=10)
    bars.legend()
    curves.set_title("Mask IoU of the rows trained on", fontsize=10)
    curves.set_xlabel("joint step")
    for axis in (bars, curves):
        axis.grid(axis="y", alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def report(runs: dict[str, list[Run]]) -> str:
    first = runs["uscdf"][0]
    questions = ", ".join(f"{number} {kind}" for kind, number in first.questions.items())
    rows = []
    for name in NAMES:
        values = {kind: [run.figures[name] for run in runs[kind]] for kind in FORMATS}
        gain = mean(values["uscdf"]) - mean(values["plain"])
        rows.append([name, *map(spread, values.values()), f"{gain:+.3f}"])
    each = [
        [FORMATS[kind], str(run.seed), *(f"{run.figures[name]:.3f}" for name in NAMES)]
        for kind in FORMATS
        for run in runs[kind]
    ]
    return f"""# Is USCDF worth it? The paper's ablation on real photographs

The paper's Table 7 compares training with its text format, in which every mask follows the phrase it belongs to, against
answers without phrases. Here the small model was trained both ways on the same photographs, questions and masks, with
{len(runs["uscdf"])} seeds each: {first.steps} joint steps of 4 rows. Referring answers read `Sure, <p> the hat </p> [SEG].` or `Sure, [SEG].`;
descriptions carry phrases in both formats, since the phrases are what they say. Before that the mask path was warmed up in
each format, on `[SEG]` states of the frozen language model that reads each phrase without a picture ("Please segment the
hat.", answered as above). Held-out questions about fashion and cars, the same for all:
{questions}; greedy answers, not kept to the grammar of USCDF.

The mask learning rate, 3e-5 for both, was chosen after a look at the plain format: at 3e-4 (one seed each) its masks emptied
within 120 steps, object gIoU 0.001, while USCDF had 0.731.

How to read it: mask recall asks for the right phrase and an IoU of 0.5, mIoU (over the true masks) for masks alone. In USCDF
the words right before `[SEG]` name its target; without them the language model has to learn to fetch the target from the
question. The mask IoU in training tells whether these steps were enough for that (the rows of a step are of like length,
hence its waves). Where it stays low, the held-out numbers say how slowly a format is learned, and not what it would reach in
the end: the paper trains a larger model for far longer.

{markdown_table(["mean ± standard deviation", *FORMATS.values(), "difference"], rows)}
![Both formats](images/ablation_uscdf.png)

{markdown_table(["run", "seed", *NAMES], each)}
`python benchmarks/ablation_uscdf.py --data-dir PHOTOS --work runs/ablation` repeats it and writes this page. The numbers and
curves of each run: [ablation_uscdf.jsonl](ablation_uscdf.jsonl).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of annotations.json and images/")
    parser.add_argument("--work", type=Path, required=True, help="folder for data, runs and evaluations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=240, help="joint steps of each run")
    parser.add_argument("--limit", type=int, default=200, help="held-out questions")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    options = parser.parse_args()
    work: Path = options.work / "quick" if options.quick else options.work
    docs = work / "docs" if options.quick else ROOT / "docs"
    seeds, limit = (options.seeds[:1], 20) if options.quick else (options.seeds, options.limit)
    steps, pictures = (2, 12) if options.quick else (options.steps, None)
    short = ["--mask_warmup.max_steps", 2] if options.quick else []
    often = ["--logging_steps", 1] if options.quick else []

    base = assemble(work / "base", trained=False)
    # The grammar lets no `[SEG]` through without a phrase: what was learned is to answer alone, in both formats.
    MglmmProcessor.from_pretrained(base, keep_to_grammar=False).save_pretrained(base)
    for kind in FORMATS:
        if not (work / kind / "README.md").is_file():  # the last file that preparing writes
            prepare("photos", options.data_dir, work / kind, images="path", variants=4, answers=kind, limit=pictures)  # type: ignore[arg-type]
    warm = {kind: warm_up(work, kind, *short) for kind in FORMATS}
    runs: dict[str, list[Run]] = {kind: [] for kind in FORMATS}
    for seed in seeds:
        for kind in FORMATS:
            if run := finished_run(work, kind, seed, steps, limit):
                runs[kind].append(run)
                continue
            folder = work / f"{kind}-{seed}-{steps}"
            if not (folder / "adapter_model.safetensors").is_file():
                folder.mkdir(exist_ok=True)
                shutil.copy(warm[kind], folder / WARMUP)
                train(work, work / kind, folder, "--seed", seed, "--max_steps", steps, *often)
            runs[kind].append(score(work, kind, seed, steps, limit))
            print(json.dumps({"format": kind, "seed": seed, **runs[kind][-1].figures}), flush=True)
    docs.mkdir(parents=True, exist_ok=True)
    plot(runs, docs / "images" / "ablation_uscdf.png")
    shutil.copy(work / RUNS, docs / "ablation_uscdf.jsonl")
    (docs / "ablation_uscdf.md").write_text(report(runs), encoding="utf-8")
    print(f"written to {docs / 'ablation_uscdf.md'}")


if __name__ == "__main__":
    main()
