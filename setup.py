"""Packaging of `mglmm`.

The rooms lie at the top level of the repository and are installed as sub-packages of `mglmm`: a library must not
install top-level modules called `processing` or `trainer`.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
ROOMS = {
    "mglmm": "mglmm",
    "mglmm.modeling_mglmm": "modeling_mglmm",
    "mglmm.processing": "processing",
    "mglmm.datasets_scripts": "datasets_scripts",
    "mglmm.trainer": "trainer",
    "mglmm.evaluation": "evaluation",
    "mglmm.hub_cards": "hub_cards",
}

EXTRAS = {
    # assembling the small checkpoint: its two pretrained parts are published as GGUF and ONNX files
    "small": ["gguf>=0.18", "onnx>=1.20"],
    "trl": ["trl>=1.16"],
    # a language model of 4 or 8 bits while training
    "quantization": ["bitsandbytes>=0.50"],
    # reading the tokenizers of published checkpoints
    "import": ["protobuf>=5", "sentencepiece>=0.2"],
    # captions: scorers and the Java programs of COCO
    "eval": ["pycocoevalcap>=1.2"],
    # annotating pictures by a server, and on more machines than one
    "annotate": ["openai>=3.50"],
    "ray": ["ray[data]>=2.60"],
    # parity of imported weights with Meta's own implementation
    "segment-anything": ["segment-anything>=1.0", "torchvision>=0.28"],
    "demo": ["scikit-image>=0.26"],
    "dev": [
        "build>=1.3",
        "hypothesis>=6.150",
        "mypy>=2.0",
        "openai>=3.50",
        "packaging>=25",
        "pytest>=9",
        "ray[data]>=2.60",
        "ruff>=0.15",
        "segment-anything>=1.0",
        "scikit-image>=0.26",
        "sentencepiece>=0.2",
        "setuptools>=77",
        "tensorboard>=2.20",
        "trl>=1.16",
    ],
}

setup(
    name="mglmm",
    version="0.1.0",
    description="Multi-granularity large multimodal model: image descriptions whose phrases carry masks",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        package
        for room, folder in ROOMS.items()
        for package in [room, *(f"{room}.{nested}" for nested in find_packages(str(HERE / folder)))]
    ],
    package_dir=ROOMS,
    package_data={
        "mglmm.small": ["*.safetensors", "*.json", "*.md"],
        "mglmm.processing": ["*.jinja"],
        "mglmm.trainer": ["recipes/**/*.yaml"],
        "mglmm.hub_cards": ["*.md", "*.jinja"],
    },
    install_requires=[
        "accelerate>=1.15",
        "datasets>=5.2",
        "evaluate>=0.4.6",
        "fsspec>=2025.3",
        "httpx2>=2.16",
        "huggingface_hub>=2.4",
        "ijson>=3.4",
        "jinja2>=3.1",
        "matplotlib>=3.10",
        "numpy>=2.2",
        "peft>=0.21",
        "pillow>=12",
        "pycocotools>=2.0.11",
        "pyarrow>=21",
        "pyyaml>=6.0",
        "safetensors>=0.7",
        "scipy>=1.15",
        "tokenizers>=0.22",
        "torch>=2.13",
        "tqdm>=4.66",
        "transformers>=5.23,<5.24",
        "typer>=0.20",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["mglmm=mglmm.cli:main"]},
)
