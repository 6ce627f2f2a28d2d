"""Mixtures as streams: shares by weight, a slice for every reader, and the exact next row after a kill."""

import itertools
import json
import runpy
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest

from mglmm.datasets_scripts.features import FEATURES
from mglmm.trainer.config import DataConfig
from mglmm.trainer.mixture_stream import StreamLoader, load_stream
from tests.trainer.conftest import uscdf_row


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_dataset(folder: Path, num_rows: int, files: int = 1) -> str:
    """Rows whose `image_id` is folder name and number, in several files; without pictures, which the tests do not read."""
    folder.mkdir()
    row = {**uscdf_row(0, "referring", ("the hat",)), "image": None}
    rows = [{**row, "image_id": f"{folder.name}{i}"} for i in range(num_rows)]
    columns = {name: [row[name] for row in rows] for name in FEATURES}  # `from_list` does not take an empty one
    whole = datasets.Dataset.from_dict(columns, features=FEATURES)
    for i in range(files):
        shard = whole.shard(files, i, contiguous=True)
        shard.to_parquet(folder / f"train-{i:05d}-of-{files:05d}.parquet")
    return str(folder)


def ids(rows: Any) -> list[str]:
    return [row["image_id"] for row in rows]


@pytest.fixture
def two(tmp_path: Path) -> list[DataConfig]:
    """40 rows in one file, 12 in two."""
    first, second = make_dataset(tmp_path / "a", 40), make_dataset(tmp_path / "b", 12, files=2)
    return [DataConfig(first, weight=3), DataConfig(second, weight=1)]


def test_stream_repeats_and_shuffles_by_seed(tmp_path: Path):
    config = [DataConfig(make_dataset(tmp_path / "a", 12, files=3))]
    first = ids(itertools.islice(load_stream(config, seed=0, buffer_size=5), 36))
    for start in (0, 12, 24):  # each pass has every row once, in another order
        assert sorted(first[start : start + 12]) == sorted(f"a{i}" for i in range(12))
    assert first[:12] != first[12:24] != first[24:]
    assert ids(itertools.islice(load_stream(config, seed=0, buffer_size=5), 36)) == first
    assert ids(itertools.islice(load_stream(config, seed=1, buffer_size=5), 36)) != first


def test_items_are_rows_that_name_their_dataset(tmp_path: Path):
    path = make_dataset(tmp_path / "a", 4)
    rows = list(itertools.islice(load_stream([DataConfig(path)], seed=0), 4))
    assert {row["dataset"] for row in rows} == {f"{path}/default/train"}
    assert [f"a{row['index']}" for row in rows] == ids(rows)
    assert set(rows[0]) == {*FEATURES, "dataset", "index"}


def test_weights_are_shares_of_the_drawn_rows(two: list[DataConfig]):
    drawn = ids(itertools.islice(load_stream(two, seed=0), 1000))
    share = Counter(name[0] for name in drawn)["a"] / 1000
    assert share == pytest.approx(0.75, abs=0.04)  # 3 standard deviations


@pytest.mark.parametrize(
    "files, world_size",
    [
        (4, 2),  # each rank reads its own files
        (1, 3),  # each rank reads every third row
        (2, 3),
    ],
)
def test_every_rank_reads_another_slice(tmp_path: Path, files: int, world_size: int):
    config = [DataConfig(make_dataset(tmp_path / "a", 12, files))]
    size = 12 // world_size
    streams = [load_stream(config, 0, rank, world_size, buffer_size=4) for rank in range(world_size)]
    slices = [ids(itertools.islice(stream, 2 * size)) for stream in streams]
    for start in (0, size):  # in every pass, though files are shuffled between passes
        union = [name for rows in slices for name in rows[start : start + size]]
        assert sorted(union) == sorted(f"a{i}" for i in range(12))


def loader_of(configs: list[DataConfig], num_workers: int, rank: int = 0, world_size: int = 1) -> StreamLoader:
    stream = load_stream(configs, seed=0, rank=rank, world_size=world_size, buffer_size=5)
    return StreamLoader(stream, 2, ids, num_workers)


@pytest.mark.parametrize("seen", [0, 1, 7, 30])  # nothing, within a block, in a later one, after several passes
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_restored_loader_goes_on_at_the_next_row(
    tmp_path: Path, two: list[DataConfig], seen: int, rank: int, world_size: int
):
    batches = list(itertools.islice(loader_of(two, 0, rank, world_size), seen + 20))
    loader = loader_of(two, 0, rank, world_size)
    assert list(itertools.islice(loader, seen)) == batches[:seen]
    loader.save(tmp_path / "checkpoint")
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == [f"stream_state_rank{rank}.json"]
    restored = loader_of(two, 0, rank, world_size)
    restored.restore(tmp_path / "checkpoint")
    assert list(itertools.islice(restored, 20)) == batches[seen:]


def test_restored_loader_with_workers_goes_on_at_the_next_row(tmp_path: Path, two: list[DataConfig]):
    """What the workers read ahead is not lost, and the worker whose turn it was is the first."""
    batches = list(itertools.islice(loader_of(two, 2), 16))
    loader = loader_of(two, 2)
    assert list(itertools.islice(loader, 7)) == batches[:7]
    loader.save(tmp_path)
    restored = loader_of(two, 2)
    restored.restore(tmp_path)
    assert list(itertools.islice(restored, 4)) == batches[7:11]
    restored.save(tmp_path)  # a state that was restored itself
    restored.restore(tmp_path)
    assert list(itertools.islice(restored, 5)) == batches[11:]
    # the two workers read different rows
    ranks = [set(sum(batches[worker::2], [])) for worker in (0, 1)]
    assert not ranks[0] & ranks[1]


