"""Metrics: plain accumulators with `update` and `compute`."""

from .referring_segmentation import ReferringSegmentationScore
from .segcap import SegCapScore

__all__ = ["ReferringSegmentationScore", "SegCapScore"]
