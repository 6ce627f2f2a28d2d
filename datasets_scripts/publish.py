"""
Sharing a prepared folder on the Hub, with a card that says what is in it and on which terms.

Pictures that may not be given away stay where they are: with `images="reference"` the column `image` holds paths below a
root folder, which `load_with_images` joins with that folder on another machine.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets.arrow_writer import ParquetWriter
from huggingface_hub import CommitInfo, DatasetCard, HfApi
from tqdm import tqdm

from mglmm.hub_cards.cards import Contents, dataset_card

from .features import FEATURES
from .sources import displayed_size, inside

Images = Literal["embed", "reference"]
REFERENCES = datasets.Features({**FEATURES, "image": datasets.Value("string")})
BATCH = 200  # rows in memory; their pictures too


def read_contents(folder: Path) -> Contents:
    """Counts of the Parquet files `config/split-*.parquet`; raises `ValueError` if there are none, or of other columns."""
    contents = Contents()
    for file in _shards(folder):
        place = file.parent.name, split_of(file)
        for batch in pq.ParquetFile(file).iter_batches(columns=["task", "source", "masks"]):
            contents.rows[place] += batch.num_rows
            contents.masks[place] += pc.sum(pc.list_value_length(batch["masks"])).as_py() or 0
            for column, counter in (("task", contents.tasks), ("source", contents.sources)):
                for count in pc.value_counts(batch[column]).to_pylist():
                    counter[count["values"]] += count["counts"]
    return contents


def split_of(file: Path) -> str:
    return file.name.partition("-")[0]


def _shards(folder: Path) -> list[Path]:
    files = sorted(folder.glob("*/*-*.parquet"))
    for file in files:
        if missing := [name for name in FEATURES if name not in pq.read_schema(file).names]:
            raise ValueError(f"{file} has no columns {missing}: is it of a folder that `mglmm prepare` wrote?")
    if not files:
        raise ValueError(f"{folder} holds no Parquet files: is it a folder that `mglmm prepare` wrote?")
    return files


def push_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    images: Images = "embed",
    image_root: str | Path | None = None,
    license: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """
    Upload a prepared folder in one commit, with a card.

    Args:
        folder: What `prepare` wrote.
        repo_id: "name" or "owner/name"; created if it does not exist.
        private: Whether a new repository is private.
        images: "embed" uploads the pictures within the rows, "reference" only their paths below `image_root`; the latter
            needs rows that were prepared with `images="path"`.
        image_root: Folder that holds all pictures, for "reference".
        license: Identifier or terms for the card; by default those that `prepare` wrote into the folder's card.

    Raises:
        ValueError: the folder holds something else, a picture cannot be read, or a reference would leave `image_root`.
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, for example without a token that may write.
    """
    folder = Path(folder)
    if images == "reference" and image_root is None:
        raise ValueError("references need the folder that holds all pictures: give image_root")
    files, contents = _shards(folder), read_contents(folder)
    written = DatasetCard.load(folder / "README.md").data.to_dict() if (folder / "README.md").is_file() else {}
    terms = license or written.get("license_details") or written.get("license") or "unknown"
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".push-") as staging:
        for file in tqdm(files, "writing", unit="file"):
            target = Path(staging) / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            if images == "reference":
                _write_references(file, target, Path(str(image_root)).resolve())
            else:
                _write_embedded(file, target)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        card = dataset_card(
            contents,
            REFERENCES if images == "reference" else FEATURES,
            name=written.get("pretty_name") or folder.resolve().name,
            terms=terms,
            repo_id=repo_id,
        )
        card.save(Path(staging) / "README.md")
        return api.upload_folder(
            repo_id=repo_id,
            repo_type="dataset",
            folder_path=staging,
            commit_message="Upload USCDF rows",
            # A shard of an earlier push with another number of shards would be read, too.
            delete_patterns=["*.parquet"],
        )


def _write_embedded(file: Path, target: Path) -> None:
    """A copy in which every picture is within its row."""
    paths = {path for batch in _image_batches(file) for path in _outside(batch) if path is not None}
    if not paths:
        shutil.copyfile(file, target)
        return
    for path in paths:
        displayed_size(Path(path))  # nothing but pictures leaves this machine
    with ParquetWriter(features=FEATURES, path=str(target), writer_batch_size=BATCH, embed_local_files=True) as writer:
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            writer.write_table(pa.Table.from_batches([batch]))
        writer.finalize()


def _write_references(file: Path, target: Path, root: Path) -> None:
    with ParquetWriter(features=REFERENCES, path=str(target), writer_batch_size=BATCH) as writer:
        for batch in pq.ParquetFile(file).iter_batches(BATCH):
            table = pa.Table.from_batches([batch])
            images = table["image"].to_pylist()
            if any(image is not None and image["bytes"] is not None for image in images):
                raise ValueError(
                    f"{file.name} holds the pictures themselves: prepare with images='path' to refer to them"
                )
            names = [None if image is None else _below(root, image["path"]) for image in images]
            place = table.column_names.index("image")
            writer.write_table(table.set_column(place, "image", pa.array(names, pa.string())).replace_schema_metadata())
        writer.finalize()


def _below(root: Path, path: str) -> str:
    try:
        return Path(path).resolve().relative_to(root).as_posix()
    except ValueError as error:
        raise ValueError(f"the picture {path} is not below {root}") from error


def _image_batches(file: Path) -> Iterator[list[dict[str, Any] | None]]:
    for batch in pq.ParquetFile(file).iter_batches(BATCH, columns=["image"]):
        yield batch["image"].to_pylist()


def _outside(images: list[dict[str, Any] | None]) -> list[str | None]:
    return [image["path"] for image in images if image is not None and image["bytes"] is None]


# ------------------------------------------------------------------ the way back


def load_with_images(
    path: str | Path,
    image_root: str | Path,
    name: str | None = None,
    *,
    split: str,
    streaming: bool = False,
    **kwargs: Any,
) -> datasets.Dataset | datasets.IterableDataset:
    """
    `datasets.load_dataset` of a repository of references, with the pictures below `image_root` joined in.

    Args:
        path, name, split, streaming, kwargs: As in `load_dataset`.
        image_root: Folder below which the pictures have the paths of the column `image`.

    Returns:
        The dataset with the features of every other prepared one.

    Raises:
        ValueError: the rows hold no references, or a picture is missing or would lie outside `image_root`; while
            streaming the latter is found when its row is read.
    """
    dataset = datasets.load_dataset(str(path), name, split=split, streaming=streaming, **kwargs)
    if dataset.features != REFERENCES:
        raise ValueError("the column image holds no references: open this dataset with datasets.load_dataset")
    join = partial(_joined, root=Path(image_root).resolve())
    if streaming:
        # Without `features` here: what `map` has typed is not decoded again.
        return dataset.map(lambda row: {"image": join(row["image"])}).cast(FEATURES)
    images = [name if name is None else {"bytes": None, "path": join(name)} for name in dataset["image"]]
    # The other columns, masks above all, stay on disk as they are.
    joined = dataset.remove_columns("image").add_column("image", images, feature=FEATURES["image"])
    return joined.select_columns(list(FEATURES))


def _joined(name: str | None, root: Path) -> str | None:
    try:
        return None if name is None else str(inside(root, name))
    except ValueError as error:
        raise ValueError(f"{name!r:.200}: {error} (below {root})") from error
