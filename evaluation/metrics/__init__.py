"""
Metrics: plain accumulators `<Name>Score` with `update` and `compute`, and around each of them an `evaluate.Metric`, which
`evaluate.load(".../evaluation/metrics/<name>.py")` finds.
"""

from .captioning import CaptioningScore
from .generalized_referring_segmentation import GeneralizedReferringSegmentationScore
from .panoptic_segmentation import PanopticSegmentationScore
from .referring_segmentation import ReferringSegmentationScore
from .region_captioning import RegionCaptioningScore
from .segcap import SegCapScore
from .video_object_segmentation import VideoObjectSegmentationScore

__all__ = [
    "CaptioningScore",
    "GeneralizedReferringSegmentationScore",
    "PanopticSegmentationScore",
    "ReferringSegmentationScore",
    "RegionCaptioningScore",
    "SegCapScore",
    "VideoObjectSegmentationScore",
]
