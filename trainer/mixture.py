"""Mixtures of USCDF datasets, map-style: rows drawn by weight, in an order that seed and epoch alone determine."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, Image, IterableDataset, load_dataset
from datasets.exceptions import DatasetsError
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from mglmm.datasets_scripts.features import FEATURES
from mglmm.processing.images import load_image

if TYPE_CHECKING:
    from .config import DataConfig

OPTIONAL_COLUMNS = ("ignore_mask",)  # younger than the first published datasets
# Second number of every seed, so that no two uses of randomness share a sequence.
ORDER, SHUFFLE, LIMIT, BLOCK, CHOICE = range(5)


@dataclass
class Task:
    """Rows that are drawn alike: those of one task, or of a whole dataset that gives no task weights."""

    name: str
    weight: float
    rows: np.ndarray  # int64, numbers in the mixture


class Mixture(torch.utils.data.Dataset):
    """
    The rows of several datasets one after the other. What is drawn of them is up to [`MixtureSampler`].

    An item is the USCDF row with its picture decoded (RGB, upright), and besides `dataset` (path/name/split) and `index`
    (row number in the dataset as published), which name it in messages. If the picture cannot be read, `image` is None
    and `error` says why.

    Attributes:
        datasets (`list[Dataset]`): The rows of each dataset that can be drawn, with the column `length`.
        sources (`list[str]`): path/name/split of each.
        sizes (`list[int]`): Number of rows of each.
        weights (`list[float]`): Share of each, relative to the others.
        tasks (`list[list[Task]]`): Of each, what is drawn by weight within it.
        lengths (`list[int]`): Characters of the messages, of every row of the mixture.
        epoch (`int`): Whose order the sampler gives.
    """

    def __init__(
        self,
        datasets: list[Dataset],
        sources: list[str],
        indices: list[np.ndarray],
        weights: list[float],
        tasks: list[list[Task]],
        lengths: list[int],
    ):
        self.datasets, self.sources, self.weights, self.tasks, self.lengths = datasets, sources, weights, tasks, lengths
        self.sizes = [len(rows) for rows in datasets]
        self.epoch = 0
        self._indices = indices
        self._encoded = [rows.cast_column("image", Image(decode=False)) for rows in datasets]
        self._ends = list(itertools.accumulate(self.sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> dict[str, Any]:
        part = bisect.bisect_right(self._ends, number)
        position = number - self._ends[part] + self.sizes[part]
        return decoded(self._encoded[part][position], self.sources[part], int(self._indices[part][position]))

    def set_epoch(self, epoch: int) -> None:
        """
        The epoch is kept here and not in the sampler: accelerate's `skip_first_batches` wraps a `BatchSamplerShard` in a
        batch sampler that does not forward `set_epoch`, but then calls it on the dataset. A resumed run with several
        processes would else repeat the order of epoch 0.
        """
        self.epoch = epoch


class MixtureSampler(Sampler[int]):
    """
    Numbers of the rows of one epoch, the same list on every rank: accelerate deals its batches out to the ranks.

    Datasets, and tasks within a dataset, get their exact shares of every epoch (largest remainder), shuffled together. No
    row of a task comes twice, over epochs, before all of them have come. (seed, epoch) alone determine the order.

    Args:
        mixture: What to draw from.
        seed: Of all shuffles.
        rows_per_epoch: By default as many as the mixture has. Rounded up to whole batches.
        batch_size: Rows of one optimizer step, over all ranks and accumulation steps.
        group_by_length: Sort the rows by length within windows of up to 50 batches, as transformers does.

    Raises:
        ValueError: a share comes to less than one row per epoch.
    """

    def __init__(
        self,
        mixture: Mixture,
        seed: int,
        rows_per_epoch: int | None = None,
        batch_size: int = 1,
        group_by_length: bool = False,
    ):
        self.mixture, self.seed = mixture, seed
        self.batch_size, self.group_by_length = batch_size, group_by_length
        wanted = len(mixture) if rows_per_epoch is None else rows_per_epoch
        if wanted <= 0:
            raise ValueError(f"rows_per_epoch is {wanted}: it must be above zero")
        # A part of a batch at the end of an epoch would be filled up differently by different numbers of ranks.
        self.rows_per_epoch = math.ceil(wanted / batch_size) * batch_size
        self.counts: list[list[int]] = []
        for source, count, tasks in zip(
            mixture.sources, apportion(self.rows_per_epoch, mixture.weights), mixture.tasks, strict=True
        ):
            self.counts.append(apportion(count, [task.weight for task in tasks]))
            if 0 in self.counts[-1]:
                name = tasks[self.counts[-1].index(0)].name
                what = f"task {name!r} of {source}" if name else source
                raise ValueError(
                    f"{what} gets none of the {self.rows_per_epoch} rows of an epoch: raise rows_per_epoch or its weight, "
                    "or leave it out"
                )

    def set_epoch(self, epoch: int) -> None:
        self.mixture.set_epoch(epoch)

    def __len__(self) -> int:
        return self.rows_per_epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self.order(self.mixture.epoch))

    def order(self, epoch: int) -> list[int]:
        """The rows of an epoch."""
        drawn = []
        for i, (tasks, counts) in enumerate(zip(self.mixture.tasks, self.counts, strict=True)):
            for j, (task, count) in enumerate(zip(tasks, counts, strict=True)):
                drawn += self._draw(task.rows, epoch * count, count, (i, j))
        rng = np.random.default_rng([self.seed, ORDER, epoch])
        if self.group_by_length:
            generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
            lengths = [self.mixture.lengths[row] for row in drawn]
            order: Sequence[int] = get_length_grouped_indices(lengths, self.batch_size, generator=generator)
        else:
            order = rng.permutation(len(drawn)).tolist()
        return [drawn[position] for position in order]

    def _draw(self, rows: np.ndarray, start: int, count: int, key: tuple[int, int]) -> list[int]:
        """Rows `start` to `start + count` of the endless sequence of shuffles of `rows`."""
        drawn: list[int] = []
        while len(drawn) < count:
            shuffle, offset = divmod(start + len(drawn), len(rows))
            order = np.random.default_rng([self.seed, SHUFFLE, *key, shuffle]).permutation(rows)
            drawn += order[offset : offset + count - len(drawn)].tolist()
        return drawn


def load_mixture(configs: Sequence[DataConfig], seed: int) -> Mixture:
    """
    Opens every dataset of a mixture; pictures are decoded later, row by row.

    Args:
        configs: The datasets. `weight` is by default the number of rows; `task_limits` choose rows by `seed`.

    Raises:
        ValueError: naming the dataset: it cannot be opened, has no rows or other columns than USCDF; a weight or limit is
            not above zero, or names a task without rows.
    """
    if not configs:
        raise ValueError("the mixture names no dataset")
    datasets, indices, weights, tasks = [], [], [], []
    lengths: list[int] = []
    for number, config in enumerate(configs):
        rows = open_dataset(config, streaming=False)
        table = rows.select_columns(["task", "messages"]).with_format("arrow")[:]
        kept, groups = _tasks_of(np.array(table["task"].to_pylist()), config, [seed, LIMIT, number])
        row_lengths = message_lengths(table["messages"])
        rows = rows.add_column("length", row_lengths.tolist())
        first = len(lengths)
        for group in groups:
            group.rows = first + np.searchsorted(kept, group.rows)
        datasets.append(rows.select(kept) if len(kept) < len(rows) else rows)
        indices.append(kept)
        weights.append(weight_of(config, len(kept)))
        tasks.append(groups)
        lengths += row_lengths[kept].tolist()
    return Mixture(datasets, [source_of(config) for config in configs], indices, weights, tasks, lengths)


def _tasks_of(tasks: np.ndarray, config: DataConfig, seed: list[int]) -> tuple[np.ndarray, list[Task]]:
    """Numbers of the rows that may be drawn, ascending, and the tasks they are drawn by."""
    source, present = source_of(config), ", ".join(sorted(set(tasks.tolist())))
    for setting, values in (("task_weights", config.task_weights), ("task_limits", config.task_limits)):
        for name, value in values.items():
            count = int((tasks == name).sum())
            if count == 0 or not value > 0:
                raise ValueError(
                    f"{source}: task {name!r} has {count} rows and {value} in {setting}; drop it from {setting} (its tasks: "
                    f"{present})"
                )
    allowed = np.isin(tasks, list(config.task_weights)) if config.task_weights else np.ones(len(tasks), dtype=bool)
    for i, (name, limit) in enumerate(config.task_limits.items()):
        rows = np.flatnonzero(tasks == name)
        allowed[np.random.default_rng([*seed, i]).permutation(rows)[limit:]] = False
    kept = np.flatnonzero(allowed)
    if not config.task_weights:
        return kept, [Task("", 1.0, kept)]
    return kept, [Task(name, value, kept[tasks[kept] == name]) for name, value in config.task_weights.items()]


def source_of(config: DataConfig) -> str:
    return f"{config.path}/{config.name or 'default'}/{config.split}"


def weight_of(config: DataConfig, num_rows: int) -> float:
    """The dataset's weight, by default its number of rows. Raises `ValueError` if it is not above zero."""
    weight = num_rows if config.weight is None else config.weight
    if not 0 < weight < math.inf:
        raise ValueError(
            f"{source_of(config)} has weight {weight}: give it one above zero or leave it out of the mixture"
        )
    return float(weight)


