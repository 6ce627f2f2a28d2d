"""`mglmm import-weights`: a published checkpoint of another code base as an ordinary folder of this package."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SamModel,
)
from transformers.dynamic_module_utils import custom_object_save

from .hub_cards.cards import model_card
from .modeling_mglmm.sam_checkpoint import load_sam_checkpoint
from .modeling_mglmm.weight_export import BUFFERS
from .modeling_mglmm.weight_files import list_tensors
from .modeling_mglmm.weight_import import ImportReport, WeightImport
from .modeling_mglmm.weight_layouts import (
    GLAMM,
    LISA,
    LLAVA,
    LLAVA_HF,
    MGLMM,
    Layout,
    check_known,
    find_layout,
    mglmm_config,
    read_sam_config,
    sees_regions,
    today_name,
)
from .processing import MglmmProcessor
from .processing.chat_templates import GLAMM_V1, LISA_LLAMA_2, LISA_V1, LLAVA_V1
from .processing.original_tokenizer import load_original_tokenizer
from .processing.uscdf import CONTROL_TOKENS, IMAGE_TOKEN, SEG_TOKEN

ORIGINAL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PAPERS = {
    LISA: "LISA: Reasoning Segmentation via Large Language Model (https://arxiv.org/abs/2308.00692)",
    GLAMM: "GLaMM: Pixel Grounding Large Multimodal Model (https://arxiv.org/abs/2311.03356)",
    MGLMM: "Instruction-guided Multi-Granularity Segmentation and Captioning with Large Multimodal Model "
    "(https://arxiv.org/abs/2409.13407)",
    LLAVA: "Improved Baselines with Visual Instruction Tuning (https://arxiv.org/abs/2310.03744)",
}
PAPERS[LLAVA_HF] = PAPERS[LLAVA]
SAM_PAPER = "Segment Anything (https://arxiv.org/abs/2304.02643)"


def import_weights(
    source: str | Path,
    output: str | Path,
    *,
    vision_tower: str | None = None,
    sam: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    template: Literal["v1", "llama_2"] = "v1",
    add_phrase_tags: bool = False,
    lora_alpha: float = 16,
    allow_missing: Sequence[str] = (),
    license: str | None = None,
    max_shard_size: int = 10**9,
) -> ImportReport:
    """
    Args:
        source: Folder or hub id of a LISA, GLaMM, MGLMM or LLaVA checkpoint, or a consolidated training file.
        output: Folder to make; it appears when it is complete. A run that was stopped goes on when started again.
        vision_tower: Folder or hub id; by default the one that the checkpoint's `config.json` names.
        sam: For LLaVA, which has none: a Meta `.pth` file, or folder or hub id of a transformers SAM.
        base: For a training file without `config.json` and tokenizer: folder or hub id of the model it started from.
        dtype: "float32", "bfloat16" or "float16" of all but the mask path (float32); by default as stored.
        template: "llama_2" for a LISA that was trained with the llava_llama_2 conversations.
        add_phrase_tags: Give a LISA the tokens `<p>` and `</p>`, which it lacks, to train it on USCDF.
        lora_alpha: Of an unmerged LoRA, 16 in the originals; its rank is read off the tensors.
        allow_missing: Tensors (names, or patterns with `*`) that may be missing or left over.
        license: For the card, an identifier that the Hub knows; by default the one of the source's own card, if any.
        max_shard_size: Bytes of one weight file.

    Returns:
        What became of every tensor; also written as `import.json`.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the source, or which option is missing.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: name a new folder")
    files = _fetch(str(source))
    folder = files if files.is_dir() else files.parent
    settings = folder if base is None else _fetch(base)
    original = _read_config(settings)
    tensors = list_tensors(files)
    layout = find_layout(tensors)
    named = {today_name(name, layout): info for name, info in tensors.items()}

    parts: dict[str, Any] = {}
    vision, image_processor, tower = _vision(layout, original, [folder, settings], vision_tower, parts)
    if not layout.sam_prefix:
        parts["SAM"] = _load_sam(sam)
    elif sam is not None:
        raise ValueError(f"a {layout.name} checkpoint holds its own SAM: leave --sam out")
    sam_config: Any = parts["SAM"].config if "SAM" in parts else read_sam_config(layout, named)
    embeddings = "model.language_model.embed_tokens.weight" if layout is LLAVA_HF else "model.embed_tokens.weight"
    if embeddings not in named:
        raise ValueError(f"{files} holds no {embeddings}: it is no whole language model")
    rows = named[embeddings].shape[0]
    tokenizer, base_size = _tokenizer(layout, settings, original)
    old_size = len(tokenizer) if layout is LLAVA_HF else min(map(tokenizer.convert_tokens_to_ids, layout.added_tokens))
    if layout.sam_prefix:
        check_known(layout, original, vision, base_size, rows)
        if len(tokenizer) - 1 != rows:  # `<image>` is ours
            raise ValueError(
                f"the tokenizer of {settings} has {len(tokenizer) - 1} entries but the embeddings have {rows} rows: these "
                "are not of one checkpoint"
            )
    processor = _processor(
        layout,
        tokenizer,
        image_processor,
        vision,
        original,
        template,
        add_phrase_tags,
        sees_regions(layout, original, named),
        sam_config.vision_config.image_size,
    )
    # Vocabulary rows without an original: `<image>`, and for LLaVA the tags and what its matrix has been padded with.
    known_size = rows if layout.sam_prefix else min(rows, old_size)
    vocab_size = max(rows, len(tokenizer))
    config = mglmm_config(
        layout,
        original,
        named,
        vision,
        sam_config,
        vocab_size=vocab_size,
        image_token_id=processor.image_token_id,
        seg_token_id=processor.seg_token_id,
        region_token_id=processor.region_token_id,
    )
    lora_rank = next((info.shape[0] for name, info in tensors.items() if "lora_A" in name), 1)
    plan = WeightImport(
        layout,
        config,
        tensors,
        parts,
        dtype=None if dtype is None else DTYPES[dtype],
        lora_scale=lora_alpha / lora_rank,
        new_rows=range(known_size, vocab_size),
        allow_missing=allow_missing,
    )
    stored = named[embeddings].dtype
    config.dtype = stored if dtype is None else DTYPES[dtype]

    unfinished = _unfinished(
        output, files, tensors, [str(source), tower, sam, base, dtype, add_phrase_tags, lora_alpha, max_shard_size]
    )
    plan.write(unfinished, max_shard_size)
    custom_object_save(plan.model, unfinished, config=config)  # type: ignore[arg-type]
    config.architectures = [type(plan.model).__name__]
    config.save_pretrained(unfinished)
    GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    record = {
        "source": str(source),
        "layout": layout.name,
        "vision_tower": tower,
        "sam": sam,
        "config": original,
        "tensors": asdict(plan.report),
    }
    (unfinished / "import.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    kept = unfinished / "original"
    kept.mkdir(exist_ok=True)
    for name in ORIGINAL_FILES:
        if (settings / name).is_file():
            shutil.copyfile(settings / name, kept / name)
    if buffers := plan.buffers():
        save_file(buffers, kept / BUFFERS)
    _card(plan, processor, layout, str(source), tower, sam, output.resolve().name, folder, license).save(
        unfinished / "README.md"
    )
    (unfinished / "plan.json").unlink()
    if output.is_dir():
        output.rmdir()
    os.replace(unfinished, output)
    return plan.report


def _fetch(name: str) -> Path:
    """A folder or file as it is, a hub id as a downloaded folder."""
    if Path(name).exists():
        return Path(name)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise FileNotFoundError(f"there is no folder or file {name!r}")
    return Path(snapshot_download(name, ignore_patterns=["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.py"]))


def _read_config(folder: Path) -> dict[str, Any]:
    """`config.json` as plain JSON: its `model_type` is that of transformers' own LLaVA, which it is not."""
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: name the model that training started from with --base")
    try:
        original = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(original, dict):
        raise ValueError(f"{path} holds a {type(original).__name__}, not the settings of a model")
    return original


def _vision(
    layout: Layout, original: dict[str, Any], folders: list[Path], named: str | None, parts: dict[str, PreTrainedModel]
) -> tuple[PreTrainedConfig, Any, str]:
    """Configuration and image processor of the vision tower and its name; its model becomes one of `parts`."""
    if layout is LLAVA_HF and named is None:
        config = AutoConfig.from_pretrained(folders[0])
        return config.vision_config, AutoImageProcessor.from_pretrained(folders[0], backend="pil"), str(folders[0])
    name = named or original.get("mm_vision_tower") or original.get("vision_tower")
    if not isinstance(name, str):
        raise ValueError("config.json names no vision tower: name one with --vision-tower")
    # A name in a file is looked for beside the checkpoint, then on the hub; it cannot lead elsewhere.
    inside = named is None and ".." not in Path(name).parts
    beside = [folder.resolve().parent / name for folder in folders if inside]
    path = _fetch(str(next((path for path in beside if path.is_dir()), name)))
    config = AutoConfig.from_pretrained(path)
    config = getattr(config, "vision_config", config)
    model = AutoModel.from_pretrained(path, dtype="auto")
    parts["vision tower"] = getattr(model, "vision_model", model).eval()
    return config, AutoImageProcessor.from_pretrained(path, backend="pil"), name


def _load_sam(sam: str | None) -> PreTrainedModel:
    if sam is None:
        raise ValueError(
            "a LLaVA checkpoint holds no SAM: name one with --sam (Meta's .pth file, a folder or a hub id)"
        )
    if Path(sam).is_file():
        return load_sam_checkpoint(sam)
    return SamModel.from_pretrained(_fetch(sam), dtype=torch.float32).eval()


def _tokenizer(layout: Layout, folder: Path, original: dict[str, Any]) -> tuple[Any, int]:
    """The tokenizer, and how many pieces its SentencePiece model has."""
    if layout is LLAVA_HF:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        tokenizer = load_original_tokenizer(
            folder,
            added_tokens=layout.added_tokens,
            model_max_length=original.get("max_position_embeddings"),
        )
    return tokenizer, tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)


