"""MGLMM: a large multimodal model that describes images in text whose phrases carry masks."""

from pathlib import Path as _Path

# In a checkout the sub-packages (`mglmm.processing`, ...) are siblings of this folder, in a wheel they lie inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "modeling_mglmm" / "__init__.py").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

from .registration import (  # noqa: E402
    MglmmConfig,
    MglmmForConditionalGeneration,
    MglmmModel,
    MglmmPipeline,
    MglmmProcessor,
    SegCap,
    Segment,
)

__version__ = "0.1.0"

__all__ = [
    "MglmmConfig",
    "MglmmForConditionalGeneration",
    "MglmmModel",
    "MglmmPipeline",
    "MglmmProcessor",
    "SegCap",
    "Segment",
]
