"""Keeps generation to the grammar of `uscdf.is_well_formed`, token by token."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LogitsProcessor

from .uscdf import CONTROL_TOKENS, PHRASE_END, PHRASE_START, REGION_TOKEN, SEG_TOKEN, render_phrase

MIN_PHRASE_TOKENS = 8  # room that must be left in the answer for another phrase to be opened


class UscdfGrammar(LogitsProcessor):
    """
    Lets through only tokens with which an answer can still become well-formed: a phrase is opened outside of one, holds
    words and no other control token, and once closed is followed by its `[SEG]`. Near `max_new_tokens` no phrase is
    opened and an open one is closed, so that a cut answer is well-formed too.

    Args:
        tokenizer: Of the model; it knows the control tokens.
        prompt_length: Tokens of the prompts (padded on the left), which are not looked at.
        max_new_tokens: Longest answer; `None` if it has no limit.
        control_tokens: All that are no text; an answer has `<p>`, `</p>` and `[SEG]` of them and no other.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt_length: int,
        max_new_tokens: int | None = None,
        control_tokens: Sequence[str] = CONTROL_TOKENS,
    ):
        self.tokenizer, self.prompt_length, self.max_new_tokens = tokenizer, prompt_length, max_new_tokens
        self.start, self.end, self.seg = tokenizer.convert_tokens_to_ids([PHRASE_START, PHRASE_END, SEG_TOKEN])
        known = tokenizer.get_vocab()
        answer = (PHRASE_START, PHRASE_END, SEG_TOKEN)
        self.inputs = [known[t] for t in (*control_tokens, REGION_TOKEN) if t in known and t not in answer]
        # What stands between `</p>` and `[SEG]` is what the tokenizer puts there in the training data.
        rendered = tokenizer(render_phrase("x"), add_special_tokens=False)["input_ids"]
        self.closing: list[int] = rendered[rendered.index(self.end) :]
        self.stops: list[int] = [tokenizer.eos_token_id, tokenizer.pad_token_id]

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        allowed: Any = scores.clone()
        for row, tokens in enumerate(input_ids[:, self.prompt_length :].tolist()):
            forced = self._forced(tokens)
            if forced is not None:
                allowed[row] = -torch.inf
                allowed[row, forced] = 0.0
            else:
                allowed[row, self._forbidden(tokens)] = -torch.inf
        return allowed

    def _since_tag(self, tokens: Sequence[int]) -> tuple[int | None, Sequence[int]]:
        """The last control token of the answer and what follows it."""
        for position in range(len(tokens) - 1, -1, -1):
            if tokens[position] in (self.start, self.end, self.seg):
                return tokens[position], tokens[position + 1 :]
        return None, tokens

    def _room(self, tokens: Sequence[int]) -> float:
        return float("inf") if self.max_new_tokens is None else self.max_new_tokens - len(tokens)

    def _has_words(self, tokens: Sequence[int]) -> bool:
        return bool(self.tokenizer.decode(tokens).strip())

    def _forced(self, tokens: Sequence[int]) -> int | None:
        """The only token that may follow, if there is one."""
        tag, since = self._since_tag(tokens)
        if tag == self.end:
            return self.closing[len(since) + 1]
        if tag == self.start and self._room(tokens) <= len(self.closing) and self._has_words(since):
            return self.end
        return None

    def _forbidden(self, tokens: Sequence[int]) -> list[int]:
        tag, since = self._since_tag(tokens)
        if tag == self.start:
            wordless = [] if self._has_words(since) else [self.end]
            return [*self.inputs, self.start, self.seg, *self.stops, *wordless]
        short = self._room(tokens) < MIN_PHRASE_TOKENS + len(self.closing)
        return [*self.inputs, self.end, self.seg, *([self.start] if short else [])]


__all__ = ["UscdfGrammar"]
