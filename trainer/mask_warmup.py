"""
First stage of training from fresh parts: teach neck, mask decoder and projectors before the language model moves.

A fresh mask decoder first learns "everything is background", and a joint run pays language-model time for every step of
that. Here the frozen language model reads each phrase once, without a picture; its `[SEG]` states are kept, and only
projector, neck and decoder train on them. The joint stage then starts with masks that already follow the phrase.

Two more losses, which cost next to nothing, say more directly what belongs together. The prompts of phrases are drawn to
the image embeddings under their masks, whose product with them should already be the mask; so the decoder's attention
finds its place. And the image tokens learn to speak the language model's words: averaged over a mask, they are drawn to
the mean input embedding of its phrase, and of the words that phrases are made of, some token is near each that the image
shows and none is near the others. So the language model finds words where it looked at noise, and can tell what is absent.
That needs masks and image tokens in one frame, hence a shared vision tower; other models go without.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from tqdm import tqdm

from mglmm.modeling_mglmm import MglmmForConditionalGeneration, MglmmImageFeatures
from mglmm.modeling_mglmm.mask_losses import mask_losses
from mglmm.modeling_mglmm.seg_states import gather_seg_states
from mglmm.processing import MglmmProcessor
from mglmm.processing.uscdf import SEG_TOKEN, parse, render_phrase

from .data_collator import masks_of
from .feature_cache import FeatureCache
from .trainable import UNTRAINED

QUESTION = "Please segment {}."
ANSWER = "Sure, {}."
MASK_PATH = ("pixel_neck", "mask_projector", "prompt_encoder", "mask_decoder")
TEMPERATURE = 0.07  # of the contrast between the phrases of a batch, as in CLIP's initialisation
WORD_WEIGHT = 0.25  # as strong as the presence loss, the image tokens tell less well what is absent
MIN_IMAGES = 3  # that a word must be said of
# Logistic regression on the cosine: where a word is as likely there as not, and the slope; about what training finds.
PRESENT_SIMILARITY, PRESENCE_SCALE = 0.35, 11.0


def phrases_of(messages: Iterable[dict[str, str]]) -> list[str]:
    """Phrase of every mask of a conversation, in the order of the masks."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    return [mention.phrase for answer in answers for mention in parse(answer).mentions]


@torch.no_grad()
def phrase_states(
    model: MglmmForConditionalGeneration,
    processor: MglmmProcessor,
    phrases: Sequence[str],
    answers: Literal["uscdf", "plain"] = "uscdf",
    batch_size: int = 32,
) -> dict[str, torch.Tensor]:
    """
    `[SEG]` state `(hidden,)` of each distinct phrase, from a one-turn conversation without a picture, whose answer repeats
    the phrase or, with "plain", does not.
    """
    distinct = sorted(set(phrases), key=lambda phrase: (len(phrase), phrase))
    states: dict[str, torch.Tensor] = {}
    for start in tqdm(range(0, len(distinct), batch_size), desc="phrases", unit="batch"):
        batch = distinct[start : start + batch_size]
        conversations = []
        for phrase in batch:
            answer = ANSWER.format(render_phrase(phrase) if answers == "uscdf" else SEG_TOKEN)
            question = {"role": "user", "content": QUESTION.format(phrase)}
            conversations.append([question, {"role": "assistant", "content": answer}])
        options = {"padding": True, "padding_side": "right"}
        inputs = processor.apply_chat_template(
            conversations, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs=options
        ).to(model.device)
        hidden = model.model(**inputs).last_hidden_state
        found, rows, _ = gather_seg_states(hidden[:, :-1], inputs["input_ids"][:, 1:], model.config.seg_token_id)
        states |= {batch[int(row)]: state.float().cpu() for row, state in zip(rows, found, strict=True)}
    return states


@torch.no_grad()
def phrase_words(
    model: MglmmForConditionalGeneration, processor: MglmmProcessor, phrases: Iterable[str]
) -> dict[str, torch.Tensor]:
    """Mean input embedding `(hidden,)` of each distinct phrase's tokens, less the mean of the whole vocabulary."""
    embeddings = cast(nn.Embedding, model.get_input_embeddings()).weight.float()
    mean = embeddings.mean(0)
    words = {}
    for phrase in sorted(set(phrases)):
        token_ids = processor.tokenizer(f" {phrase}", add_special_tokens=False)["input_ids"]
        words[phrase] = (embeddings[token_ids].mean(0) - mean).cpu()
    return words