def open_dataset(config: DataConfig, streaming: bool) -> Any:
    """
    The USCDF columns of a dataset, an [`IterableDataset`] if `streaming`; other columns are left away.

    Raises:
        ValueError: there is no such dataset, configuration or split, it has no rows (noticed here unless `streaming`), or
            its columns are not those of USCDF.
    """
    source = source_of(config)
    try:
        dataset: Dataset | IterableDataset = load_dataset(
            config.path, config.name, split=config.split, streaming=streaming
        )
    except (OSError, ValueError, DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{source} cannot be opened: {reason} (check its path, name and split, and that it has rows)"
        ) from error
    features = dataset.features or {}
    wrong = [
        f"{name} ({'missing' if name not in features else 'of another type'})"
        for name, feature in FEATURES.items()
        if features.get(name) != feature and not (name in OPTIONAL_COLUMNS and name not in features)
    ]
    if wrong:
        raise ValueError(
            f"{source} is not a USCDF dataset, its columns differ: {', '.join(wrong)}. Prepare it with `mglmm prepare`, or "
            "cast it to mglmm.datasets_scripts.features.FEATURES"
        )
    return dataset.select_columns([name for name in FEATURES if name in features])


def decoded(row: dict[str, Any], source: str, index: int) -> dict[str, Any]:
    """A row whose picture is still encoded, as an item of [`Mixture`]."""
    row = {**dict.fromkeys(OPTIONAL_COLUMNS), **row, "dataset": source, "index": index}
    encoded = row["image"]
    if encoded is not None:
        try:
            row["image"] = load_image(encoded["path"] if encoded["bytes"] is None else encoded["bytes"])
        except ValueError as error:
            row |= {"image": None, "error": str(error)}
    return row


