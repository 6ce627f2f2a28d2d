"""
Prepare a dataset as Parquet plus a card, so that `datasets.load_dataset` opens it without any code.

The items of a split are cut into shards of a fixed number, so that a shard depends on the options alone: a run that was
killed and is started again keeps the finished ones, and ends in the same bytes.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets.arrow_writer import ParquetWriter
from tqdm import tqdm

from .builder import UscdfBuilder
from .families import BUILDERS
from .features import FEATURES

ROWS_PER_SHARD = 2000  # about: few enough that a killed run loses little, and that embedded images stay below 500 MB
WORK = ".progress"  # in the output folder while it is being written


@dataclass
class Summary:
    """What was written: number of rows and masks by (config, split), and what was left out, by reason."""

    output: Path
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    masks: Counter[tuple[str, str]] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{'config':<12}{'split':<12}{'rows':>10}{'masks':>10}"]
        lines += [
            f"{config:<12}{split:<12}{count:>10,}{self.masks[config, split]:>10,}"
            for (config, split), count in self.rows.items()
        ]
        lines += [f"skipped {count:,} x {reason}" for reason, count in self.skipped.most_common()]
        return "\n".join([*lines, f"written to {self.output}"])


def prepare(
    name: str,
    data_dir: str | Path,
    output: str | Path,
    *,
    images: Literal["embed", "path"] = "embed",
    variants: int = 1,
    seed: int = 0,
    limit: int | None = None,
    num_proc: int | None = None,
    answers: Literal["uscdf", "plain"] = "uscdf",
    augment: int = 0,
) -> Summary:
    """
    Prepare a dataset in its original layout as USCDF Parquet. Started again after a kill, it goes on where it was.

    Args:
        name: Of the dataset family, one of `BUILDERS`.
        data_dir: Folder of the dataset.
        output: Folder to write: one sub-folder of Parquet files per configuration, and `README.md`.
        images: "embed" stores the encoded images in the rows, "path" their absolute paths: small and quick to write, and
            readable on this machine only.
        variants: How often each training image is worded anew, in families that draw their questions.
        seed: Of all choices.
        limit: Use only the first items of each split.
        num_proc: Number of processes, by default one for each core.
        answers: "plain" for the answer style before USCDF.
        augment: How many other views of each training image to add, in families that draw their questions from labelled
            masks. With `images="path"` their pictures lie in `output/augmented`.

    Raises:
        ValueError: the name is unknown, the family cannot be augmented, no item is usable, or `output` was begun with other
            options.
        FileNotFoundError: the data folder lacks the annotations.
        FileExistsError: the output folder holds something else.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(BUILDERS)}")
    BUILDERS[name].check_augment(augment)
    output, data_dir = Path(output), Path(data_dir).resolve()
    if not data_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {data_dir}")
    options = {
        "images": images,
        "variants": variants,
        "seed": seed,
        "limit": limit,
        "answers": answers,
        "augment": augment,
        "augmented_dir": str(output.resolve() / "augmented") if augment and images == "path" else None,
    }
    work = _begin(output, {"name": name, "data_dir": str(data_dir), **options})
    builders = {
        config: BUILDERS[name](cache_dir=str(work), config_name=config, data_dir=str(data_dir), **options)
        for config in BUILDERS[name].builder_configs
    }
    summary = Summary(output)
    with _workers(num_proc) as pool:
        for config, builder in builders.items():
            splits = builder.split_items()
            shards = _shards(output / config, splits, builder.items_per_shard(ROWS_PER_SHARD))
            left = [shard for shard in shards if not shard.done.is_file()]
            total = sum(len(shard.items) for shard in shards)
            with tqdm(
                total=total, initial=total - sum(len(shard.items) for shard in left), desc=config, unit="item"
            ) as bar:
                jobs = {pool.submit(write_shard, builder, shard): shard for shard in left}
                for job in as_completed(jobs):
                    job.result()
                    bar.update(len(jobs[job].items))
            skipped = Counter(builder.skipped)
            for shard in shards:
                report = json.loads(shard.done.read_text())
                summary.rows[config, shard.split] += report["rows"]
                summary.masks[config, shard.split] += report["masks"]
                skipped.update(report["skipped"])
            summary.skipped |= skipped  # the configurations read the same source
    for (config, split), rows in summary.rows.items():
        if rows == 0:
            raise ValueError(f"no usable item in {config} {split} of {data_dir}: {dict(summary.skipped)}")
    _write_card(name, output, summary)
    for leftover in output.glob("*/*.partial"):  # of processes that were killed
        leftover.unlink()
    shutil.rmtree(work)
    return summary


