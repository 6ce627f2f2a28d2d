"""Mixtures of USCDF datasets that are read as they come, and go on at the exact next row after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec.asyn
import numpy as np
import torch
from datasets import Image, IterableDataset
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, get_worker_info

from .mixture import BLOCK, CHOICE, decoded, open_dataset, source_of, weight_of

if TYPE_CHECKING:
    from .config import DataConfig

CHOICES = 1000  # drawn at a time


class SourceReader:
    """
    Endless rows of one reader's share of one dataset: a block of rows is read, shuffled and given out, then the next.

    A block and not the rolling buffer of `IterableDataset.shuffle`, whose content no state restores: where a block begins
    and how many of its rows are given out is all that has to be kept, and at most one block is read again (and skipped
    what lies before it in its file).

    Args:
        dataset: The share, pictures still encoded.
        block_size: Rows of a block.
        seed: Of the shuffles; numpy takes it with the pass and the block appended.
        state: Of a reader made with the same arguments; from the beginning if None.
    """

    def __init__(self, dataset: IterableDataset, block_size: int, seed: list[int], state: dict[str, Any] | None = None):
        self.dataset, self.block_size, self.seed = dataset, block_size, seed
        self.state: dict[str, Any] = state or {"pass": 0, "block": 0, "start": None, "given": 0}

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """
        Numbers of rows within a pass over the share, and the rows; `state` is always that after the last one given out.

        Raises `ValueError` if the share is empty.
        """
        while True:
            state = self.state
            self.dataset.set_epoch(state["pass"])  # every pass takes the files in another order
            if state["start"] is not None:
                self.dataset.load_state_dict(state["start"])
            for block in self.dataset.iter(batch_size=self.block_size):
                next_start = self.dataset.state_dict()
                size = len(block["task"])
                order = np.random.default_rng([*self.seed, state["pass"], state["block"]]).permutation(size).tolist()
                for given in range(state["given"], size):
                    self.state = {**state, "given": given + 1}
                    number = order[given]
                    row = {name: values[number] for name, values in block.items()}
                    yield state["block"] * self.block_size + number, row
                state = {**state, "block": state["block"] + 1, "start": next_start, "given": 0}
            if state["block"] == 0:
                raise ValueError("has fewer rows than there are readers")
            self.state = {"pass": state["pass"] + 1, "block": 0, "start": None, "given": 0}


class Stream(torch.utils.data.IterableDataset):
    """
    Endless rows drawn from several datasets by weight; every rank, and every worker of a rank, reads another share.

    Items are those of [`~mglmm.trainer.mixture.Mixture`], except that `index` counts the rows of this reader's share.

    Args:
        datasets: As opened for streaming.
        sources: Their names.
        weights: Shares of the drawn rows, relative to each other.
        seed: Of the draws and shuffles.
        rank, world_size: Of this process.
        buffer_size: Rows of a dataset that a reader holds in memory, encoded, and shuffles.
    """

    def __init__(
        self,
        datasets: list[IterableDataset],
        sources: list[str],
        weights: list[float],
        seed: int,
        rank: int,
        world_size: int,
        buffer_size: int,
    ):
        self.datasets = [dataset.cast_column("image", Image(decode=False)) for dataset in datasets]
        self.sources, self.weights, self.seed = sources, weights, seed
        self.rank, self.world_size, self.buffer_size = rank, world_size, buffer_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        for row, _ in self.read(0, 1) if worker is None else self.read(worker.id, worker.num_workers):
            yield row

    def read(
        self, worker: int, num_workers: int, state: dict[str, Any] | None = None
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """
        Rows of one worker's share, each with the state from which its successor comes first (plain JSON values).

        Raises `ValueError` if a dataset has fewer rows than there are readers.
        """
        share, shares = self.rank * num_workers + worker, self.world_size * num_workers
        drawn, states = (0, [None] * len(self.datasets)) if state is None else (state["drawn"], state["sources"])
        readers = [
            SourceReader(
                split_dataset_by_node(dataset, rank=share, world_size=shares),
                self.buffer_size,
                [self.seed, BLOCK, share, i],
                states[i],
            )
            for i, dataset in enumerate(self.datasets)
        ]
        rows = [iter(reader) for reader in readers]
        probabilities = np.array(self.weights) / sum(self.weights)
        while True:
            rng = np.random.default_rng([self.seed, CHOICE, share, drawn // CHOICES])
            for i in rng.choice(len(rows), CHOICES, p=probabilities)[drawn % CHOICES :].tolist():
                try:
                    index, row = next(rows[i])
                except ValueError as error:
                    raise ValueError(
                        f"{self.sources[i]}, read by {self.world_size} processes x {num_workers} workers: {error}"
                    ) from error
                drawn += 1
                yield (
                    decoded(row, self.sources[i], index),
                    {"drawn": drawn, "sources": [reader.state for reader in readers]},
                )


class StreamLoader:
    """
    Batches of a [`Stream`] for one process, with or without workers, that can be left and taken up again.

    The state travels with the batches: whatever the workers have read ahead, it is that of the last batch handed out. Not
    to be prepared by accelerate, which would split the stream among the processes once more. It has no length: the
    trainer needs `max_steps`, and `ignore_data_skip`, because it is `restore` that skips what was seen.

    Args:
        stream: What to read.
        batch_size: Rows of a batch.
        collate_fn: Of a list of rows.
        num_workers: Processes that read; each reads a share of its own.
        options: Others of [`torch.utils.data.DataLoader`].
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        collate_fn: Callable[[list[dict[str, Any]]], Any],
        num_workers: int = 0,
        **options: Any,
    ):
        self.stream, self.num_workers = stream, num_workers
        self._batches = 0
        self._states: list[dict[str, Any] | None] = [None] * max(1, num_workers)
        self._options = {
            "batch_size": batch_size,
            "collate_fn": _Collator(collate_fn),
            "num_workers": num_workers,
            # its own, or a loader that is made again would draw from torch's and change the dropout that follows
            "generator": torch.Generator().manual_seed(stream.seed),
            **options,
        }

    def __iter__(self) -> Iterator[Any]:
        for batch, worker, state in DataLoader(_Readers(self.stream, self._states, self._batches), **self._options):
            self._states[worker] = state
            self._batches += 1
            yield batch

    def save(self, folder: str | Path) -> None:
        """Writes where to go on after the batches handed out so far, to a file of this rank."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = self._file(folder)
        partial = path.with_suffix(".partial")
        state = {"stream": self._layout(), "batches": self._batches, "workers": self._states}
        with partial.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def restore(self, folder: str | Path) -> None:
        """
        The next iteration begins with the row after the last one that `save` knew of.

        Raises:
            FileNotFoundError: nothing was saved there for this rank.
            ValueError: it is the state of another stream.
        """
        path = self._file(folder)
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} lacks {path.name}: it was not saved by a streaming run on as many processes"
            )
        state = json.loads(path.read_text())
        layout = self._layout()
        changed = [
            f"{key} was {state['stream'][key]}, is {layout[key]}"
            for key in layout
            if state["stream"][key] != layout[key]
        ]
        if changed:
            raise ValueError(
                f"{path} is the state of another stream: {'; '.join(changed)}. Resume with the same settings"
            )
        self._batches, self._states = state["batches"], state["workers"]

    def _file(self, folder: str | Path) -> Path:
        return Path(folder) / f"stream_state_rank{self.stream.rank}.json"

    def _layout(self) -> dict[str, Any]:
        """What must not change between saving and restoring."""
        stream = self.stream
        return {
            "sources": stream.sources,
            "weights": stream.weights,
            "seed": stream.seed,
            "buffer_size": stream.buffer_size,
            "world_size": stream.world_size,
            "num_workers": self.num_workers,
        }


class _Readers(torch.utils.data.IterableDataset):
    """The readers of a loader; which worker is which share goes on where the batches dealt out in turn had come to."""

    def __init__(self, stream: Stream, states: list[dict[str, Any] | None], batches: int):
        self.stream, self.states, self.batches = stream, deepcopy(states), batches

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, dict[str, Any]]]:
        info = get_worker_info()
        worker = 0
        if info is not None:
            fsspec.asyn.reset_lock()  # a forked worker must not wait for a thread that stayed behind
            worker = (info.id + self.batches) % info.num_workers
        for row, state in self.stream.read(worker, len(self.states), self.states[worker]):
            yield row, worker, state


class _Collator:
    def __init__(self, collate_fn: Callable[[list[dict[str, Any]]], Any]):
        self.collate_fn = collate_fn

    def __call__(self, items: list[tuple[dict[str, Any], int, dict[str, Any]]]) -> tuple[Any, int, dict[str, Any]]:
        _, worker, state = items[-1]
        return self.collate_fn([row for row, _, _ in items]), worker, state


def load_stream(
    configs: Sequence[DataConfig], seed: int, rank: int = 0, world_size: int = 1, buffer_size: int = 1000
) -> Stream:
    """
    Opens every dataset of a mixture for streaming. A dataset is read fastest if its number of files is a multiple of
    processes x workers; if it is not, every reader reads all of it and skips the rows of the others.

    Raises:
        ValueError: naming the dataset: it cannot be opened, has no rows or other columns than USCDF; its weight is not
            above zero, or unset while its number of rows is unknown; it has task weights or limits.
    """
    if not configs:
        raise ValueError("the mixture names no dataset")
    datasets, weights = [], []
    for config in configs:
        source = source_of(config)
        if config.task_weights or config.task_limits:
            raise ValueError(
                f"{source}: a stream cannot choose among tasks; leave out task_weights and task_limits, set streaming: false, "
                "or prepare the tasks as datasets of their own"
            )
        dataset = open_dataset(config, streaming=True)
        if next(iter(dataset.select_columns("task")), None) is None:
            raise ValueError(f"{source} has no rows: leave it out of the mixture")
        split = (dataset.info.splits or {}).get(config.split)
        num_rows = 1 if len(configs) == 1 else 0 if split is None else split.num_examples
        if config.weight is None and not num_rows:
            raise ValueError(f"{source} does not say how many rows it has: give it a weight")
        datasets.append(dataset)
        weights.append(weight_of(config, num_rows))
    return Stream(datasets, [source_of(config) for config in configs], weights, seed, rank, world_size, buffer_size)
