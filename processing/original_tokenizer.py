"""Tokenizers of LLaMA's SentencePiece layout, with the ids that LISA, GLaMM and LLaVA were trained with."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges
from transformers.utils import logging

from .uscdf import IMAGE_TOKEN, PHRASE_END, PHRASE_START, SEG_TOKEN

logger = logging.get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # kinds of SentencePiece pieces
BPE = 2  # kind of SentencePiece model
SPACE = "[\t-\r\x1c- \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # what `str.strip` takes away


def load_original_tokenizer(
    folder: str | Path, *, added_tokens: Sequence[str] | None = None, model_max_length: int | None = None
) -> PreTrainedTokenizerFast:
    """
    The tokenizer of a folder in the original layout, with the ids of the slow tokenizers of transformers 4.28 and 4.31.

    The rule: the text is split at `<image>` and at the added tokens, around which white space vanishes, and at `<s>`,
    `</s>` and `<unk>`, around which it stays. SentencePiece encodes each piece in between on its own, with its dummy
    prefix. `<s>` is put first, nothing last; padding is `<unk>`, at the right. An added token that begins in the middle
    of another one (no known vocabulary has any) is not covered.

    The result is an ordinary tokenizer of transformers: what it saves loads with `AutoTokenizer`, without SentencePiece.

    Args:
        folder: Holds `tokenizer.model`; `added_tokens.json` and `tokenizer_config.json` are read if they exist.
        added_tokens: Tokens that the folder must have; those it lacks are appended in this order. `<image>` always comes
            last.
        model_max_length: Longest sequence, image tokens included: the language model's number of positions. By default
            the folder's own limit, which the originals apply to text tokens alone.

    Raises:
        FileNotFoundError: no `tokenizer.model`.
        ImportError: reading it needs the packages `sentencepiece` and `protobuf`.
        ValueError: the SentencePiece model is not of LLaMA's kind, or a token would not get the id that
            `added_tokens.json` names.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.model").is_file():
        raise FileNotFoundError(f"{folder} holds no tokenizer.model, the SentencePiece model of LLaMA's tokenizer")
    settings = _read_json(folder / "tokenizer_config.json")
    if settings.get("legacy") is False:
        logger.warning(
            f"{folder}/tokenizer_config.json says legacy=false, which transformers 4.28 ignored but 4.31 obeyed: if the "
            "weights were trained with 4.31, text right behind a tag was tokenised otherwise than here."
        )
    proto = SentencePieceExtractor(str(folder / "tokenizer.model")).proto
    _check_kind(proto, folder)
    backend, controls = _backend(proto)

    wanted = _read_json(folder / "added_tokens.json")
    tokens = [token for token in sorted(wanted, key=wanted.__getitem__) if token not in controls]
    tokens += [token for token in added_tokens or () if token not in (*tokens, *controls)]
    backend.normalizer = _normalizer([token for token in tokens if token != IMAGE_TOKEN])
    unk, bos, eos = (AddedToken(token, normalized=True, special=True) for token in controls)
    backend.add_special_tokens([unk, bos, eos])
    for token in [*tokens, *([] if IMAGE_TOKEN in tokens else [IMAGE_TOKEN])]:
        # Not "special": decoding with skip_special_tokens keeps the tags that carry the meaning of the answer.
        special = token not in (SEG_TOKEN, PHRASE_START, PHRASE_END)
        # Not "normalized": found before all others, so that `<image>` takes no white space away.
        backend.add_tokens([AddedToken(token, normalized=token != IMAGE_TOKEN, special=special)])
    for token, index in wanted.items():
        if backend.token_to_id(token) != index:
            raise ValueError(
                f"added_tokens.json of {folder} gives {token!r} the id {index}, but it would get "
                f"{backend.token_to_id(token)} after a tokenizer.model of {len(proto.pieces)} pieces: does the file belong "
                "to this vocabulary?"
            )
    start = processors.TemplateProcessing(
        single=f"{bos.content}:0 $A:0",
        pair=f"{bos.content}:0 $A:0 {bos.content}:1 $B:1",
        special_tokens=[(bos.content, proto.trainer_spec.bos_id)],
    )
    backend.post_processor = start
    limit = model_max_length or settings.get("model_max_length")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=unk,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **({} if limit is None else {"model_max_length": limit}),
    )


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _check_kind(proto: Any, folder: Path) -> None:
    """Refuse SentencePiece models whose behaviour is not reproduced here."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    kinds = {piece.type for piece in proto.pieces}
    conditions = {
        "is no BPE model": trainer.model_type == BPE,
        "has no byte fallback": trainer.byte_fallback,
        "adds no dummy prefix": normalizer.add_dummy_prefix and not trainer.treat_whitespace_as_suffix,
        "removes extra white space": not normalizer.remove_extra_whitespaces,
        "normalises characters": not normalizer.precompiled_charsmap,
        "has user-defined or unused pieces": kinds <= {NORMAL, UNKNOWN, CONTROL, BYTE},
        "lacks <s> or </s>": min(trainer.unk_id, trainer.bos_id, trainer.eos_id) >= 0,
    }
    wrong = [name for name, holds in conditions.items() if not holds]
    if wrong:
        raise ValueError(f"{folder}/tokenizer.model is not of LLaMA's kind: it {' and '.join(wrong)}")


def _backend(proto: Any) -> tuple[Tokenizer, list[str]]:
    """The SentencePiece model alone, which gives every text a dummy prefix, and its `<unk>`, `<s>`, `</s>`."""
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    scores = {piece.piece: piece.score for piece in proto.pieces}
    others = {piece.piece for piece in proto.pieces if piece.type != NORMAL}
    merges = generate_merges(vocab, scores, skip_tokens=others)
    spec = proto.trainer_spec
    controls = [proto.pieces[index].piece for index in (spec.unk_id, spec.bos_id, spec.eos_id)]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=controls[0], fuse_unk=True, byte_fallback=True)
    )
    # Two steps, because `Metaspace` gives no prefix to what already begins with its replacement, and SentencePiece does.
    # No space is left when the first one runs, so that it always adds one.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="always", split=False),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never", split=False),
        ]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    return backend, controls


def _normalizer(tokens: Sequence[str]) -> normalizers.Normalizer:
    """
    Takes away white space around `tokens`, then writes spaces as SentencePiece does.

    `AddedToken(lstrip=True, rstrip=True)` would not do: it leaves the separators U+001C to U+001F, which `str.strip`
    takes away, and it would have to come after the spaces are rewritten.
    """
    steps: list[normalizers.Normalizer] = []
    if tokens:
        either = "|".join(map(re.escape, tokens))
        steps += [
            # The lookbehind and the possessive `++` keep long runs of white space linear.
            normalizers.Replace(Regex(f"(?<!{SPACE}){SPACE}++(?={either})"), ""),
            normalizers.Replace(Regex(f"(?<={either}){SPACE}++"), ""),
        ]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


__all__ = ["load_original_tokenizer"]
