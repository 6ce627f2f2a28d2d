"""Exporting to the layouts of LISA and GLaMM: the original's files again, bit by bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from mglmm.exporting import export_checkpoint
from mglmm.importing import import_weights
from tests.tiny import Tiny


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("*.bin"))
        for name, tensor in torch.load(file, weights_only=True).items()
    }


@pytest.mark.parametrize("name", ["lisa", "glamm"])
def test_import_and_export_give_the_same_files(name: str, shared_dir: Path, tmp_path: Path) -> None:
    source = shared_dir / "golden" / name / "ckpt"
    import_weights(source, tmp_path / "imported")
    count = export_checkpoint(tmp_path / "imported", tmp_path / "out", name, max_shard_size=10**7)
    expected, found = weights_of(source), weights_of(tmp_path / "out")
    assert found.keys() == expected.keys() and count == len(expected)
    for tensor_name, tensor in expected.items():
        assert found[tensor_name].dtype == tensor.dtype
        assert torch.equal(found[tensor_name], tensor), tensor_name
    placed = json.loads((tmp_path / "out" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert placed.keys() == expected.keys() and len(set(placed.values())) > 1
    for file in ("config.json", "added_tokens.json"):
        written, original = (json.loads((folder / file).read_text()) for folder in (tmp_path / "out", source))
        assert written == original
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    again = import_weights(
        tmp_path / "out", tmp_path / "again", vision_tower=str(next((source.parent / "openai").iterdir()))
    )
    assert len(again.renamed) > 200


def test_what_does_not_fit_is_refused(tiny: Tiny, shared_dir: Path, tmp_path: Path) -> None:
    model: PreTrainedModel = tiny.model
    model.save_pretrained(tmp_path / "tiny")
    with pytest.raises(FileNotFoundError, match=r"lacks config.json and tokenizer.model.*--original"):
        export_checkpoint(tmp_path / "tiny", tmp_path / "out", "lisa")
    original = shared_dir / "golden" / "lisa" / "ckpt"
    with pytest.raises(ValueError, match="its image projector is two layers"):
        export_checkpoint(tmp_path / "tiny", tmp_path / "out", "lisa", original=original)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(ValueError, match="exists and is not empty"):
        export_checkpoint(tmp_path / "tiny", tmp_path / "out", "glamm", original=original)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        export_checkpoint(tmp_path, tmp_path / "out", "glamm")
    assert not (tmp_path / "out").exists()
