"""Ids of the original slow tokenizers, against their rule written on SentencePiece alone, and against the originals' own."""

import io
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mglmm.modeling_mglmm.weight_layouts import GLAMM, LISA
from mglmm.processing.original_tokenizer import load_original_tokenizer

sentencepiece = pytest.importorskip("sentencepiece")

CORPUS = """A chat between a curious human and an artificial intelligence assistant. USER: What is the man in this image?
ASSISTANT: Sure, it is the red hat. The man stands next to the blue car and looks at a tree. Hello, the dogs and cats!
Un café près de la forêt, où l'été s'étend.    for x in range(10):  return [x, "x"]   # indented   four   spaces
Собака сидит на траве. 一只狗坐在草地上。 aba ababa banana bandana 1024 60 %"""
BASE = 420  # pieces, 256 of them bytes

VOCABULARIES = {
    "glamm": dict(zip(GLAMM.added_tokens, range(BASE, BASE + 7), strict=True)),
    "lisa": dict(zip(LISA.added_tokens, range(BASE, BASE + 3), strict=True)),
    # LISA-7B-v1: LLaVA v1's own tokens come first
    "lisa_7b_v1": {"<im_patch>": BASE, "<im_start>": BASE + 1, "<im_end>": BASE + 2, "[SEG]": BASE + 3},
    # as some LLaMA conversions write the file
    "llama": {"</s>": 2, "<s>": 1, "<unk>": 0, "<pad>": BASE},
}


def train(**options) -> bytes:
    """A SentencePiece model with the settings of LLaMA's, but for `options`."""
    model = io.BytesIO()
    defaults = {
        "vocab_size": BASE,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_digits": True,
        "character_coverage": 0.98,  # leaves characters to the bytes
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n") * 5), model_writer=model, **defaults | options
    )
    return model.getvalue()


def write(folder: Path, model: bytes, added: Mapping[str, int] | None = None, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    if added is not None:
        (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 512} | config))
    return folder


@pytest.fixture(scope="module")
def model() -> bytes:
    return train()


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    return {name: write(root / name, model, added) for name, added in VOCABULARIES.items()}


@pytest.fixture(scope="module")
def reloaded(folders, tmp_path_factory) -> dict[str, PreTrainedTokenizerFast]:
    """Loaded from the original folder, saved, and loaded again without SentencePiece."""
    tokenizers = {}
    for name, folder in folders.items():
        saved = tmp_path_factory.mktemp(name)
        load_original_tokenizer(folder).save_pretrained(saved)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "sentencepiece", None)
            tokenizers[name] = AutoTokenizer.from_pretrained(saved)
    return tokenizers


def reference_ids(model: bytes, added: Mapping[str, int], text: str) -> list[int]:
    """
    What `tokenizer_image_token` of LLaVA and the slow tokenizer of transformers 4.28 give, with -200 for `<image>`.

    A trie finds added tokens and `<s>`, `</s>`, `<unk>` from the left, the longest first. Added tokens strip their
    neighbours with `str.strip`. SentencePiece encodes each remaining piece.
    """
    encoder = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = {**added, "<unk>": 0, "<s>": 1, "</s>": 2}
    tokens = re.compile("(" + "|".join(re.escape(t) for t in sorted(ids, key=len, reverse=True)) + ")")
    result = [1]
    for i, part in enumerate(text.split("<image>")):
        result += [-200] * (i > 0)
        pieces = tokens.split(part)
        for j in range(1, len(pieces), 2):
            if pieces[j] not in ("<unk>", "<s>", "</s>"):
                pieces[j - 1], pieces[j + 1] = pieces[j - 1].rstrip(), pieces[j + 1].lstrip()
        for j, piece in enumerate(pieces):
            result += [ids[piece]] if j % 2 else encoder.encode(piece)
    return result


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    image = tokenizer.convert_tokens_to_ids("<image>")
    return [-200 if token == image else token for token in tokenizer(text)["input_ids"]]