def _processor(
    layout: Layout,
    tokenizer: Any,
    image_processor: Any,
    vision: PreTrainedConfig,
    original: dict[str, Any],
    template: str,
    add_phrase_tags: bool,
    has_regions: bool,
    sam_image_size: int,
) -> MglmmProcessor:
    templates = {LISA: LISA_LLAMA_2 if template == "llama_2" else LISA_V1, GLAMM: GLAMM_V1, MGLMM: GLAMM_V1}
    if template == "llama_2" and layout is not LISA:
        raise ValueError(f"only LISA was trained with llava_llama_2 conversations, not {layout.name}")
    whole = original.get("mm_vision_select_feature") == "cls_patch" or (
        layout is LLAVA_HF and original.get("vision_feature_select_strategy") == "full"
    )
    return MglmmProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        sam_image_size=sam_image_size,
        patch_size=vision.patch_size,
        num_prefix_tokens=int(whole),
        chat_template=templates.get(layout, LLAVA_V1),
        control_tokens=(IMAGE_TOKEN, SEG_TOKEN) if layout is LISA and not add_phrase_tags else CONTROL_TOKENS,
        # Published models write a [SEG] without a phrase, too.
        keep_to_grammar=not layout.sam_prefix,
        region_token="<bbox>" if has_regions else None,
        region_box_frame="picture" if has_regions else "tower",
    )


