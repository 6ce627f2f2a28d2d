"""Whether two short phrases mean the same: what mask recall asks for besides the IoU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from mglmm.datasets_scripts.labels import Noun

DEFAULT_ENCODER = "bert-base-uncased"
MAX_TOKENS = 512
DETERMINERS = frozenset("a an the all some one two several".split())


class TextSimilarity(Protocol):
    """A call gives the similarities of all pairs, float32 `(len(first), len(second))`, at most 1 (up to rounding)."""

    name: str

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray: ...


class BertSimilarity:
    """
    Cosine similarity of sentence embeddings: the mean of `last_hidden_state` over all tokens, `[CLS]` and `[SEP]` included,
    of at most 512 tokens. With `bert-base-uncased` this is the text similarity of GLaMM's and MGLMM's mask recall.

    Each distinct string is embedded once and kept (3 KB for an encoder of 768 dimensions).

    Args:
        model: Name or folder of any encoder that `AutoModel` knows; of a sentence-transformers folder the transformer is
            taken, with the same mean pooling.
        device: Where the encoder runs.
        batch_size: Strings embedded at a time.

    Raises:
        ValueError: the encoder is not at hand.
    """

    def __init__(
        self, model: str | Path = DEFAULT_ENCODER, device: str | torch.device = "cpu", batch_size: int = 64
    ) -> None:
        self.name = str(model)
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(model)
            self._encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval().to(device)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the text encoder {self.name!r} is not at hand ({type(error).__name__}): download it, name the folder of "
                "one, or compare the phrases without an encoder: text similarity 'exact-noun'"
            ) from error
        self._batch_size = batch_size
        self._embeddings: dict[str, np.ndarray] = {}

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        self.embed([*first, *second])
        if not first or not second:
            return np.zeros((len(first), len(second)), dtype=np.float32)
        rows, columns = (np.stack([self._embeddings[text] for text in texts]) for texts in (first, second))
        return rows @ columns.T

    @torch.inference_mode()
    def embed(self, texts: Iterable[str]) -> None:
        """Embed what is not known yet, in full batches: worth a call with all phrases before the first comparison."""
        # By length, so that little is padding.
        missing = sorted(set(texts) - self._embeddings.keys(), key=lambda text: (len(text), text))
        for start in range(0, len(missing), self._batch_size):
            batch = missing[start : start + self._batch_size]
            inputs = self._tokenizer(
                batch,
                padding=True,
                truncation=True,
                max_length=min(MAX_TOKENS, self._tokenizer.model_max_length),
                return_tensors="pt",
            ).to(self._encoder.device)
            states = self._encoder(**inputs).last_hidden_state
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            means = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
            vectors = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
            self._embeddings.update(zip(batch, vectors, strict=True))


class ExactSimilarity:
    """
    1 for phrases that are the same, otherwise 0. Needs no encoder.

    Args:
        normalize: Compare as `same_noun` does (the name is "exact-noun"); otherwise letter by letter ("exact").
    """

    def __init__(self, normalize: bool = True) -> None:
        self.name = "exact-noun" if normalize else "exact"
        self._normalize = normalize

    def __call__(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        same = same_noun if self._normalize else str.__eq__
        pairs = [[same(a, b) for b in second] for a in first]
        return np.array(pairs, dtype=np.float32).reshape(len(first), len(second))


def load_text_similarity(name: str | Path, device: str | torch.device = "cpu") -> TextSimilarity:
    """
    "exact" and "exact-noun" are those of `ExactSimilarity`; everything else names an encoder for `BertSimilarity`.

    Raises:
        ValueError: the encoder is not at hand.
    """
    if name in ("exact", "exact-noun"):
        return ExactSimilarity(normalize=name == "exact-noun")
    return BertSimilarity(name, device)


def same_noun(first: str, second: str) -> bool:
    """
    Whether two phrases are the same noun: articles and quantities before it dropped, case and number folded.

    Example:
        >>> same_noun("The red cars", "a red car"), same_noun("a person", "two people"), same_noun("a car", "a truck")
        (True, True, False)
    """
    return not _forms(first).isdisjoint(_forms(second))


@lru_cache(maxsize=10_000)
def _forms(phrase: str) -> frozenset[str]:
    """The bare noun and its plural; nothing where there is no word."""
    words = phrase.casefold().strip(" \t\n.,;:!?").split()
    while len(words) > 1 and words[0] in DETERMINERS:
        words = words[1:]
    noun = " ".join(words)
    return frozenset({noun, Noun(noun).bare(2)}) if noun else frozenset()
