"""Processor of MGLMM: pictures and conversations to tensors, generated ids and mask logits to `SegCap`s."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from transformers import BatchFeature, LogitsProcessorList, ProcessorMixin, SamImageProcessorPil
from transformers.processing_utils import ImagesKwargs, MultiModalData, ProcessingKwargs

from .chat_templates import LLAVA_V1
from .frames import MglmmFrameMixin
from .grammar import UscdfGrammar
from .images import load_image
from .regions import middle_of, read_regions
from .segcap import SegCap, Segment
from .uscdf import (
    CONTROL_TOKENS,
    IMAGE_TOKEN,
    PHRASE_END,
    PHRASE_START,
    REGION_TOKEN,
    SEG_TOKEN,
    escape_control_tokens,
    parse,
)

if TYPE_CHECKING:
    # On saving, transformers copies every file that a sibling import names: so the pipeline travels with the processor.
    from .pipeline_mglmm import MglmmPipeline  # noqa: F401


class MglmmImagesKwargs(ImagesKwargs, total=False):
    """
    return_pixels (`bool`, *optional*, defaults to `True`):
        `False` expands `<image>` and returns the sizes, but no pixels: for images whose features are at hand.
    """

    return_pixels: bool


class MglmmProcessorKwargs(ProcessingKwargs, total=False):
    images_kwargs: MglmmImagesKwargs


@functools.lru_cache(maxsize=8)
def _sam_image_processor(size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> SamImageProcessorPil:
    pad = {"height": size, "width": size}
    return SamImageProcessorPil(size={"longest_edge": size}, pad_size=pad, image_mean=list(mean), image_std=list(std))


class MglmmProcessor(MglmmFrameMixin, ProcessorMixin):
    r"""
    Args:
        image_processor: The vision tower's own image processor.
        tokenizer: The language model's tokenizer; the `control_tokens` are added if it lacks them.
        sam_image_size (`int`, *optional*, defaults to 1024):
            Side of the pixel encoder's square input: the picture's longer side is resized to it, the rest is padding
            at the right and bottom. `None`: the pixel encoder is the vision tower and sees the same pixels, so only
            `pixel_values` is returned.
        sam_image_mean, sam_image_std: Per channel, of values in [0, 1]; SAM's by default.
        patch_size (`int`, *optional*, defaults to 14), image_token_stride (`int`, *optional*, defaults to 1),
        num_prefix_tokens (`int`, *optional*, defaults to 0):
            One `<image>` becomes `(H / patch / stride) * (W / patch / stride) + num_prefix_tokens` image tokens.
        keep_to_grammar (`bool`, *optional*, defaults to `True`): Let the pipeline and the evaluation generate well-formed
            USCDF only. `False` for a model that answers in another form, such as a `[SEG]` without a phrase.
        control_tokens (`Sequence[str]`, *optional*, defaults to `("<image>", "[SEG]", "<p>", "</p>")`): Tokens that are no
            text. `("<image>", "[SEG]")` for a model whose answers have no phrases, such as LISA: its `<p>` is text.
        chat_template (`str`, *optional*): Jinja; LLaVA v1's by default.
        region_token (`str`, *optional*): What `<region>` becomes for a model with a region encoder (GLaMM: `<bbox>`); added
            to the tokenizer if it lacks it. `None`: the model has none.
        region_box_frame (`"tower"` or `"picture"`, *optional*, defaults to `"tower"`): What boxes become fractions of: of
            what the vision tower sees after its centre crop, which is right, or of the whole picture, as GLaMM does.
    """

    valid_processor_kwargs = MglmmProcessorKwargs
    text_kwargs = {"padding": False}

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        sam_image_size: int | None = 1024,
        sam_image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        sam_image_std: Sequence[float] = (0.229, 0.224, 0.225),
        patch_size: int = 14,
        image_token_stride: int = 1,
        num_prefix_tokens: int = 0,
        keep_to_grammar: bool = True,
        control_tokens: Sequence[str] = CONTROL_TOKENS,
        chat_template: str | None = None,
        region_token: str | None = None,
        region_box_frame: Literal["tower", "picture"] = "tower",
        **kwargs: Any,
    ):
        self.sam_image_size = sam_image_size
        self.sam_image_mean = list(sam_image_mean)
        self.sam_image_std = list(sam_image_std)
        self.patch_size = patch_size
        self.image_token_stride = image_token_stride
        self.num_prefix_tokens = num_prefix_tokens
        self.keep_to_grammar = keep_to_grammar
        self.control_tokens = list(control_tokens)
        needed = CONTROL_TOKENS if keep_to_grammar else (IMAGE_TOKEN, SEG_TOKEN)
        if missing := [token for token in needed if token not in control_tokens]:
            raise ValueError(
                f"keep_to_grammar={keep_to_grammar} needs {missing}, which control_tokens={self.control_tokens} lack: add "
                "them, or set keep_to_grammar=False for a model without phrases"
            )
        self.image_token = IMAGE_TOKEN
        known = tokenizer.get_vocab()
        # Not "special": decoding with skip_special_tokens keeps the tags that carry the meaning of the answer.
        tokens = [AddedToken(t, special=t == IMAGE_TOKEN, normalized=False) for t in control_tokens if t not in known]
        tokenizer.add_tokens(tokens)
        self.image_token_id, self.seg_token_id = tokenizer.convert_tokens_to_ids([IMAGE_TOKEN, SEG_TOKEN])
        if region_box_frame not in ("tower", "picture"):
            raise ValueError(f"region_box_frame must be 'tower' or 'picture', got {region_box_frame!r}")
        self.region_token, self.region_box_frame = region_token, region_box_frame
        if region_token is not None and region_token not in known:
            tokenizer.add_tokens([AddedToken(region_token, special=True, normalized=False)])
        super().__init__(image_processor, tokenizer, chat_template=chat_template or LLAVA_V1)
        if not {"height", "width"} <= dict(self._size).keys():
            raise ValueError(
                f"the vision tower's image processor must give pictures of one size, but its size is {dict(self._size)} "
                "without a centre crop: set a height and width"
            )
        if sam_image_size is None and image_processor.do_center_crop:
            raise ValueError(
                "a vision tower that is also the pixel encoder must see the whole picture: set do_center_crop=False and a "
                "height and width in its image processor"
            )

    @property
    def control_token_ids(self) -> list[int]:
        """Ids of the `control_tokens`: by default `<image>`, `[SEG]`, `<p>` and `</p>`."""
        return self.tokenizer.convert_tokens_to_ids(self.control_tokens)

    def logits_processor(self, prompt_length: int, max_new_tokens: int | None = None) -> LogitsProcessorList:
        """
        The `logits_processor` for `generate` that keeps answers well-formed; empty unless `keep_to_grammar`.

        Args:
            prompt_length: Tokens of the (left-padded) prompts.
            max_new_tokens: That of `generate`, so that an answer is not cut inside a phrase.
        """
        if not self.keep_to_grammar:
            return LogitsProcessorList()
        tokens = [*self.control_tokens, *([self.region_token] if self.region_token else [])]
        grammar = UscdfGrammar(self.tokenizer, prompt_length, max_new_tokens, tokens)
        return LogitsProcessorList([grammar])

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "sam_pixel_values", "region_boxes"]

    # ------------------------------------------------------------------ inputs

    def __call__(self, images: Any = None, text: Any = None, regions: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Pictures and prompts to model inputs, as in every vision-language processor of transformers.

        Args:
            images: One picture or a list, each anything `load_image` takes. One per `<image>` in `text`.
            text: One prompt or a list, normally made by `apply_chat_template`. Padding, if asked for, goes to the left,
                as `generate` needs it, unless `padding_side` says otherwise.
            regions: Boxes [x1, y1, x2, y2] in pixels of the upright pictures, one per `<region>` (or region token) of all
                prompts in their order; each lies in the last picture before it.

        Returns:
            `input_ids`, `attention_mask`, `pixel_values` `(images, 3, H, W)`, `sam_pixel_values` `(images, 3, S, S)`
            unless the tower is shared, `original_sizes` `(images, 2)` as height, width of the upright pictures,
            `region_boxes` float32 `(regions, 4)` in [0, 1] if there are any (see `region_box_frame`).

        Raises:
            ValueError: unreadable picture, wrong number of pictures, prompt longer than the tokenizer's
                `model_max_length`; regions for a model without region encoder, another number of boxes than of
                `<region>`s, or a box that is none, not in its picture, or wholly outside of what the tower sees.
        """
        if images is not None:
            images = [load_image(image) for image in _flatten(images)]
        if "padding_side" not in kwargs.get("text_kwargs", {}):
            kwargs.setdefault("padding_side", "left")
        sizes = [image.size[::-1] for image in images or []]
        boxes, text = read_regions(regions, text, sizes, self)
        inputs = super().__call__(images=images, text=text, **kwargs)
        if "input_ids" in inputs:
            self._check_length(inputs["input_ids"], inputs["attention_mask"])
        if len(boxes):
            inputs["region_boxes"] = torch.from_numpy(boxes) if torch.is_tensor(inputs["input_ids"]) else boxes.tolist()
        return inputs

    @property
    def region_token_id(self) -> int | None:
        """Id of `region_token`; `None` for a model without region encoder."""
        return None if self.region_token is None else self.tokenizer.convert_tokens_to_ids(self.region_token)

    def _check_length(self, input_ids: Any, attention_mask: Any) -> None:
        limit = self.tokenizer.model_max_length
        for i, (row, mask) in enumerate(zip(input_ids, attention_mask, strict=True)):
            length = int(sum(mask))
            if length > limit:
                images = int((np.asarray(row) == self.image_token_id).sum())
                raise ValueError(
                    f"prompt {i} has {length} tokens ({images} of them for the image) but the context holds {limit}: "
                    "shorten the text"
                )

    def _process_images(
        self, images: list[Image.Image], return_pixels: bool = True, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        data: dict[str, Any] = {"original_sizes": [[image.height, image.width] for image in images]}
        for size in data["original_sizes"]:
            self.frame_of(size)  # refuses pictures that would vanish
        if return_pixels:
            data["pixel_values"] = self.image_processor([self._for_tower(i) for i in images], **kwargs)["pixel_values"]
            if self.sam_image_size is not None:
                sam = _sam_image_processor(self.sam_image_size, tuple(self.sam_image_mean), tuple(self.sam_image_std))
                data["sam_pixel_values"] = sam(images, return_tensors=kwargs.get("return_tensors"))["pixel_values"]
        return data, [self.image_token * self.num_image_tokens] * len(images)

    def _for_tower(self, image: Image.Image) -> Image.Image:
        box = middle_of((image.height, image.width))
        if not self.image_processor.do_center_crop or box == (0, 0, *image.size):
            return image
        return image.crop(box)

    @property
    def _size(self) -> Any:
        return self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size

    @property
    def vision_size(self) -> tuple[int, int]:
        """Height and width of `pixel_values`."""
        return self._size["height"], self._size["width"]

    @property
    def num_image_tokens(self) -> int:
        """Image tokens that one `<image>` becomes."""
        step = self.patch_size * self.image_token_stride
        height, width = self.vision_size
        return (height // step) * (width // step) + self.num_prefix_tokens

    def _get_num_multimodal_tokens(self, image_sizes: list | None = None, **kwargs: Any) -> MultiModalData:
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """
        transformers' `apply_chat_template`. What a user or system turn says is text: a tag or control token written in
        it is spelt out (`[SEG]` becomes `[ SEG]`), and an assistant turn may hold the answer tags only.
        """
        batched = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = conversation if batched else [conversation]
        escaped = [[self._escape(message) for message in messages] for messages in conversations]
        return super().apply_chat_template(escaped if batched else escaped[0], chat_template, **kwargs)

    def _escape(self, message: dict[str, Any]) -> dict[str, Any]:
        tokens = {REGION_TOKEN, *(token.content for token in self.tokenizer.added_tokens_decoder.values())}
        if message["role"] == "user":
            tokens.remove(REGION_TOKEN)  # a user may point at a region
        if message["role"] == "assistant":
            tokens -= {SEG_TOKEN, PHRASE_START, PHRASE_END}
        tokens = [token for token in tokens if len(token) > 1 and not token.isspace()]
        content = message["content"]
        if isinstance(content, str):
            return {**message, "content": escape_control_tokens(content, tokens)}
        items, before = [], ""
        for item in content:
            if item["type"] == "text":
                text = escape_control_tokens(item["text"], tokens)
                # Templates write the texts of a message one after the other: no token may arise where two of them meet.
                if any(token in before + text for token in tokens):
                    text = " " + text
                before += text
                item = {**item, "text": text}
            items.append(item)
        return {**message, "content": items}

    # ------------------------------------------------------------------ outputs

    def post_process_segcap(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor,
        queries: Sequence[str] | None = None,
        images: Sequence[Image.Image] | None = None,
        mask_threshold: float = 0.0,
    ) -> list[SegCap]:
        """
        What `generate(..., output_masks=True)` returned, as one `SegCap` per row at the size of its picture.

        Args:
            outputs: `MglmmGenerateOutput`.
            target_sizes: Height, width of each row's picture (`original_sizes` of the processor).
            queries: Instruction of each row; a `[SEG]` without a phrase gets it as its phrase.
            images: Pictures to attach to the results, for `plot()` and `to_html()`.
            mask_threshold: Logit above which a pixel belongs to a mask.
        """
        rows = len(outputs.generated_ids)
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        for name, given in (("target_sizes", sizes), ("queries", queries), ("images", images)):
            if given is not None and len(given) != rows:
                raise ValueError(f"{rows} generated rows but {len(given)} {name}")
        results = []
        for i in range(rows):
            pieces = self.split_pieces(outputs.generated_ids[i].tolist())
            answer = parse(pieces, query=queries[i] if queries else "")
            if len(answer.mentions) != len(outputs.pred_masks[i]):
                raise ValueError(
                    f"row {i} has {len(answer.mentions)} [SEG]s but {len(outputs.pred_masks[i])} masks: was its prompt "
                    "without an image?"
                )
            masks = self.post_process_masks(outputs.pred_masks[i], sizes[i], mask_threshold)
            scores = outputs.mask_scores[i].tolist()
            segments = [
                Segment(phrase=mention.phrase, span=mention.span, mask=mask, score=score)
                for mention, mask, score in zip(answer.mentions, masks, scores, strict=True)
            ]
            image = images[i] if images else None
            results.append(SegCap(answer.text.strip(), answer.clean_text, segments, image_size=sizes[i], image=image))
        return results

    def split_pieces(self, ids: Sequence[int]) -> list[tuple[str, bool]]:
        """Generated ids as (text, is_control) pieces: only a control *token* is a tag, never its letters."""
        control = dict(zip(self.control_token_ids, self.control_tokens, strict=True))
        pieces: list[tuple[str, bool]] = []
        start = 0
        for end, token in enumerate([*ids, self.seg_token_id]):
            if token in control:
                # Behind a first token: many tokenizers drop the space that the very first one of a text begins with.
                text = self.tokenizer.decode(
                    [self.seg_token_id, *ids[start:end]], skip_special_tokens=True, clean_up_tokenization_spaces=False
                ).removeprefix(SEG_TOKEN)
                pieces += [(text, False)] * bool(text)
                if end < len(ids):
                    pieces.append((control[token], True))
                start = end + 1
        return pieces


def _flatten(images: Any) -> list[Any]:
    """One picture, a list of them, or a list of lists (one list per prompt) as a flat list."""
    if not isinstance(images, list | tuple):
        return [images]
    return [image for item in images for image in _flatten(item)]


__all__ = ["MglmmProcessor"]
