"""Text format, processor, result object and pipeline of MGLMM."""

from .processing_mglmm import MglmmProcessor
from .segcap import SegCap, Segment

__all__ = ["MglmmProcessor", "SegCap", "Segment"]
