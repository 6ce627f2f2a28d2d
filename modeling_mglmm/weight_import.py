"""Turns a checkpoint of LISA, GLaMM, MGLMM or LLaVA into safetensors of ours, file by file with bounded memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import PreTrainedModel

from .configuration_mglmm import MglmmConfig
from .modeling_mglmm import MglmmForConditionalGeneration
from .sam_checkpoint import list_problems
from .weight_files import TensorInfo, open_tensors
from .weight_layouts import COMPUTED, LORA, SAM_PARTS, Layout, original_name, reason_to_drop, today_name

VOCABULARY = ("lm_head.weight", "model.language_model.embed_tokens.weight")
TOWER = "model.vision_tower."


@dataclass
class ImportReport:
    """
    What became of every tensor.

    Attributes:
        matched: Tensors that keep their names.
        renamed: Original name -> name here.
        folded: Names of the original weights that a LoRA was added to.
        new: Tensors without an original, freshly initialised, or vocabulary rows that were appended.
        dropped: Original name -> why it was left out.
        taken: Tensors from elsewhere -> where from (vision tower, SAM).
    """

    matched: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    folded: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    taken: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = [f"{len(value)} {name}" for name, value in asdict(self).items() if value]
        return ", ".join(kinds)


@dataclass(frozen=True)
class Step:
    """One tensor to write. `origin` is a weight file, a part (`"vision tower"`, `"SAM"`), or `None` for a new tensor."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    origin: Path | str | None
    source: str = ""

    @property
    def size(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class WeightImport:
    """
    A planned import; making it checks every name and shape, `write` does the work.

    Args:
        layout: Of the checkpoint.
        config: Of the model to make.
        tensors: The checkpoint's tensors by the names they have in its files (`list_tensors`).
        parts: `"vision tower"` and, where the checkpoint holds none, `"SAM"`: models to take the rest from.
        dtype: Of all but the mask path, which stays float32. `None`: as stored, and float32 for what is new.
        lora_scale: alpha / r of an unmerged LoRA; `weight += lora_scale * B @ A`.
        new_rows: Vocabulary ids that get the mean of the other rows.
        allow_missing: Names (or patterns with `*`) of tensors that may be missing, or left over, in the checkpoint.

    Raises:
        ValueError: tensors are missing, left over or of the wrong shape; all of them are counted and the first named.
    """

    def __init__(
        self,
        layout: Layout,
        config: MglmmConfig,
        tensors: Mapping[str, TensorInfo],
        parts: Mapping[str, PreTrainedModel],
        *,
        dtype: torch.dtype | None = None,
        lora_scale: float = 2.0,
        new_rows: Sequence[int] = (),
        allow_missing: Sequence[str] = (),
    ):
        with torch.device("meta"):
            self.model = MglmmForConditionalGeneration(config)
        self.layout, self.config, self.dtype, self.lora_scale = layout, config, dtype, lora_scale
        self.parts = {name: part.state_dict() for name, part in parts.items()}
        self.new_rows = sorted(new_rows)
        self.report = ImportReport()
        self.lora: dict[str, dict[str, str]] = {}
        self.names: dict[str, str] = {}  # plain name -> name in the file
        self.repeated: list[str] = []  # names in the file whose plain names others have, too
        for name in tensors:
            adapter = LORA.search(name)
            if adapter:
                weight = today_name(LORA.sub(".weight", name), layout)
                self.lora.setdefault(weight, {})[adapter[1]] = name
            elif today_name(name, layout) in self.names:
                self.repeated.append(name)
            else:
                self.names[today_name(name, layout)] = name
        self.tensors = tensors
        self.steps = self._plan(allow_missing)

    def _plan(self, allow_missing: Sequence[str]) -> list[Step]:
        layout = self.layout

        def allowed(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in allow_missing)

        steps, missing, mismatched, used = [], [], [], set()
        for name, expected in self.model.state_dict().items():
            original = original_name(name, layout, self.config)
            origin: Path | str | None = None
            source, stored, shape = "", torch.float32, expected.shape
            if original in self.names:
                used.add(original)
                source = self.names[original]
                info = self.tensors[source]
                origin, stored, shape = info.file, info.dtype, info.shape
                if name in VOCABULARY and shape[0] < expected.shape[0]:
                    self.report.new.append(f"{name}[{shape[0]}:]")
                    shape = torch.Size([expected.shape[0], *shape[1:]])
                self._say(name, original)
            elif original is None and (part := self._part_of(name)):
                origin, source, tensor = part
                stored, shape = tensor.dtype, tensor.shape
                self.report.taken[name] = str(origin)
            elif original is None or allowed(original):
                self.report.new.append(name)
            else:
                missing.append(original)
            if shape != expected.shape:
                mismatched.append(f"{original or name} {tuple(shape)} instead of {tuple(expected.shape)}")
            steps.append(Step(name, expected.shape, self._dtype(name, stored), origin, source))
        unexpected = list(self.repeated)
        for name in self.names.keys() - used:
            reason = reason_to_drop(name, layout) or ("named by --allow-missing" if allowed(name) else None)
            if reason is None:
                unexpected.append(name)
            else:
                self.report.dropped[self.names[name]] = reason
        for weight, halves in self.lora.items():
            unexpected += [] if weight in used and len(halves) == 2 else list(halves.values())
        problems = list_problems(missing, unexpected, mismatched)
        if problems:
            raise ValueError(
                f"not a {layout.name} checkpoint as its config.json says: of {len(self.tensors)} tensors, "
                f"{'; '.join(problems)}. If you know why, name tensors that may be missing or left over with "
                "--allow-missing; a wrong shape cannot be imported"
            )
        order = list(dict.fromkeys(info.file for info in self.tensors.values()))
        return sorted(steps, key=lambda step: self._rank(step.origin, order))

    def _rank(self, origin: Path | str | None, files: list[Path]) -> int:
        """Files first, in their order, then parts, then what is new: each is opened once."""
        return files.index(origin) if isinstance(origin, Path) else len(files) + (origin is None)

    def _say(self, name: str, original: str) -> None:
        if name == original:
            self.report.matched.append(name)
        else:
            self.report.renamed[self.names[original]] = name
        if original in self.lora:
            self.report.folded.append(self.names[original])

    def _part_of(self, name: str) -> tuple[str, str, torch.Tensor] | None:
        """Which part holds a tensor that the checkpoint does not hold, and under which name."""
        places = {TOWER: ("vision tower", "")} | {ours: ("SAM", theirs) for ours, theirs in SAM_PARTS.items()}
        for prefix, (part, theirs) in places.items():
            if name.startswith(prefix) and part in self.parts:
                source = theirs + name.removeprefix(prefix)
                tensor = self.parts[part].get(source)
                return None if tensor is None else (part, source, tensor)
        return None

    def _dtype(self, name: str, stored: torch.dtype) -> torch.dtype:
        if any(part in name.split(".") for part in self.model._keep_in_fp32_modules_strict):
            return torch.float32 if self.dtype is not None else stored
        return self.dtype or stored

    # ------------------------------------------------------------------ writing

    @cached_property
    def lora_values(self) -> dict[str, torch.Tensor]:
        """All halves of the LoRA: small, and in other files than the weights they belong to."""
        names = [name for halves in self.lora.values() for name in halves.values()]
        return {name: tensor.clone() for name, tensor in self._read(names).items()}

    def write(self, folder: Path, max_shard_size: int = 10**9) -> None:
        """
        Writes `model*.safetensors` (and the index) into a folder. Files that are there already and complete are kept, so
        that a run that was killed goes on.

        Args:
            max_shard_size: Bytes of one file; the memory needed is about this plus the checkpoint's largest file.
        """
        shards = list(self._shards(max_shard_size))
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        total = sum(step.size for step in self.steps)
        with tqdm(total=total, unit="B", unit_scale=True, desc="weights") as progress:
            for name, steps in zip(names, shards, strict=True):
                if not _is_complete(folder / name, steps):
                    unfinished = folder / f"{name}.unfinished"
                    with ExitStack() as stack:
                        save_file(dict(self._tensors(steps, stack)), unfinished, metadata={"format": "pt"})
                    os.replace(unfinished, folder / name)
                progress.update(sum(step.size for step in steps))
        if len(shards) > 1:
            weight_map = {step.name: name for name, steps in zip(names, shards, strict=True) for step in steps}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def buffers(self) -> dict[str, torch.Tensor]:
        """What the checkpoint holds though it is no weight (rotary frequencies), by original names: for exporting."""
        names = [name for name, reason in self.report.dropped.items() if reason == COMPUTED]
        return {name: tensor.clone() for name, tensor in self._read(names).items()}

    def _shards(self, limit: int) -> Iterator[list[Step]]:
        """Steps by output file: of one origin each, so that only one weight file is mapped at a time."""
        shard: list[Step] = []
        for step in self.steps:
            if shard and (step.origin != shard[0].origin or sum(s.size for s in shard) + step.size > limit):
                yield shard
                shard = []
            shard.append(step)
        if shard:
            yield shard

    def _tensors(self, steps: list[Step], stack: ExitStack) -> Iterator[tuple[str, torch.Tensor]]:
        origin = steps[0].origin
        if origin is None:
            fresh = self._fresh([step.name for step in steps])
            yield from ((step.name, fresh[step.name].to(step.dtype)) for step in steps)
        elif isinstance(origin, str):
            state = self.parts[origin]
            yield from ((step.name, state[step.source].to(step.dtype).contiguous()) for step in steps)
        else:
            get = stack.enter_context(open_tensors(origin))
            for step in steps:
                yield step.name, self._converted(step, get(step.source))

    def _converted(self, step: Step, tensor: torch.Tensor) -> torch.Tensor:
        halves = self.lora.get(today_name(step.source, self.layout))
        if halves is not None:
            a, b = (self.lora_values[halves[half]].float() for half in "AB")
            tensor = (tensor.float() + self.lora_scale * (b @ a)).to(tensor.dtype)
        if step.name in VOCABULARY and self.new_rows:
            rows = torch.zeros(step.shape, dtype=step.dtype)
            rows[: len(tensor)] = tensor
            old = torch.ones(len(tensor), dtype=torch.bool)
            old[[row for row in self.new_rows if row < len(tensor)]] = False
            total = sum(
                part[mask].float().sum(0) for part, mask in zip(tensor.split(4096), old.split(4096), strict=True)
            )
            rows[self.new_rows] = (total / old.sum()).to(step.dtype)
            return rows
        return tensor.to(step.dtype).contiguous()

    def _read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """Some small tensors, each of their files opened once."""
        values: dict[str, torch.Tensor] = {}
        for file in {self.tensors[name].file for name in names}:
            with open_tensors(file) as get:
                values |= {name: get(name) for name in names if self.tensors[name].file == file}
        return values

    def _fresh(self, names: list[str]) -> dict[str, torch.Tensor]:
        """New tensors as the model initialises them, always the same ones."""
        values: dict[str, torch.Tensor] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
                module: Any = self.model.get_submodule(path).to_empty(device="cpu", recurse=False)
                self.model._init_weights(module)
                values |= {f"{path}.{name}": tensor for name, tensor in module.state_dict().items()}
        return values


def _is_complete(file: Path, steps: list[Step]) -> bool:
    """Files appear under their names when they are whole; one of another plan holds other tensors."""
    if not file.is_file():
        return False
    with safe_open(file, "pt") as tensors:
        return set(tensors.keys()) == {step.name for step in steps}
