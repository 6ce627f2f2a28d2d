"""Prepare a dataset as Parquet plus a card, so that `datasets.load_dataset` opens it without any code."""

import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import datasets
import pyarrow.compute as pc
import pyarrow.parquet as pq
from huggingface_hub import DatasetCard, DatasetCardData

from mglmm.datasets_scripts.hierarchical_coco import HierarchicalCoco

BUILDERS: dict[str, type[datasets.GeneratorBasedBuilder]] = {"photos": HierarchicalCoco}


@dataclass
class Summary:
    """What was written: number of rows and masks by (config, split), and what was left out, by reason."""

    output: Path
    rows: dict[tuple[str, str], int] = field(default_factory=dict)
    masks: dict[tuple[str, str], int] = field(default_factory=dict)
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
    num_proc: int = 1,
) -> Summary:
    """Prepare a dataset in its original layout as USCDF Parquet.

    Args:
        name: Name of the dataset family: "photos".
        data_dir: Folder of the dataset.
        output: Folder to write: one sub-folder of Parquet files per configuration, and `README.md`.
        images: "embed" stores the encoded images in the rows, "path" their absolute paths: small and quick to write, and
            readable on this machine only.
        variants: How often each training image is worded anew.
        seed: Seed of all choices.
        limit: Use only the first images of each split.
        num_proc: Number of processes.

    Raises:
        ValueError: the name is unknown or no image is usable.
        FileNotFoundError: the data folder has no annotations.
        FileExistsError: the output folder is not empty.
    """
    if name not in BUILDERS:
        raise ValueError(f"unknown dataset {name!r}; known: {', '.join(BUILDERS)}")
    output = Path(output)
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty; delete it or choose another output folder")
    summary = Summary(output)
    card_configs = []
    with tempfile.TemporaryDirectory() as cache_dir:
        for config in BUILDERS[name].builder_configs:
            builder = BUILDERS[name](
                cache_dir=cache_dir,
                config_name=config,
                data_dir=str(Path(data_dir).resolve()),
                images=images,
                variants=variants,
                seed=seed,
                limit=limit,
            )
            folder = output / config
            if images == "embed":
                builder.download_and_prepare(
                    str(folder), file_format="parquet", num_proc=num_proc, max_shard_size="500MB"
                )
            else:
                _write_paths(builder, folder, num_proc)
            data_files = []
            for split in builder.info.splits:
                pattern = f"{builder.name}-{split}*.parquet"
                masks = [pq.read_table(file, columns=["masks"])["masks"] for file in sorted(folder.glob(pattern))]
                summary.rows[config, split] = sum(map(len, masks))
                summary.masks[config, split] = sum(pc.sum(pc.list_value_length(column)).as_py() for column in masks)
                data_files.append({"split": str(split), "path": f"{config}/{pattern}"})
            summary.skipped = builder.skipped
            card_configs.append({"config_name": config, "data_files": data_files, "default": config == "default"})
    _write_card(name, output, card_configs, summary)
    return summary


def _write_paths(builder: datasets.GeneratorBasedBuilder, folder: Path, num_proc: int) -> None:
    # A builder's own Parquet writer embeds every image it has a path of; that of a finished dataset leaves them out.
    builder.download_and_prepare(num_proc=num_proc)
    folder.mkdir(parents=True)
    for split in builder.info.splits:
        rows = builder.as_dataset(split)
        rows.to_parquet(folder / f"{builder.name}-{split}-00000-of-00001.parquet", batch_size=1000)


def _write_card(name: str, output: Path, configs: list[dict], summary: Summary) -> None:
    data = DatasetCardData(configs=configs, tags=["uscdf", "image-segmentation-captioning"], pretty_name=name)
    output.mkdir(parents=True, exist_ok=True)
    card = DatasetCard(f"---\n{data.to_yaml()}\n---\n\n# {name}: USCDF rows\n\n```\n{summary}\n```\n")
    card.save(output / "README.md")
