"""`pipeline("image-segmentation-captioning")`: pictures and instructions in, `SegCap`s out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import GenerationConfig, Pipeline

from .images import load_image
from .segcap import SegCap

TASK = "image-segmentation-captioning"

# Instructions in the words that models of this package are trained on.
PANOPTIC = "Describe the image and mark everything you mention."
OBJECT = "Segment {}."
FINE = "Describe {} in detail, with a mask after each part."
MAIN_OBJECT = "the main object"
GRANULARITIES = ("panoptic", "object", "fine")
DETERMINERS = frozenset(
    "the a an all any both each every some this that these those my your his her its our their".split()
)


def make_instruction(text: str | None = None, granularity: str | None = None, target: str | None = None) -> str:
    """
    The instruction itself, or the one that stands for a granularity (`"panoptic"` by default).

    Raises `ValueError` for an empty instruction, an unknown granularity, or a combination that means nothing.
    """
    for name, value in (("text", text), ("granularity", granularity), ("target", target)):
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{name} must be a string, got {type(value).__name__}; for one per image pass dicts")
    if text is not None:
        if granularity is not None or target is not None:
            raise ValueError("pass either text or granularity (with target), not both: the text is the instruction")
        if not text.strip():
            raise ValueError("the instruction is empty: say what to describe or segment, or choose a granularity")
        return text
    granularity = granularity or "panoptic"
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}: choose one of {', '.join(GRANULARITIES)}")
    if target is not None and not target.strip():
        raise ValueError("the target is empty: name the object, such as target='the person'")
    if granularity == "panoptic":
        if target is not None:
            raise ValueError(
                f"target={target!r} goes with granularity='object' or 'fine'; panoptic describes everything"
            )
        return PANOPTIC
    if target is None:
        if granularity == "object":
            raise ValueError("granularity='object' needs the object to segment, such as target='the person'")
        target = MAIN_OBJECT
    words = target.split()
    named = " ".join(words if words[0].lower() in DETERMINERS else ["the", *words])
    return (OBJECT if granularity == "object" else FINE).format(named)


class MglmmPipeline(Pipeline):
    """
    Segmentation captioning: text whose phrases carry masks.

    ```python
    pipe = pipeline("image-segmentation-captioning", model="path/or/hub-id")
    answer = pipe("photo.jpg")  # a SegCap
    answers = pipe(["a.jpg", "b.jpg"], "Segment the dog.", batch_size=2)  # a list of SegCaps
    ```

    The defaults of every argument of a call may be given to `pipeline(...)`, too.
    """

    # transformers types these as None and as its optional base classes.
    _load_processor: Any = True
    _load_image_processor: Any = False
    _load_feature_extractor: Any = False
    _load_tokenizer: Any = False
    model: Any
    processor: Any
    tokenizer: Any
    _pipeline_calls_generate = True
    _default_generation_config = GenerationConfig(max_new_tokens=512)

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.tokenizer.padding_side = "left"  # generation continues at the right

    def __call__(self, images: Any, text: str | None = None, regions: Any = None, **kwargs: Any) -> Any:
        """
        Args:
            images: One picture: path, URL, `PIL.Image.Image`, array or tensor (see `load_image`), or a dict with the key
                `"image"` and its own `"text"` or `"granularity"` and `"target"`, and `"regions"`, which win over those of
                the call.
                Many: a list, a 4-dimensional array, or, to stream, a generator, a dataset, `KeyDataset` ….
            text (`str`, *optional*): The instruction. Without it `granularity` gives one.
            regions (`list`, *optional*): For models with a region encoder: a box [x1, y1, x2, y2] in pixels of the upright
                picture for each `<region>` of the instruction, such as "What is in <region>?".
            granularity (`str`, *optional*, defaults to `"panoptic"`):
                `"panoptic"` describes everything, `"object"` segments `target`, `"fine"` describes the parts of `target`
                or, without one, of the main object.
            target (`str`, *optional*): What `granularity` is about, such as `"the left person"`.
            mask_threshold (`float`, *optional*, defaults to 0.0): Logit above which a pixel belongs to a mask.
            batch_size (`int`, *optional*, defaults to 1): Pictures that are answered together.
            kwargs: Options of `generate`. `max_new_tokens` is 512 unless set, and never more than the context leaves.

        Returns:
            A `SegCap` with its picture for one image, a list of them for a list, an iterator for a stream.

        Raises:
            ValueError: unreadable picture, empty or contradictory instruction, prompt longer than the context, or more
                than one answer per image asked for. For streams when the item is reached.
        """
        if text is not None:
            kwargs["text"] = text
        if regions is not None:
            kwargs["regions"] = regions
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
            images = list(images)
        single = isinstance(images, str | Path | bytes | Mapping | Image.Image | np.ndarray | torch.Tensor)
        if isinstance(images, list | tuple):
            images = list(images)
            if not images:
                return []
        elif not single and not isinstance(images, Dataset) and isinstance(images, Iterable):
            images = (image for image in images)
        return super().__call__(images, **kwargs)

    def _sanitize_parameters(
        self,
        text: str | None = None,
        granularity: str | None = None,
        target: str | None = None,
        mask_threshold: float | None = None,
        regions: Any = None,
        **generate_kwargs: Any,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        preprocess: dict[str, Any] = {}
        if any(value is not None for value in (text, granularity, target)):
            preprocess["instruction"] = make_instruction(text, granularity, target)
        if regions is not None:
            preprocess["regions"] = regions
        forward = {"generate_kwargs": generate_kwargs} if generate_kwargs else {}
        postprocess = {} if mask_threshold is None else {"mask_threshold": mask_threshold}
        return preprocess, forward, postprocess

    def preprocess(self, input_: Any, instruction: str = PANOPTIC, regions: Any = None) -> dict[str, Any]:
        if isinstance(input_, Mapping):
            own = {key: input_.get(key) for key in ("text", "granularity", "target")}
            if any(value is not None for value in own.values()):
                instruction = make_instruction(**own)
            regions = input_.get("regions", regions)
            if input_.get("image") is None:
                raise ValueError(f"a dict input needs the key 'image', got {', '.join(map(repr, input_)) or 'no keys'}")
            input_ = input_["image"]
        picture = load_image(input_)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": instruction}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"regions": regions},
        )
        # Flat: tensors of one dimension are joined without padding, and items have any number of boxes.
        boxes = inputs.pop("region_boxes", torch.zeros(0)).flatten()
        # In lists, so that one item and a batch of one look alike.
        return {**inputs, "region_boxes": boxes, "pictures": [picture], "queries": [instruction]}

    def _forward(self, input_tensors: dict[str, Any], generate_kwargs: dict[str, Any] | None = None) -> dict[str, Any]:
        kept = {key: input_tensors.pop(key) for key in ("original_sizes", "pictures", "queries")}
        input_ids = input_tensors["input_ids"]
        boxes = input_tensors.pop("region_boxes").view(-1, 4)
        if len(boxes):
            input_tensors["region_boxes"] = boxes
        options = self._bounded(generate_kwargs or {}, input_ids.shape[1])
        config = options.get("generation_config", self.model.generation_config)
        grammar = self.processor.logits_processor(
            input_ids.shape[1], options.get("max_new_tokens", config.max_new_tokens)
        )
        grammar.extend(options.get("logits_processor", []))  # the caller's have the last word
        options["logits_processor"] = grammar
        outputs = self.model.generate(**input_tensors, **options, output_masks=True)
        if len(outputs.generated_ids) != len(input_ids):
            raise ValueError(
                f"{len(outputs.generated_ids)} answers were generated for {len(input_ids)} images: the pipeline gives one "
                "answer per image; leave num_return_sequences at 1, or use model.generate"
            )
        # The first entry tells the pipeline's iterator the size of the batch.
        return {
            "generated_ids": outputs.generated_ids,
            "pred_masks": list(outputs.pred_masks),
            "mask_scores": list(outputs.mask_scores),
            **kept,
        }

    def _bounded(self, generate_kwargs: dict[str, Any], prompt_length: int) -> dict[str, Any]:
        """The options of `generate`, with `max_new_tokens` cut to what the context leaves."""
        room = self.tokenizer.model_max_length - prompt_length
        if room < 1:
            raise ValueError(
                f"the prompt has {prompt_length} tokens and fills the context of {self.tokenizer.model_max_length}: "
                "shorten the text"
            )
        options = self._prepare_generate_kwargs(generate_kwargs)
        config = options.get("generation_config", self.model.generation_config)
        wanted = options.get("max_new_tokens", config.max_new_tokens)
        if wanted is None or wanted <= room:
            return options
        return self._prepare_generate_kwargs(generate_kwargs, max_new_tokens=room)

    def postprocess(self, model_outputs: dict[str, Any], mask_threshold: float = 0.0) -> SegCap:
        (result,) = self.processor.post_process_segcap(
            SimpleNamespace(**model_outputs),
            target_sizes=model_outputs["original_sizes"],
            queries=model_outputs["queries"],
            images=model_outputs["pictures"],
            mask_threshold=mask_threshold,
        )
        return result

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves the model, the processor (which transformers' pipelines leave out) and this pipeline's code."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory, **kwargs)


__all__ = ["MglmmPipeline"]