@dataclass(frozen=True)
class Shard:
    path: Path
    split: str
    items: list[Any]

    @property
    def done(self) -> Path:
        """Written last: what the shard holds."""
        return self.path.parent.parent / WORK / f"{self.path.parent.name}-{self.path.stem}.json"


def _shards(folder: Path, splits: dict[str, list[Any]], size: int) -> list[Shard]:
    shards = []
    for split, items in splits.items():
        count = -(-len(items) // size)
        for number in range(count):
            path = folder / f"{split}-{number:05d}-of-{count:05d}.parquet"
            shards.append(Shard(path, split, items[number * size : (number + 1) * size]))
    return shards


def write_shard(builder: UscdfBuilder, shard: Shard) -> None:
    """Rows of the shard's items as Parquet, with a report beside it; either file is whole or not there."""
    shard.path.parent.mkdir(parents=True, exist_ok=True)
    partial = shard.path.with_suffix(f".{os.getpid()}.partial")
    builder.skipped = Counter()
    rows = masks = 0
    embed = builder.config.images == "embed"
    with (
        tempfile.TemporaryDirectory(dir=shard.done.parent) as pictures,
        ParquetWriter(features=FEATURES, path=str(partial), writer_batch_size=1000, embed_local_files=embed) as writer,
    ):
        if embed:  # augmented pictures are needed until they are in the shard
            builder.config.augmented_dir = pictures
        for item in shard.items:
            for row in builder.usable_rows(item):
                writer.write(row)
                rows, masks = rows + 1, masks + len(row["masks"])
        if rows:
            writer.finalize()
    if rows:
        partial.replace(shard.path)
    else:  # every item of it was skipped
        partial.unlink(missing_ok=True)
    report = {"rows": rows, "masks": masks, "skipped": builder.skipped}
    partial.write_text(json.dumps(report, sort_keys=True))
    partial.replace(shard.done)


def _workers(num_proc: int | None) -> ProcessPoolExecutor:
    # Forked where the system can: the workers are plain readers and writers, and spawning would import torch in each.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    return ProcessPoolExecutor(num_proc or os.cpu_count() or 1, mp_context=multiprocessing.get_context(method))


def _begin(output: Path, plan: dict[str, Any]) -> Path:
    """The folder of what is needed to go on; raises if `output` is something else."""
    work, text = output / WORK, json.dumps(plan, indent=1)
    if (work / "plan.json").is_file():
        begun = json.loads((work / "plan.json").read_text())
        differing = [
            f"{key} {begun.get(key)!r} instead of {plan[key]!r}" for key in plan if begun.get(key) != plan[key]
        ]
        if differing:
            raise ValueError(f"{output} was begun with {', '.join(differing)}: use the same options, or delete it")
        return work
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; delete it or choose another output folder")
    work.mkdir(parents=True)
    (work / "plan.partial").write_text(text)
    (work / "plan.partial").replace(work / "plan.json")
    return work


def _write_card(name: str, output: Path, summary: Summary) -> None:
    # Here, when the work is done: cards of models, in the same module, need torch.
    from mglmm.hub_cards.cards import dataset_card

    from .publish import read_contents

    card = dataset_card(
        read_contents(output),
        FEATURES,
        name=name,
        terms=BUILDERS[name].LICENSE,
        repo_id=str(output),
        skipped=dict(summary.skipped.most_common()),
    )
    card.save(output / "README.md")
