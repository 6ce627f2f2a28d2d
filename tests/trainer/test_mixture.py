"""Weighted sampling over several datasets: exact shares, one order on every rank, resumption at the exact next row."""

import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch

from mglmm.datasets_scripts.features import FEATURES
from mglmm.trainer.config import DataConfig
from mglmm.trainer.mixture import MixtureSampler, apportion, load_mixture, message_lengths, open_dataset, source_of
from tests.trainer.conftest import uscdf_row, write_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def make_rows(*tasks: str) -> list[dict[str, Any]]:
    """One row per task, longer ones further down."""
    rows = [uscdf_row(0, task, ("the hat",)) for task in tasks]
    for i, row in enumerate(rows):
        row["image_id"] = str(i)
        row["messages"][0]["content"] += "!" * i
    return rows


def make_dataset(folder: Path, *tasks: str) -> str:
    return write_dataset(folder, make_rows(*tasks))


@pytest.mark.parametrize(
    "count, weights, shares",
    [
        (10, [1], [10]),
        (10, [2, 1], [7, 3]),  # 6.67 and 3.33
        (6, [2, 1], [4, 2]),  # exact, though not in floats
        (3, [1, 1], [2, 1]),  # equal remainders: the first
        (7, [0.1, 0.2, 0.7], [1, 1, 5]),
        (2, [5, 1, 1], [2, 0, 0]),
    ],
)
def test_shares_are_whole_and_exact(count: int, weights: list[float], shares: list[int]):
    assert apportion(count, weights) == shares


def test_lengths_are_characters_of_all_messages():
    messages = [["añb", "cd"], [], None, ["", "e"], ["fgh"]]
    rows = [None if row is None else [{"role": "user", "content": text} for text in row] for row in messages]
    sliced = pa.chunked_array([pa.array(rows[:3]), pa.array([*rows[:2], *rows[3:]]).slice(2)])
    assert message_lengths(sliced).tolist() == [5, 0, 0, 1, 3]


def test_items_name_where_they_come_from(tmp_path: Path):
    first = make_dataset(tmp_path / "first", "referring", "absent", "referring", "fine")
    second = make_dataset(tmp_path / "second", "caption", "caption")
    limits = DataConfig(first, task_weights={"fine": 1, "referring": 1}, task_limits={"referring": 1})
    mixture = load_mixture([limits, DataConfig(second)], seed=0)
    assert mixture.sources == [f"{first}/default/train", f"{second}/default/train"]
    assert mixture.sizes == [2, 2]  # one of two `referring`, no `absent`, `fine`
    assert len(mixture) == 4
    items = [mixture[i] for i in range(4)]
    assert [item["task"] for item in items] == ["referring", "fine", "caption", "caption"]
    assert [item["dataset"] for item in items] == [source for source in mixture.sources for _ in range(2)]
    assert [str(item["index"]) for item in items] == [item["image_id"] for item in items]  # as published
    assert [item["length"] for item in items] == mixture.lengths
    assert mixture.lengths[3] == sum(len(message["content"]) for message in items[3]["messages"])
    assert items[0]["image"].size == (60, 40)
    assert [rows["image_id"][:] for rows in mixture.datasets] == [[i["image_id"] for i in items[:2]], ["0", "1"]]


