"""Rewards for answers with masks, in TRL's signature: `reward(prompts, completions, completion_ids, **columns)`.

Each is called with one entry per completion in every list and returns one value in [0, 1] per completion, or None where
it does not apply. The columns are those of a USCDF row; a completion is measured against the row's last assistant turn,
which is what `grpo.py` asks for. Grammar is judged on token ids: decoded text cannot tell the token `[SEG]`, which has a
mask, from its letters, and a policy would soon learn to spell it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.mask_losses import IGNORE_VALUE
from mglmm.modeling_mglmm.seg_states import gather_seg_states
from mglmm.processing import MglmmProcessor
from mglmm.processing.images import load_image
from mglmm.processing.uscdf import PHRASE_START, count_seg, is_well_formed, parse

from .data_collator import masks_of

CAPTION_TASKS = ("caption", "grounded_caption", "panoptic", "fine")
"""Tasks of USCDF rows whose answer is a description."""

NGRAMS = 4
LENGTH_SIGMA = 6.0
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class WellFormed:
    """
    1 for an answer that keeps to the grammar (`uscdf.is_well_formed`: tags balanced, each phrase followed by its
    `[SEG]`, each `[SEG]` after a phrase), else 0. An answer without any tag keeps to it. Not for data prepared with
    `--format plain`, whose `[SEG]`s have no phrases.
    """

    __name__ = "well_formed"  # TRL logs rewards under it

    def __init__(self, processor: MglmmProcessor):
        self.processor = processor

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        return [float(is_well_formed(self.processor.split_pieces(ids))) for ids in completion_ids]


class PhrasesHaveMasks:
    """Of the phrases an answer opens, the share that got a mask of their own; 1 for an answer without phrases."""

    __name__ = "phrases_have_masks"

    def __init__(self, processor: MglmmProcessor):
        self.processor = processor

    def __call__(self, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[float]:
        rewards = []
        for ids in completion_ids:
            pieces = self.processor.split_pieces(ids)
            opened = pieces.count((PHRASE_START, True))
            with_mask = sum(mention.span is not None for mention in parse(pieces).mentions)
            rewards.append(with_mask / opened if opened else 1.0)
        return rewards


class CountMatch:
    """`1 - |n - m| / max(n, m)` for an answer with n masks where m are due; 1 where there are none and none are due."""

    __name__ = "count_match"

    def __init__(self, processor: MglmmProcessor):
        self.processor = processor

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        messages: Sequence[Sequence[Mapping[str, str]]],
        **columns: Any,
    ) -> list[float]:
        rewards = []
        for ids, turns in zip(completion_ids, messages, strict=True):
            few, many = sorted((list(ids).count(self.processor.seg_token_id), count_seg([last_answer(turns)])))
            rewards.append(few / many if many else 1.0)
        return rewards


class MaskIoU:
    """
    Intersection over union of an answer's masks with the row's, paired so that their sum is largest while the order of
    both is kept, divided by the larger of the two counts: a mask too many or too few costs its share, and two masks in
    each other's place are wrong. 1 where there are no masks and none are due. Pixels under `ignore_mask` do not count.

    The masks come from a teacher-forced pass of prompt and completion through the model that is being trained, without
    gradients and without any lasting change to it.

    Args:
        model: The policy, plain or with an adapter; a model that gets its adapter later may be passed before.
        processor: Of the model.
        batch_size: Completions per pass.
    """

    __name__ = "mask_iou"

    def __init__(
        self, model: MglmmForConditionalGeneration | PeftModel, processor: MglmmProcessor, batch_size: int = 8
    ):
        # PEFT puts its layers into the model it is given, so the base model answers with the adapter.
        self.model: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.processor = processor
        self.batch_size = batch_size

    def __call__(
        self,
        prompts: Sequence[Sequence[Mapping[str, Any]]],
        completion_ids: Sequence[Sequence[int]],
        messages: Sequence[Sequence[Mapping[str, str]]],
        masks: Sequence[Sequence[Mapping[str, Any]]],
        ignore_mask: Sequence[Mapping[str, Any] | None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """
        Args:
            prompts: Conversations with one picture each, as `uscdf.conversation_of` makes them.
            messages, masks, ignore_mask: Columns of the USCDF rows.

        Raises:
            ValueError: a prompt does not hold exactly one picture.
        """
        due = [count_seg([last_answer(turns)]) for turns in messages]
        given = [list(ids).count(self.processor.seg_token_id) for ids in completion_ids]
        rewards = [float(n == m == 0) for n, m in zip(given, due, strict=True)]
        rows = [i for i, (n, m) in enumerate(zip(given, due, strict=True)) if n and m]
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            logits = self._mask_logits([prompts[i] for i in batch], [completion_ids[i] for i in batch])
            for i, row_logits in zip(batch, logits, strict=True):
                ignored = None if ignore_mask is None else ignore_mask[i]
                labels = masks_of({"masks": masks[i][len(masks[i]) - due[i] :], "ignore_mask": ignored})
                iou = np.zeros((len(row_logits), len(labels)))
                for ious, logit in zip(iou, row_logits, strict=True):  # one by one: an answer may be all [SEG]s
                    (mask,) = self.processor.post_process_masks(logit[None], labels[0].shape)
                    ious[:] = [_iou(mask, label) for label in labels]
                rewards[i] = ordered_overlap(iou) / max(iou.shape)
        return rewards

    def _mask_logits(self, prompts: list[Any], completions: list[Sequence[int]]) -> tuple[torch.Tensor, ...]:
        """Per completion, logits `(n_i, h, w)` of the masks it asks for."""
        model, device = self.model, self.model.device
        prompt_ids = self.processor.apply_chat_template(
            prompts,
            tokenize=True,
            return_dict=True,
            add_generation_prompt=True,
            processor_kwargs={"images_kwargs": {"return_pixels": False}},
        )["input_ids"]
        rows = [torch.tensor([*start, *end]) for start, end in zip(prompt_ids, completions, strict=True)]
        input_ids = pad_sequence(rows, batch_first=True).to(device)
        attention_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device)
        next_tokens: Any = input_ids[:, 1:] * attention_mask[:, 1:]
        for row, start in zip(next_tokens, prompt_ids, strict=True):
            row[: len(start) - 1] = self.processor.image_token_id  # the masks of earlier turns are not asked for

        pictures: dict[tuple[tuple[int, int], bytes], int] = {}  # a group's completions share one picture
        index: list[int] = []
        images: list[Image.Image] = []
        for prompt in prompts:
            image = load_image(_picture_of(prompt))
            index.append(pictures.setdefault((image.size, image.tobytes()), len(pictures)))
            if index[-1] == len(images):
                images.append(image)
        inputs = self.processor(images=images, return_tensors="pt")
        pixels = {name: inputs[name].to(device) for name in ("pixel_values", "sam_pixel_values") if name in inputs}
        image_index = torch.tensor(index, device=device)

        with torch.no_grad(), _evaluating(model):
            features = model.encode_images(**pixels)
            vision_of_rows = MglmmImageFeatures(vision_hidden_states=features.vision_hidden_states[image_index])
            states = model.model(
                input_ids=input_ids, attention_mask=attention_mask, image_features=vision_of_rows, use_cache=False
            ).last_hidden_state
            seg_states, rows_of_masks, _ = gather_seg_states(states[:, :-1], next_tokens, self.processor.seg_token_id)
            embeddings = model.model.get_image_embeddings(features)
            logits = model.model.decode_masks(seg_states, image_index[rows_of_masks], embeddings)
        return logits.split(torch.bincount(rows_of_masks, minlength=len(rows)).tolist())


class CaptionCider:
    """
    CIDEr-D of an answer's clean text (`uscdf.parse`) against the row's, divided by its maximum of 10; None for rows of
    other tasks than `CAPTION_TASKS`.

    n-grams are weighted by how rare they are in a corpus given once, not in the batch, in which a group's completions
    share their reference: normally the answers of the rows trained on, see `captions_of`. Words are lower-cased
    runs of letters and digits, so scores lie near those made with the Java tokenizer of the COCO toolkit, but are not
    equal to them.

    Args:
        processor: Of the model.
        corpus: Reference captions, each a document of its own.

    Raises:
        ValueError: the corpus has fewer than 2 captions, and so no rare words.
    """

    __name__ = "caption_cider"

    def __init__(self, processor: MglmmProcessor, corpus: Iterable[str]):
        self.processor = processor
        self.document_frequency: Counter[tuple[str, ...]] = Counter()
        documents = 0
        for caption in corpus:
            documents += 1
            self.document_frequency.update(_ngrams(caption).keys())
        if documents < 2:
            raise ValueError(
                f"caption_cider weighs words by how rare they are among captions, but there are {documents}: give it rows "
                f"of the tasks {', '.join(CAPTION_TASKS)}, or drop it"
            )
        self.log_documents = math.log(documents)

    def __call__(
        self,
        completion_ids: Sequence[Sequence[int]],
        messages: Sequence[Sequence[Mapping[str, str]]],
        task: Sequence[str],
        **columns: Any,
    ) -> list[float | None]:
        rewards: list[float | None] = []
        for ids, turns, kind in zip(completion_ids, messages, task, strict=True):
            if kind in CAPTION_TASKS:
                caption = parse(self.processor.split_pieces(ids)).clean_text
                rewards.append(self.score(caption, parse(last_answer(turns)["content"]).clean_text) / 10)
            else:
                rewards.append(None)
        return rewards

    def score(self, caption: str, reference: str) -> float:
        """CIDEr-D in [0, 10] of a clean text with one reference."""
        counts = _ngrams(caption), _ngrams(reference)
        ours, theirs = (self._weights(count) for count in counts)
        lengths = [sum(count for ngram, count in count_of.items() if len(ngram) == 2) for count_of in counts]
        total = 0.0
        for n in range(1, NGRAMS + 1):
            a, b = ({ngram: w for ngram, w in side.items() if len(ngram) == n} for side in (ours, theirs))
            norm = math.sqrt(sum(w * w for w in a.values()) * sum(w * w for w in b.values()))
            if norm:
                total += sum(min(w, b[ngram]) * b[ngram] for ngram, w in a.items() if ngram in b) / norm
        return 10 / NGRAMS * total * math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * LENGTH_SIGMA**2))

    def _weights(self, counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {
            ngram: count * (self.log_documents - math.log(max(1, self.document_frequency[ngram])))
            for ngram, count in counts.items()
        }


def last_answer(messages: Sequence[Mapping[str, str]]) -> Mapping[str, str]:
    """The turn that completions are measured against; raises `ValueError` if a conversation does not end with one."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"a conversation must end with an assistant turn, not one of {messages[-1]['role']}")
    return messages[-1]