def message_lengths(messages: pa.ChunkedArray) -> np.ndarray:
    """Characters of the messages of each row, int64; in Arrow, because a mixture may have millions of rows."""
    lengths = [np.zeros(0, dtype=np.int64)]
    for chunk in messages.chunks:
        counts = pc.fill_null(chunk.value_lengths(), 0).to_numpy(zero_copy_only=False)
        characters = pc.fill_null(pc.utf8_length(pc.struct_field(chunk.flatten(), "content")), 0)
        rows = np.repeat(np.arange(len(chunk)), counts)
        sums = np.bincount(rows, weights=characters.to_numpy(zero_copy_only=False), minlength=len(chunk))
        lengths.append(sums.astype(np.int64))
    return np.concatenate(lengths)


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """
    Whole shares of `count` in proportion to `weights`, by largest remainder; the first of equal remainders wins.

    >>> apportion(10, [2, 1])
    [7, 3]
    """
    exact = np.array(weights, dtype=np.float64) * count / sum(weights)
    shares = np.floor(exact).astype(int)
    # Rounded, so that two thirds of six do not lose a row to the last bit.
    by_remainder = np.argsort(-(exact - shares).round(9), kind="stable")
    shares[by_remainder[: count - shares.sum()]] += 1
    return shares.tolist()