def test_limit_is_chosen_by_seed(tmp_path: Path):
    path = make_dataset(tmp_path / "data", *["referring"] * 20)
    config = DataConfig(path, task_limits={"referring": 5})
    chosen = [load_mixture([config], seed).datasets[0]["image_id"][:] for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(set(chosen[0])) == 5


def test_broken_picture_is_reported_with_its_row(tmp_path: Path):
    rows = [{**row, "image": {"bytes": b"no picture", "path": None}} for row in make_rows("referring")]
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_list(rows, features=FEATURES).to_parquet(tmp_path / "data" / "train.parquet")
    item = load_mixture([DataConfig(str(tmp_path / "data"))], seed=0)[0]
    assert item["image"] is None
    assert item["error"] == "image (bytes) is not a picture that Pillow can read: convert it to PNG or JPEG"
    assert (item["dataset"], item["index"]) == (f"{tmp_path / 'data'}/default/train", 0)


def test_weights_give_exact_shares_and_no_row_comes_twice_before_all_came(tmp_path: Path):
    big = make_dataset(tmp_path / "big", *["referring"] * 6, *["absent"] * 2, "other")
    small = make_dataset(tmp_path / "small", *["caption"] * 5)
    tasks = {"referring": 3, "absent": 1}
    mixture = load_mixture([DataConfig(big, weight=2, task_weights=tasks), DataConfig(small, weight=1)], seed=0)
    sampler = MixtureSampler(mixture, seed=0, rows_per_epoch=11, batch_size=4)
    assert len(sampler) == 12  # whole batches
    epochs = [[mixture[i] for i in sampler.order(epoch)] for epoch in range(3)]
    for rows in epochs:
        assert Counter(row["task"] for row in rows) == {"referring": 6, "absent": 2, "caption": 4}
    # 12 draws of 5 captions over three epochs: each twice, two of them a third time
    captions = [row["image_id"] for rows in epochs for row in rows if row["task"] == "caption"]
    assert sorted(Counter(captions).values()) == [2, 2, 2, 3, 3]
    for rows in epochs:
        assert len({row["image_id"] for row in rows if row["task"] == "referring"}) == 6
    assert [row["task"] for row in epochs[0]] != sorted(row["task"] for row in epochs[0])  # interleaved


def test_order_depends_on_seed_and_epoch_alone(tmp_path: Path):
    path = make_dataset(tmp_path / "data", *["referring"] * 12)
    mixture = load_mixture([DataConfig(path)], seed=0)
    sampler = MixtureSampler(mixture, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(12))  # the default is every row once
    sampler.set_epoch(1)
    second = list(sampler)
    torch.manual_seed(99)
    fresh = MixtureSampler(load_mixture([DataConfig(path)], seed=0), seed=3)
    assert fresh.order(1) == second != first == fresh.order(0)  # whichever epoch is asked for first
    assert MixtureSampler(mixture, seed=4).order(0) != first


def test_group_by_length_puts_like_lengths_into_a_batch_and_the_longest_first(tmp_path: Path):
    path = make_dataset(tmp_path / "data", *["referring"] * 32)
    mixture = load_mixture([DataConfig(path)], seed=0)
    sampler = MixtureSampler(mixture, seed=0, batch_size=4, group_by_length=True)
    order = sampler.order(0)
    assert sorted(order) == list(range(32))
    assert mixture.lengths[order[0]] == max(mixture.lengths)

    def padding(rows: list[int]) -> int:
        batches = [[mixture.lengths[row] for row in rows[i : i + 4]] for i in range(0, 32, 4)]
        return sum(max(batch) * 4 - sum(batch) for batch in batches)

    assert padding(order) < padding(MixtureSampler(mixture, seed=0, batch_size=4).order(0)) / 2
    assert sampler.order(1) != order == sampler.order(0)


def without(column: str) -> datasets.Dataset:
    rows = [{**row, "image": None} for row in make_rows("referring", "referring")]
    return datasets.Dataset.from_list(rows, features=FEATURES).remove_columns(column)


def test_older_dataset_without_ignore_mask_is_read_and_other_columns_are_left_away(tmp_path: Path):
    (tmp_path / "data").mkdir()
    without("ignore_mask").add_column("licence", ["CC0"] * 2).to_parquet(tmp_path / "data" / "train.parquet")
    item = load_mixture([DataConfig(str(tmp_path / "data"))], seed=0)[0]
    assert item["ignore_mask"] is None
    assert "licence" not in item


def test_without_a_name_the_default_configuration_of_the_card_is_read(tmp_path: Path):
    """As of `mglmm annotate export`: "mgsc" is the default beside "objects", and nothing is called "default"."""
    folder = Path(make_dataset(tmp_path / "rows", "fine", "fine"))
    (folder / "objects.parquet").write_bytes(next(folder.glob("default/*.parquet")).read_bytes())
    (folder / "README.md").write_text(
        "---\nconfigs:\n- {config_name: objects, data_files: objects.parquet}\n"
        "- {config_name: mgsc, data_files: default/*.parquet, default: true}\n---\n"
    )
    (row, _) = open_dataset(DataConfig(str(folder)), streaming=False)
    assert row["task"] == "fine" and source_of(DataConfig(str(folder))) == f"{folder}/default/train"


def test_foreign_columns_are_refused_by_name(tmp_path: Path):
    (tmp_path / "data").mkdir()
    dataset = without("masks").cast_column("task", datasets.Value("large_string"))
    dataset.to_parquet(tmp_path / "data" / "train.parquet")
    with pytest.raises(ValueError, match=r"columns differ: task \(of another type\), masks \(missing\)\. Prepare it"):
        load_mixture([DataConfig(str(tmp_path / "data"))], seed=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"path": "missing"},
            r"missing/default/train cannot be opened: Couldn't .* \(check its path, name and split, and",
        ),
        ({"name": "gcg"}, r"cannot be opened: BuilderConfig 'gcg' not found. Available: \['default'\]"),
        (
            {"split": "validation"},
            r"""/validation cannot be opened: Unknown split "validation"\. Should be .*'train'""",
        ),
        ({"weight": 0}, "has weight 0: give it one above zero or leave it out"),
        ({"weight": -1.5}, "has weight -1.5: give"),
        ({"weight": float("nan")}, "has weight nan: give"),
        (
            {"task_weights": {"fine": 1}},
            r"task 'fine' has 0 rows and 1 in task_weights; drop it .*tasks: absent, referring",
        ),
        ({"task_weights": {"absent": 0}}, "task 'absent' has 1 rows and 0 in task_weights; drop it from task_weights"),
        ({"task_limits": {"absent": 0}}, "task 'absent' has 1 rows and 0 in task_limits; drop it from task_limits"),
        ({"task_limits": {"fine": 5}}, "task 'fine' has 0 rows and 5 in task_limits; drop it from task_limits"),
    ],
)
def test_bad_settings_stop_with_one_line(tmp_path: Path, changes: dict[str, Any], message: str):
    config = DataConfig(**{"path": make_dataset(tmp_path / "data", "referring", "absent"), **changes})
    with pytest.raises(ValueError, match=message) as error:
        load_mixture([config], seed=0)
    assert "\n" not in str(error.value)