def _unfinished(output: Path, files: Path, tensors: dict[str, Any], settings: list[Any]) -> Path:
    """The folder that becomes `output`: what another run with the same settings and files left is gone on with."""
    stats = [
        (str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in {info.file for info in tensors.values()}
    ]
    plan = json.dumps([str(files), sorted(stats), settings])
    folder = output.with_name(f".{output.name}.unfinished")
    if folder.is_dir() and (not (folder / "plan.json").is_file() or (folder / "plan.json").read_text() != plan):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan.json").write_text(plan, encoding="utf-8")
    return folder


def _card(
    plan: WeightImport,
    processor: MglmmProcessor,
    layout: Layout,
    source: str,
    tower: str,
    sam: str | None,
    name: str,
    folder: Path,
    license: str | None,
) -> Any:
    license = license or _license_of(folder)
    papers = [PAPERS[layout], *([SAM_PAPER] if sam else [])]
    lines = [
        f"These weights are imported: they were published as `{source}` ({layout.name}) and converted by "
        f"`mglmm import-weights` without training. Vision tower: `{tower}`." + (f" SAM: `{sam}`." if sam else ""),
        f"License of the source: {license or 'not stated in its files; look it up at its publisher before use'}.",
        "Please cite: " + "; ".join(papers) + ".",
        f"Tensors: {plan.report}.",
    ]
    ids = [part for part in (source, tower, sam) if part and part.count("/") == 1 and not Path(part).exists()]
    card = model_card(
        plan.model, processor, model_name=name, base_model=ids, license=license, source="\n\n".join(lines)
    )
    card.data["tags"] = [*(card.data["tags"] or []), "imported"]
    return card


def _license_of(folder: Path) -> str | None:
    """What the source's own card says."""
    path = folder / "README.md"
    return ModelCard.load(path).data.get("license") if path.is_file() else None