# ---------------------------------------------------------------------- ids


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("a [SEG].", ["▁a", "[SEG]", "▁", "."]),  # a dummy prefix behind a tag
        ("[SEG] a", ["[SEG]", "▁a"]),  # at the start, and white space behind a tag
        ("a \t\n\u00a0\u3000\x1f\x85[SEG]", ["▁a", "[SEG]"]),  # all that `str.strip` takes; Rust's has no U+001F
        ("[SEG]\x1c \x1da", ["[SEG]", "▁a"]),
        ("a\u200b[SEG]", ["▁a", "<0xE2>", "<0x80>", "<0x8B>", "[SEG]"]),  # no white space to `str.strip`
        ("[SEG][SEG] [SEG]\n[SEG]", ["[SEG]"] * 4),  # in a row
        ("<p> a </p> [SEG]", ["<p>", "▁a", "</p>", "[SEG]"]),
        ("<<p>p>", ["▁", "<0x3C>", "<p>", "▁", "p", "<0x3E>"]),  # one spelling inside another
        ("a </s> a", ["▁a", "▁", "</s>", "▁▁", "a"]),  # `</s>` leaves white space, and starts a new piece
        ("</s><s>a", ["</s>", "<s>", "▁a"]),
        ("[SEG] </s> [SEG]", ["[SEG]", "</s>", "[SEG]"]),  # but its neighbour takes it away
        ("<unk>a", ["<unk>", "▁a"]),
        ("", []),
        (" ", ["▁▁"]),
        ("▁a", ["▁▁", "a"]),  # SentencePiece takes its own mark for a space
        ("<im_start><image><im_end>\na", ["<im_start>", "<image>", "<im_end>", "▁a"]),
        ("a <image> a", ["▁a", "▁", "<image>", "▁▁", "a"]),  # `<image>` leaves white space
        ("[SEG] <image>\n<p>", ["[SEG]", "<image>", "<p>"]),
        ("🎩", ["▁", "<0xF0>", "<0x9F>", "<0x8E>", "<0xA9>"]),  # bytes
        ("<0x0A>", None),  # the name of a byte is not the byte
        ("ﬁ Ａ é e\u0301", None),  # nothing is normalised
    ],
)
def test_the_rule(reloaded, model, text: str, tokens: list[str] | None) -> None:
    tokenizer = reloaded["glamm"]
    found = tokenizer(text)["input_ids"]
    assert ids_of(tokenizer, text) == reference_ids(model, VOCABULARIES["glamm"], text)
    assert tokens is None or tokenizer.convert_ids_to_tokens(found) == ["<s>", *tokens]


PARTS = [
    *GLAMM.added_tokens,
    "<im_patch>",
    "<image>",
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    *" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0",
    *("  ", "\u1680", "\u180e", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000", "\u200b", "\ufeff", "▁", "▁▁"),
    *("the man", " dog.", "ababa", "60", "café", "cafe\u0301", "собака", "一只狗", "🎩", "ﬁ", "\x00", "\U0010ffff"),
    *("<", ">", "<<", "p>", "[SEG", "SEG]", "[/INST]", "<0x0A>", "image>"),
]
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=14).map("".join)


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=250)
@given(text=TEXTS)
@example(text="x\x1c[SEG]\x1cx<p>\x1d </p>\x1e\x1f")
def test_every_text_has_the_original_ids(model, reloaded, name: str, text: str) -> None:
    assert ids_of(reloaded[name], text) == reference_ids(model, VOCABULARIES[name], text)


@settings(max_examples=200)
@given(text=st.text("ab ▁", max_size=60))
def test_ties_of_the_merges_break_alike(model, reloaded, text: str) -> None:
    """Pieces that can be made in several ways, such as runs of spaces, are made as SentencePiece makes them."""
    assert ids_of(reloaded["lisa"], text) == reference_ids(model, VOCABULARIES["lisa"], text)


@pytest.mark.parametrize(
    "text", [" " * 50_000 + "x", "\n" * 50_000 + "[SEG]" + "\x1c" * 50_000, " <p> a" * 10_000, "x" * 50_000]
)
def test_very_long_texts(model, reloaded, text: str) -> None:
    assert ids_of(reloaded["glamm"], text) == reference_ids(model, VOCABULARIES["glamm"], text)


def test_saving_changes_nothing(folders, reloaded, tmp_path) -> None:
    tokenizer = load_original_tokenizer(folders["glamm"], model_max_length=4096)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.model_max_length == 4096 and reloaded["glamm"].model_max_length == 512  # the folder's own
    for one in (tokenizer, again):
        assert (one.pad_token, one.pad_token_id, one.padding_side) == ("<unk>", 0, "right")
        assert (one.bos_token_id, one.eos_token_id, one.unk_token_id) == (1, 2, 0)
        assert len(one) == BASE + 8 and one.convert_tokens_to_ids("<image>") == BASE + 7
        text = " x <p>\x1c dog </p> [SEG] . </s> x"
        assert one(text)["input_ids"] == reloaded["glamm"](text)["input_ids"]
        assert one("x", "x")["input_ids"] == 2 * one("x")["input_ids"]
        assert one.decode(one("<im_start><p> dog </p> [SEG].</s>")["input_ids"], skip_special_tokens=True) == (
            "<p> dog</p>[SEG] ."
        )
        batch = one(["x", "x x"], padding=True)
        assert batch["input_ids"][0][-1] == 0 and batch["attention_mask"][0][-1] == 0