def captions_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Clean texts of the answers in those USCDF rows that `CaptionCider` applies to."""
    for row in rows:
        if row["task"] in CAPTION_TASKS:
            yield from (parse(turn["content"]).clean_text for turn in row["messages"] if turn["role"] == "assistant")


def ordered_overlap(iou: np.ndarray) -> float:
    """
    Largest sum over pairs of rows and columns of `iou` `(n, m)`, each used at most once and both in rising order.

    >>> ordered_overlap(np.array([[0.0, 1.0], [1.0, 0.0]]))  # in each other's place: one of them can be paired
    1.0
    """
    best = np.zeros(iou.shape[1] + 1)
    for row in iou:
        best[1:] = np.maximum.accumulate(np.maximum(best[1:], best[:-1] + row))
    return float(best[-1])


def _iou(mask: np.ndarray, label: np.ndarray) -> float:
    """Of a bool mask with a label in {0, 1, 255 = does not count}; 1 where both are empty."""
    mask, target = mask & (label != IGNORE_VALUE), label == 1
    union = int((mask | target).sum())
    return int((mask & target).sum()) / union if union else 1.0


def _picture_of(prompt: Sequence[Mapping[str, Any]]) -> Any:
    pictures = [part["image"] for message in prompt for part in message["content"] if part["type"] == "image"]
    if len(pictures) != 1:
        raise ValueError(f"mask_iou needs prompts with one picture each, got one with {len(pictures)}")
    return pictures[0]


def _ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, NGRAMS + 1) for i in range(len(words) - n + 1))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
