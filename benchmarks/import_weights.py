"""
Time and memory of `mglmm import-weights` on a checkpoint of full size whose weights are all zero.

```shell
python benchmarks/import_weights.py
python benchmarks/import_weights.py --layers 4
```

Makes a folder in GLaMM's layout (7B: bfloat16 language model, float32 SAM ViT-H, region encoder, two files), imports it
in a process of its own and writes the table of `benchmarks/README.md`. Needs 20 GB of disk: the zeros of the input are
holes in its files.
"""

import argparse
import json
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from tables import README, in_own_process, markdown_table, write_tables
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel, LlamaConfig, SamConfig
from transformers.initialization import no_init_weights

from mglmm import MglmmConfig, MglmmForConditionalGeneration
from mglmm.importing import import_weights
from mglmm.modeling_mglmm.configuration_mglmm import CLIP_VIT_LARGE_336, SAM_VIT_HUGE
from mglmm.modeling_mglmm.weight_layouts import GLAMM, original_name

PIECES, ADDED = 32000, len(GLAMM.added_tokens)
TOWER = "openai/clip-vit-large-patch14-336"
FLOAT32 = (GLAMM.sam_prefix, "model.text_hidden_fcs.")  # the others are bfloat16 in the published files
SHARES = (0.6, 0.4)  # of the bytes in each file, about those of GLaMM-GCG


@dataclass(frozen=True)
class Import:
    tensors: int
    bytes: int
    largest_file: int
    seconds: float
    peak_memory: int  # bytes, mapped files and libraries included


class HolesForZeros:
    """A file to write to in which blocks of zeros take no space."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")

    def write(self, data: bytes) -> int:
        if not np.frombuffer(data, dtype=np.uint8).any():
            self.file.seek(len(data), os.SEEK_CUR)
            return len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.truncate()
        self.file.close()


def write_checkpoint(folder: Path, layers: int) -> None:
    """`folder/glamm` in the original layout, `folder/openai/…` its vision tower."""
    checkpoint = folder / "glamm"
    checkpoint.mkdir(parents=True)
    config = {
        "architectures": ["GLaMMForCausalLM"],
        "model_type": "llava",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_hidden_layers": layers,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "mm_vision_tower": TOWER,
        "mm_use_im_start_end": True,
        "vocab_size": PIECES + ADDED,
        "with_region": True,
    }
    (checkpoint / "config.json").write_text(json.dumps(config))
    added = {token: PIECES + i for i, token in enumerate(GLAMM.added_tokens)}
    (checkpoint / "added_tokens.json").write_text(json.dumps(added))
    write_sentencepiece(checkpoint / "tokenizer.model")
    tower = folder / TOWER
    with no_init_weights():
        CLIPVisionModel(CLIPVisionConfig(**CLIP_VIT_LARGE_336)).half().save_pretrained(tower)
    side = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=side).save_pretrained(tower)
    shards = list(layout(layers))
    names = [f"pytorch_model-{i:05d}-of-{len(shards):05d}.bin" for i in range(1, len(shards) + 1)]
    for name, shapes in zip(names, shards, strict=True):
        file = HolesForZeros(checkpoint / name)
        torch.save({key: torch.zeros(shape, dtype=dtype_of(key)) for key, shape in shapes.items()}, file)
        file.close()
    weight_map = {key: name for name, shapes in zip(names, shards, strict=True) for key in shapes}
    (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


def layout(layers: int) -> Iterator[dict[str, torch.Size]]:
    """Original names and shapes of a full-size GLaMM, by file."""
    config = MglmmConfig(
        text_config=LlamaConfig(
            hidden_size=4096,
            intermediate_size=11008,
            num_hidden_layers=layers,
            num_attention_heads=32,
            vocab_size=PIECES + ADDED,
        ),
        vision_config=CLIPVisionConfig(**CLIP_VIT_LARGE_336),
        sam_config=SamConfig(vision_config=SAM_VIT_HUGE),
        image_token_id=PIECES,
        region_feature_layers=[14, 17, 20, 23],
        region_token_id=PIECES + 2,
    )
    with torch.device("meta"):
        model = MglmmForConditionalGeneration(config)
    shapes = {original_name(name, GLAMM, config): tensor.shape for name, tensor in model.state_dict().items()}
    known = {name: shape for name, shape in shapes.items() if name is not None}
    total = sum(size_of(name, shape) for name, shape in known.items())
    shard: dict[str, torch.Size] = {}
    for name, shape in known.items():
        shard[name] = shape
        if sum(size_of(*item) for item in shard.items()) > SHARES[0] * total:
            yield shard
            shard = {}
    yield shard


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name.startswith(FLOAT32) else torch.bfloat16


def size_of(name: str, shape: torch.Size) -> int:
    return math.prod(shape) * dtype_of(name).itemsize


def write_sentencepiece(path: Path) -> None:
    """A vocabulary of LLaMA's kind and size: bytes, letters, and words joined from pairs of letters."""
    from sentencepiece import sentencepiece_model_pb2 as model

    proto = model.ModelProto()
    proto.trainer_spec.model_type = model.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    kinds = model.ModelProto.SentencePiece
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    letters = [chr(code) for code in range(0x4E00, 0x4E00 + 180)]
    words = [a + b for a in letters for b in letters]
    words = words[: PIECES - len(pieces) - len(letters) - 1]
    pieces += [(text, kinds.NORMAL) for text in [*words, "▁", *letters]]
    for rank, (text, kind) in enumerate(pieces):
        proto.pieces.add(piece=text, score=-float(rank), type=kind)
    path.write_bytes(proto.SerializeToString())


def run_import(folder: Path) -> Import:
    files = list((folder / "glamm").glob("*.bin"))
    start = perf_counter()
    report = import_weights(folder / "glamm", folder / "out")
    seconds = perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    size = sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))
    count = len(report.matched) + len(report.renamed) + len(report.taken)
    return Import(count, size, max(file.stat().st_size for file in files), seconds, peak)


def render(measured: Import, command: str) -> str:
    """The text between the script's markers of the README."""
    header = ["tensors", "written, GB", "largest file, GB", "peak memory, GB", "peak - file, GB", "seconds", "GB/s"]
    gigabytes = (
        measured.bytes,
        measured.largest_file,
        measured.peak_memory,
        measured.peak_memory - measured.largest_file,
    )
    row = [
        f"{measured.tensors:,}",
        *(f"{value / 1e9:.2f}" for value in gigabytes),
        f"{measured.seconds:.0f}",
        f"{measured.bytes / 1e9 / measured.seconds:.2f}",
    ]
    return f"`{command}`\n\n" + markdown_table(header, [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--layers", type=int, default=32, help="of the language model (7B: 32)")
    parser.add_argument("--folder", type=Path, help="where to put the files, by default a temporary folder")
    parser.add_argument("--readme", type=Path, default=README, help="file whose table is replaced")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        in_own_process(write_checkpoint, Path(folder), args.layers)
        measured = in_own_process(run_import, Path(folder))
    tables = render(measured, f"python benchmarks/import_weights.py --layers {args.layers}")
    print(f"\n{tables}")
    write_tables(args.readme, Path(__file__).name, tables)
    print(f"written to {os.path.relpath(args.readme)}")


if __name__ == "__main__":
    main()