@pytest.mark.parametrize("layout", ["lisa", "glamm"])
def test_published_conversations(shared_dir, tmp_path, layout: str) -> None:
    folder = shared_dir / "golden" / layout
    load_original_tokenizer(folder / "ckpt").save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    golden = json.loads((folder / "goldens.json").read_text(encoding="utf-8"))
    assert golden["conversations"]
    for conversation in golden["conversations"].values():
        assert ids_of(tokenizer, conversation["text"]) == conversation["ids"]
    for token, index in golden["tokens"].items():
        assert tokenizer.convert_tokens_to_ids(token) == index


# ---------------------------------------------------------------------- building


@pytest.mark.parametrize(
    ("present", "added", "expected"),
    [
        (None, GLAMM.added_tokens, [BASE + i for i in range(7)]),  # a bare Vicuna
        ({}, LISA.added_tokens, [BASE, BASE + 1, BASE + 2]),
        # tokens that exist keep their ids
        (
            {"<im_patch>": BASE, "<im_start>": BASE + 1, "<im_end>": BASE + 2},
            LISA.added_tokens,
            [BASE + 3, BASE + 1, BASE + 2],
        ),
        (VOCABULARIES["glamm"], GLAMM.added_tokens, [BASE + i for i in range(7)]),
    ],
)
def test_tokens_are_added_in_the_original_order(model, tmp_path, present, added, expected: list[int]) -> None:
    tokenizer = load_original_tokenizer(write(tmp_path / "base", model, present), added_tokens=added)
    assert tokenizer.convert_tokens_to_ids(list(added)) == expected
    assert tokenizer.convert_tokens_to_ids("<image>") == len(tokenizer) - 1 == max(expected) + 1
    tags = dict(zip(added, expected, strict=True)) | (present or {})
    for text in ("a [SEG] .", "<im_start> <image> <im_end>\nx", "<p> x </p>"):
        assert ids_of(tokenizer, text) == reference_ids(model, tags, text)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"[SEG]": BASE + 1}, rf"gives '\[SEG\]' the id {BASE + 1}, but it would get {BASE} after .* {BASE} pieces"),
        ({"<p>": BASE, "[SEG]": BASE + 2}, rf"gives '\[SEG\]' the id {BASE + 2}, but it would get {BASE + 1}"),
        ({"[SEG]": 32000}, "the id 32000, but"),  # of a larger vocabulary
        ({"</s>": 5}, "gives '</s>' the id 5, but it would get 2"),
    ],
)
def test_other_ids_are_refused(model, tmp_path, added: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_original_tokenizer(write(tmp_path / "wrong", model, added))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram", "hard_vocab_limit": False}, "is no BPE model"),  # T5's kind
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises characters"),
        ({"byte_fallback": False, "vocab_size": 164}, "has no byte fallback"),
        ({"add_dummy_prefix": False}, "adds no dummy prefix"),
        ({"remove_extra_whitespaces": True}, "removes extra white space"),
        ({"user_defined_symbols": ["[SEG]"]}, "has user-defined or unused pieces"),
        ({"bos_id": -1}, "lacks <s> or </s>"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path, options: dict, message: str) -> None:
    folder = write(tmp_path / "other", train(**options))
    with pytest.raises(ValueError, match=f"tokenizer.model is not of LLaMA's kind: it .*{message}"):
        load_original_tokenizer(folder)


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no tokenizer.model"):
        load_original_tokenizer(tmp_path)


def test_a_later_rule_is_warned_of(model, tmp_path, caplog) -> None:
    logging.getLogger("transformers").propagate = True
    try:
        load_original_tokenizer(write(tmp_path / "legacy", model, legacy=True))
        assert not caplog.records
        load_original_tokenizer(write(tmp_path / "later", model, legacy=False))
        assert "legacy=false" in caplog.text
    finally:
        logging.getLogger("transformers").propagate = False