def words_of_images(rows: Dataset) -> dict[tuple[str, str], set[str]]:
    """
    Words of all phrases ever said of each image (source, image id), over all its rows. Words said of fewer than
    `MIN_IMAGES` are left out: they may as well be there unsaid.
    """
    words: dict[tuple[str, str], set[str]] = {}
    for source, image_id, conversation in zip(rows["source"], rows["image_id"], rows["messages"], strict=True):
        said = words.setdefault((source, image_id), set())
        for phrase in phrases_of(conversation):
            said.update(re.findall(r"[^\W_]+(?:-[^\W_]+)*", phrase.lower()))
    count = Counter(word for said in words.values() for word in said)
    return {image: {word for word in said if count[word] >= MIN_IMAGES} for image, said in words.items()}


@torch.no_grad()
def standardise_prompts(model: MglmmForConditionalGeneration, states: Iterable[torch.Tensor]) -> None:
    """
    Rescales a fresh `mask_projector` so that over these states every unit of both layers has mean 0 and variance 1
    before its activation (data-dependent initialisation, Kraehenbuehl et al., ICLR 2016). What tells phrases apart is a
    few percent of a `[SEG]` state's power; without this the decoder sees nearly the same prompt for all of them.
    """
    projector = model.model.mask_projector
    inputs = torch.stack(list(states)).to(projector.linear_1.weight)
    for linear in (projector.linear_1, projector.linear_2):
        outputs = linear(inputs)
        mean, scale = outputs.mean(0), outputs.std(0).clamp_min(1e-6)
        linear.weight /= scale[:, None]
        linear.bias.copy_((linear.bias - mean) / scale)
        inputs = projector.act(linear(inputs))


class MaskWarmupCollator:
    """
    Rows of (image, masks, phrases) to image features, phrase states, phrase words and labels of at most
    `masks_per_image` masks each, drawn anew at every visit; and which words of the vocabulary each image shows.
    """

    def __init__(
        self,
        processor: MglmmProcessor,
        states: dict[str, torch.Tensor],
        words: dict[str, torch.Tensor],
        image_words: dict[tuple[str, str], set[str]],
        feature_cache: FeatureCache,
        masks_per_image: int,
        mask_size: int,
    ):
        self.processor, self.states, self.words, self.feature_cache = processor, states, words, feature_cache
        self.image_words, self.vocabulary = image_words, sorted(set().union(*image_words.values()))
        self.masks_per_image, self.mask_size = masks_per_image, mask_size

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        phrases, labels, index, present = [], [], [], []
        for i, row in enumerate(rows):
            shown = self.image_words[row["source"], row["image_id"]]
            present.append([word in shown for word in self.vocabulary])
            pairs = list(zip(phrases_of(row["messages"]), masks_of(row), strict=True))
            # Drawn by torch, whose generator differs from worker to worker.
            chosen = torch.randperm(len(pairs))[: self.masks_per_image]
            pairs = [pairs[k] for k in chosen.tolist()]
            phrases += [phrase for phrase, _ in pairs]
            labels.append(self.processor.mask_labels([mask for _, mask in pairs], self.mask_size))
            index += [i] * len(pairs)
        return {
            "image_features": self.feature_cache.load([row["image"] for row in rows]),
            "seg_states": torch.stack([self.states[phrase] for phrase in phrases]),
            "words": torch.stack([self.words[phrase] for phrase in phrases]),
            "present": torch.tensor(present, dtype=torch.bool),
            "mask_image_index": torch.tensor(index),
            "mask_labels": torch.cat(labels),
        }