def test_empty_dataset_is_refused(tmp_path: Path):
    path = tmp_path / "data"
    path.mkdir()
    datasets.Dataset.from_dict({name: [] for name in FEATURES}, features=FEATURES).to_parquet(path / "train.parquet")
    with pytest.raises(ValueError, match=f"{path}/default/train cannot be opened: .*no data.* that it has rows"):
        load_mixture([DataConfig(str(path))], seed=0)


def test_share_below_one_row_is_refused(tmp_path: Path):
    path = make_dataset(tmp_path / "data", "referring", "absent")
    mixture = load_mixture([DataConfig(path, task_weights={"referring": 99, "absent": 1})], seed=0)
    with pytest.raises(
        ValueError, match="task 'absent' of .* gets none of the 2 rows of an epoch: raise rows_per_epoch"
    ):
        MixtureSampler(mixture, seed=0)
    assert len(MixtureSampler(mixture, seed=0, rows_per_epoch=100)) == 100


# A trainer that notes which rows it sees. Run as a script by 2 processes, and imported for 1.
TRAINER = """
import json, os, sys
from pathlib import Path
import torch
from transformers import Trainer, TrainingArguments
from mglmm.trainer.config import DataConfig
from mglmm.trainer.mixture import MixtureSampler, load_mixture

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
    def forward(self, rows):
        return {"loss": (self.weight * rows.float()).mean()}

class NotingTrainer(Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return MixtureSampler(self.train_dataset, seed=5, rows_per_epoch=32, batch_size=8)
    def training_step(self, model, inputs, num_items_in_batch=None):
        self.seen.setdefault(self.state.global_step, []).extend(inputs["rows"].tolist())
        return super().training_step(model, inputs, num_items_in_batch)

def train(data, output_dir, batch_size, accumulation, resume_from=None):
    args = TrainingArguments(
        output_dir=output_dir, use_cpu=True, report_to=[], disable_tqdm=True, max_steps=8, save_steps=2,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, remove_unused_columns=False,
        logging_strategy="no",
    )
    mixture = load_mixture([DataConfig(data)], seed=5)
    collate = lambda rows: {"rows": torch.tensor([row["index"] for row in rows])}
    trainer = NotingTrainer(model=Line(), args=args, train_dataset=mixture, data_collator=collate)
    trainer.seen = {}
    trainer.train(resume_from_checkpoint=resume_from and f"{output_dir}/checkpoint-{resume_from}")
    return trainer.seen

if __name__ == "__main__":
    data, output_dir = sys.argv[1:]
    runs = {str(step): train(data, output_dir, 2, 2, step) for step in (None, 4, 6)}
    rank = os.environ["RANK"]
    Path(output_dir, f"rank{rank}.json").write_text(json.dumps(runs))
    torch.distributed.barrier()
    os._exit(0)
"""


def test_processes_share_each_step_of_one_order_and_resume_at_the_next_row(tmp_path: Path):
    """Epochs of 4 steps: resumed at the border and within the second."""
    data = make_dataset(tmp_path / "data", *["referring"] * 20)
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run([*command, str(script), data, str(tmp_path / "two")], check=True, env=environment, timeout=120)
    ranks = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in (0, 1)]

    sampler = MixtureSampler(load_mixture([DataConfig(data)], seed=5), seed=5, rows_per_epoch=32, batch_size=8)
    order = sampler.order(0) + sampler.order(1)
    for start in (None, 4, 6):
        steps = [rank[str(start)] for rank in ranks]
        assert [int(step) for step in steps[0]] == list(range(start or 0, 8))
        for step in steps[0]:
            first, second = steps[0][step], steps[1][step]
            assert (len(first), len(second)) == (4, 4)
            # two micro-batches of two rows, dealt out in turn
            union = first[:2] + second[:2] + first[2:] + second[2:]
            assert union == order[int(step) * 8 : int(step) * 8 + 8]

    train = runpy.run_path(str(script))["train"]
    for start in (None, 6):
        seen = train(data, str(tmp_path / "one"), 8, 1, start)
        assert seen == {step: order[step * 8 : step * 8 + 8] for step in range(start or 0, 8)}
