"""`mglmm export-weights`: a model of this package as a folder that the code of LISA or GLaMM loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from .importing import ORIGINAL_FILES
from .modeling_mglmm import MglmmConfig
from .modeling_mglmm.weight_export import check_exportable, export_weights
from .modeling_mglmm.weight_layouts import GLAMM, LISA

FORMATS = {"lisa": LISA, "glamm": GLAMM}


def export_checkpoint(
    model: str | Path,
    output: str | Path,
    format: str,
    *,
    original: str | Path | None = None,
    max_shard_size: int = 10**10,
) -> int:
    """
    Args:
        model: Folder of a saved model, such as one that `import_weights` or `mglmm merge` wrote.
        output: Folder to make.
        format: "lisa" or "glamm".
        original: Folder with the `config.json` and `tokenizer.model` of that layout; by default what `import_weights` kept
            beside the weights.
        max_shard_size: Bytes of one weight file.

    Returns:
        Number of tensors written.

    Raises:
        ValueError, FileNotFoundError: the model does not fit the layout, or the files of the layout are missing.
    """
    folder, output, layout = Path(model), Path(output), FORMATS[format]
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no folder of a saved model: it holds no config.json")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists and is not empty: name a new folder")
    kept = folder / "original" if original is None else Path(original)
    missing = [name for name in ("config.json", "tokenizer.model") if not (kept / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{kept} lacks {' and '.join(missing)}, which {layout.name}'s code reads: name a folder of that layout with "
            "--original"
        )
    config = MglmmConfig.from_pretrained(folder)
    check_exportable(config, layout)
    settings = json.loads((kept / "config.json").read_text(encoding="utf-8"))
    settings |= {"architectures": [layout.architecture], "vocab_size": config.image_token_id}
    if layout is GLAMM:
        settings["with_region"] = config.region_feature_layers is not None
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as made:
        unfinished = Path(made) / "folder"
        unfinished.mkdir()
        count = export_weights(folder, unfinished, layout, kept, max_shard_size)
        for name in ORIGINAL_FILES:
            if (kept / name).is_file():
                shutil.copyfile(kept / name, unfinished / name)
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        if output.is_dir():
            output.rmdir()
        os.replace(unfinished, output)
    return count
