"""MGLMM: a large multimodal model that describes images in text whose phrases carry masks."""

from pathlib import Path as _Path
from typing import Any as _Any

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


def load_metric(name: str) -> _Any:
    """
    A metric of this package as `evaluate.load` gives it, without a network.

    Args:
        name: Such as "referring_segmentation", "segcap" or "captioning".

    Raises:
        ValueError: there is no such metric; names those that there are.
    """
    import evaluate

    from mglmm.evaluation import metrics

    files = {path.stem: path for path in _Path(metrics.__file__).parent.glob("[!_]*.py")}
    if name not in files:
        raise ValueError(f"there is no metric {name!r}; there are {', '.join(sorted(files))}")
    return evaluate.load(str(files[name]))


__all__ = [
    "MglmmConfig",
    "MglmmForConditionalGeneration",
    "MglmmModel",
    "MglmmPipeline",
    "MglmmProcessor",
    "SegCap",
    "Segment",
    "load_metric",
]
