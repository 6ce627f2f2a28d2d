"""Makes transformers' auto classes and pipelines know MGLMM, and gathers the public names."""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.pipelines import PIPELINE_REGISTRY

from .modeling_mglmm import MglmmConfig, MglmmForConditionalGeneration, MglmmModel
from .processing import MglmmProcessor, SegCap, Segment
from .processing.pipeline_mglmm import TASK, MglmmPipeline
from .sharing import push_to_hub

AutoConfig.register("mglmm", MglmmConfig, exist_ok=True)
AutoModel.register(MglmmConfig, MglmmModel, exist_ok=True)
AutoModelForImageTextToText.register(MglmmConfig, MglmmForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MglmmConfig, MglmmProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=MglmmPipeline, pt_model=AutoModelForImageTextToText, type="multimodal"
)

# What is saved carries its code, and so loads with `trust_remote_code=True` where this package is not installed.
MglmmConfig.register_for_auto_class()
MglmmModel.register_for_auto_class("AutoModel")
MglmmForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
MglmmProcessor.register_for_auto_class()
# The card's template does not travel with the code, so the method that renders it is added here.
MglmmForConditionalGeneration.push_to_hub = push_to_hub  # type: ignore[assignment]

__all__ = [
    "MglmmConfig",
    "MglmmForConditionalGeneration",
    "MglmmModel",
    "MglmmPipeline",
    "MglmmProcessor",
    "SegCap",
    "Segment",
]
