"""The MGLMM model: configuration, modules, losses, generation with masks, assembly from pretrained parts."""

from .configuration_mglmm import MglmmConfig
from .generation_mglmm import MglmmGenerateOutput
from .modeling_mglmm import (
    MglmmForConditionalGeneration,
    MglmmImageFeatures,
    MglmmModel,
    MglmmOutput,
    MglmmPreTrainedModel,
)

__all__ = [
    "MglmmConfig",
    "MglmmForConditionalGeneration",
    "MglmmGenerateOutput",
    "MglmmImageFeatures",
    "MglmmModel",
    "MglmmOutput",
    "MglmmPreTrainedModel",
]
