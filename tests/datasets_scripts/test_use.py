"""What prepared data is for: masks that arrive whole in a batch, and the ways `datasets` offers to read them."""

import json
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from datasets.distributed import split_dataset_by_node

from mglmm.datasets_scripts.prepare import prepare
from mglmm.processing.rle import decode_mask, encode_mask
from mglmm.trainer.data_collator import MglmmDataCollator
from tests.datasets_scripts.conftest import annotation
from tests.tiny import tiny_processor

SIDE = 64


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def write_photos(folder: Path, numbers: range, masks: dict[int, np.ndarray] | None = None) -> Path:
    """A data folder with one person in each of the square pictures `numbers`, all in train."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in numbers:
        name = f"{number}.png"
        PIL.Image.new("RGB", (SIDE, SIDE), (number % 256, 90, 30)).save(folder / "images" / name)
        images.append(
            {"id": number, "file_name": name, "width": SIDE, "height": SIDE, "source": "fashion", "split": "train"}
        )
        person = annotation(number, number, "person", "object", None, (SIDE, SIDE), (8, 8, 40, 60))
        if masks is not None:
            person["segmentation"] = encode_mask(masks[number])
        annotations.append(person)
    (folder / "annotations.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder


@pytest.fixture
def prepared(tmp_path: Path, cache: None) -> tuple[str, str]:
    """Two prepared datasets of seven and of five photographs, with one or two rows each."""
    outputs = []
    for name, numbers in {"a": range(7), "b": range(100, 105)}.items():
        output = tmp_path / f"{name}_uscdf"
        prepare("photos", write_photos(tmp_path / name, numbers), output, num_proc=1)
        outputs.append(str(output))
    return outputs[0], outputs[1]


def identity(row: dict) -> tuple[str, str]:
    return row["image_id"], row["messages"][0]["content"]


def test_masks_survive_row_parquet_and_batch_exactly(tmp_path, cache):
    rng = np.random.default_rng(0)
    # Ragged masks: half the pixels at random, so that a shift, a transposition or a resize of one pixel shows.
    masks = {number: rng.random((SIDE, SIDE)) < 0.5 for number in range(6)}
    prepare("photos", write_photos(tmp_path / "data", range(6), masks), tmp_path / "out", num_proc=1)
    rows = [row for row in datasets.load_dataset(str(tmp_path / "out"), "default", split="train") if not row["regions"]]
    assert {row["image_id"] for row in rows} == set("012345") and any(row["masks"] for row in rows)
    collator = MglmmDataCollator(tiny_processor(), mask_size=SIDE)  # one cell of a label is one pixel of these pictures
    for row in rows:
        labels = collator([row])["mask_labels"]
        assert labels.shape == (len(row["masks"]), SIDE, SIDE)
        for label, rle in zip(labels, row["masks"], strict=True):
            assert np.array_equal(decode_mask(rle), masks[int(row["image_id"])])
            assert torch.equal(label, torch.from_numpy(masks[int(row["image_id"])].astype(np.uint8)))


def test_datasets_interleave(prepared):
    first, second = (datasets.load_dataset(path, "default", split="train") for path in prepared)
    assert first.features == second.features
    mixed = datasets.interleave_datasets([first, second], probabilities=[0.5, 0.5], seed=0)
    sources = ["b" if int(row["image_id"]) >= 100 else "a" for row in mixed]
    assert {"a", "b"} == set(sources)
    streamed = datasets.interleave_datasets(
        [datasets.load_dataset(path, "default", split="train", streaming=True) for path in prepared],
        probabilities=[0.5, 0.5],
        seed=0,
    )
    assert {identity(row) for row in streamed} <= {identity(row) for row in [*first, *second]}


def test_streaming_gives_the_rows_of_the_map_style(prepared):
    whole = datasets.load_dataset(prepared[0], "default", split="train")
    streamed = datasets.load_dataset(prepared[0], "default", split="train", streaming=True)
    assert [identity(row) for row in streamed] == [identity(row) for row in whole]
    assert streamed.features == whole.features
    assert next(iter(streamed))["image"].size == (SIDE, SIDE)


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_the_rows_without_overlap(prepared, streaming):
    dataset = datasets.load_dataset(prepared[0], "default", split="train", streaming=streaming)
    everything = [identity(row) for row in dataset]
    ranks = [[identity(row) for row in split_dataset_by_node(dataset, rank=rank, world_size=2)] for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(everything)
    assert abs(len(ranks[0]) - len(ranks[1])) <= 1


def test_a_stream_resumes_at_the_next_row(prepared):
    dataset = datasets.load_dataset(prepared[0], "default", split="train", streaming=True)
    everything = [identity(row) for row in dataset]
    begun = []
    for row in dataset:
        begun.append(identity(row))
        if len(begun) == 5:
            state = dataset.state_dict()
            break
    fresh = datasets.load_dataset(prepared[0], "default", split="train", streaming=True)
    fresh.load_state_dict(json.loads(json.dumps(state)))  # as a checkpoint keeps it
    assert begun + [identity(row) for row in fresh] == everything