class MaskWarmup(nn.Module):
    """
    The mask path and the image projector alone, in the form that `Trainer` takes: losses from `[SEG]` states that are
    given. Freezes everything else in `model`, whose own modules these are.

    Args:
        vocabulary: `(words, hidden)`, rows of `phrase_words` in the order of the collator's vocabulary.
    """

    vocabulary: torch.Tensor
    mean_word: torch.Tensor

    def __init__(self, model: MglmmForConditionalGeneration, vocabulary: torch.Tensor):
        super().__init__()
        self.register_buffer("vocabulary", vocabulary, persistent=False)
        mean = cast(nn.Embedding, model.get_input_embeddings()).weight.detach().float().mean(0)
        self.register_buffer("mean_word", mean, persistent=False)
        self.config = model.config
        names = (*MASK_PATH, *(["multi_modal_projector"] if model.config.share_vision_tower else []))
        modules = {name: getattr(model.model, name) for name in names if getattr(model.model, name) is not None}
        self.trained = nn.ModuleDict(modules)
        self._models = (model.model,)  # in a tuple, hence no submodule: checkpoints hold the trained modules alone
        model.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("prompt_encoder" not in name and not any(part in name for part in UNTRAINED))

    def forward(
        self,
        image_features: MglmmImageFeatures,
        seg_states: torch.Tensor,
        words: torch.Tensor,
        present: torch.Tensor,
        mask_image_index: torch.LongTensor,
        mask_labels: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        model = self._models[0]
        embeddings = model.get_image_embeddings(image_features)
        pred_masks = model.decode_masks(seg_states, mask_image_index, embeddings)
        bce, dice = mask_losses(pred_masks, mask_labels, len(mask_labels))
        loss = self._weighted(bce, dice)
        prompts = model.mask_projector(seg_states)
        products = torch.einsum("mc,mchw->mhw", prompts, embeddings[mask_image_index]) / prompts.shape[-1] ** 0.5
        pixel_loss = self._weighted(*mask_losses(products, mask_labels, len(mask_labels)))
        loss = loss + pixel_loss
        losses = {"mask_bce_loss": bce, "mask_dice_loss": dice, "pixel_loss": pixel_loss}
        if self.config.share_vision_tower:
            tokens = model.project_image_features(image_features) - self.mean_word
            losses["word_loss"] = word_loss(tokens[mask_image_index], words, mask_labels == 1)
            losses["presence_loss"] = presence_loss(tokens, self.vocabulary, present)
            loss = loss + WORD_WEIGHT * losses["word_loss"] + losses["presence_loss"]
        return {"loss": loss, **losses}

    def _weighted(self, bce: torch.Tensor, dice: torch.Tensor) -> torch.Tensor:
        return self.config.bce_loss_weight * bce + self.config.dice_loss_weight * dice


def word_loss(tokens: torch.Tensor, words: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """
    Draws the image tokens under each mask to the words of its phrase: squared distance relative to the words' own
    power, plus the cross entropy of telling the phrase from the others of the batch (InfoNCE, equal phrases merged).

    Args:
        tokens: `(masks, side * side, hidden)`, row-major, of each mask's image.
        words: `(masks, hidden)` from `phrase_words`.
        masks: `(masks, h, w)` bool in the frame of the image tokens.
    """
    side = round(tokens.shape[1] ** 0.5)
    share = F.adaptive_avg_pool2d(masks[:, None].float(), side).flatten(1)
    pooled = torch.einsum("mt,mth->mh", share / share.sum(1, keepdim=True).clamp_min(1e-6), tokens)
    distance = (pooled - words).square().mean() / words.square().mean()
    phrases, target = torch.unique(words, dim=0, return_inverse=True)
    similarity = F.normalize(pooled, dim=-1) @ F.normalize(phrases, dim=-1).T
    return distance + F.cross_entropy(similarity / TEMPERATURE, target)


def presence_loss(tokens: torch.Tensor, vocabulary: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """
    Binary cross entropy of telling the words of an image from the others by the image token nearest to each; present and
    absent words weigh the same.

    Args:
        tokens: `(images, tokens, hidden)`.
        vocabulary: `(words, hidden)`.
        present: `(images, words)` bool.
    """
    similarity = F.normalize(tokens, dim=-1) @ F.normalize(vocabulary, dim=-1).T
    logits = PRESENCE_SCALE * (similarity.amax(1) - PRESENT_SIMILARITY)
    losses = F.binary_cross_entropy_with_logits(logits, present.to(logits), reduction="none")
    return losses[present].sum() / present.sum().clamp_min(1) + losses[~present].sum() / (~present).sum().clamp_min(1)