def test_state_is_a_place_in_the_files(tmp_path: Path):
    """Resuming must not read from the beginning: 72 rows on, in files of two, it begins in file 31 or later."""
    config = [DataConfig(make_dataset(tmp_path / "a", 80, files=40))]
    *_, (_, state) = itertools.islice(load_stream(config, seed=0, buffer_size=5).read(0, 1), 72)
    (source,) = json.loads(json.dumps(state))["sources"]
    assert (source["pass"], source["block"], source["given"]) == (0, 14, 2)
    assert source["start"]["examples_iterable"]["previous_state"]["shard_idx"] >= 30


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_workers": 2}, "num_workers was 0, is 2. Resume with the same settings"),
        ({"world_size": 2}, "world_size was 1, is 2"),
        ({"configs": 1}, "sources was .*, is .*; weights was"),
    ],
)
def test_state_of_another_stream_is_refused(
    tmp_path: Path, two: list[DataConfig], changes: dict[str, int], message: str
):
    loader_of(two, 0).save(tmp_path)
    other = loader_of(two[: changes.pop("configs", 2)], **{"num_workers": 0, **changes})
    with pytest.raises(ValueError, match=message):
        other.restore(tmp_path)


def test_missing_state_is_refused(tmp_path: Path, two: list[DataConfig]):
    with pytest.raises(FileNotFoundError, match="lacks stream_state_rank0.json: it was not saved by a streaming run"):
        loader_of(two, 0).restore(tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": "missing"}, "missing/default/train cannot be opened: .*check its path, name and split"),
        ({"split": "validation"}, "/validation cannot be opened: .*validation"),
        ({"weight": 0}, "has weight 0: give it one above zero"),
        (
            {"task_weights": {"referring": 1}},
            "a stream cannot choose among tasks; leave out .* or set streaming|streaming: f",
        ),
        ({"task_limits": {"referring": 1}}, "a stream cannot choose among tasks"),
    ],
)
def test_bad_settings_stop_with_one_line(tmp_path: Path, changes: dict[str, Any], message: str):
    path = make_dataset(tmp_path / "a", 3)
    with pytest.raises(ValueError, match=message) as error:
        load_stream([DataConfig(**{"path": path, **changes})], seed=0)
    assert "\n" not in str(error.value)


def test_empty_dataset_unknown_size_and_too_many_readers_are_refused(tmp_path: Path, two: list[DataConfig]):
    with pytest.raises(ValueError, match="has no rows: leave it out"):
        load_stream([DataConfig(make_dataset(tmp_path / "empty", 0))], seed=0)
    two[1].weight = None
    with pytest.raises(ValueError, match="b/default/train does not say how many rows it has: give it a weight"):
        load_stream(two, seed=0)
    stream = load_stream([DataConfig(make_dataset(tmp_path / "c", 3))], seed=0, rank=3, world_size=4)
    with pytest.raises(ValueError, match="read by 4 processes x 1 workers: has fewer rows than there are readers"):
        next(iter(stream))


# A trainer on a stream that notes the rows of each step, and is killed in the middle of one.
TRAINER = """
import json, os, signal, sys
import torch
from transformers import Trainer, TrainingArguments
from mglmm.trainer.config import DataConfig
from mglmm.trainer.mixture_stream import StreamLoader, load_stream

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
    def forward(self, rows):
        return {"loss": self.weight * len(rows)}

class NotingTrainer(Trainer):
    def get_train_dataloader(self):
        self.loader = StreamLoader(self.train_dataset, 2, lambda rows: {"rows": [row["image_id"] for row in rows]}, 2)
        return self.loader
    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        self.loader.save(output_dir)
    def _load_rng_state(self, checkpoint):
        super()._load_rng_state(checkpoint)
        self.loader.restore(checkpoint)
    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.setdefault(self.state.global_step, []).extend(inputs["rows"])
        return super().training_step(model, inputs, num_items_in_batch)

def train(configs, output_dir, kill_at=None, resume_from=None):
    args = TrainingArguments(
        output_dir=output_dir, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=9, save_steps=2,
        gradient_accumulation_steps=2, remove_unused_columns=False, ignore_data_skip=True, logging_strategy="no",
    )
    stream = load_stream([DataConfig(path, weight=weight) for path, weight in configs], seed=0, buffer_size=5)
    trainer = NotingTrainer(model=Line(), args=args, train_dataset=stream, data_collator=list)
    trainer.seen, trainer.kill_at = {}, kill_at
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer.seen

if __name__ == "__main__":
    train(json.loads(sys.argv[1]), sys.argv[2], kill_at=7)
"""


def test_killed_training_goes_on_at_the_next_row(tmp_path: Path, two: list[DataConfig]):
    configs = [(config.path, config.weight) for config in two]
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), json.dumps(configs), str(tmp_path / "killed")]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    train = runpy.run_path(str(script))["train"]
    whole = train(configs, str(tmp_path / "whole"))
    resumed = train(configs, str(tmp_path / "killed"), resume_from=str(tmp_path / "killed" / "checkpoint-6"))
    assert sorted(whole) == list(range(9))
    assert all(len(rows) == 4 for rows in whole.values())
    assert resumed == {step: whole[step] for step in (6, 7, 8)}
