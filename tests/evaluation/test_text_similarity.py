"""Similarity of phrases: mean-pooled embeddings of a tiny random encoder, and comparison without one."""

import json

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from mglmm.evaluation.text_similarity import BertSimilarity, ExactSimilarity, load_text_similarity, same_noun

WORDS = "a red blue dog cat sky with long hair".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of 16 dimensions with random weights, in the files of a sentence encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=16, max_position_embeddings=512, **sizes)).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "Transformer"}]))
    return folder


def by_hand(folder, text: str) -> np.ndarray:
    ids = [2, *(5 + WORDS.index(word) if word in WORDS else 1 for word in text.lower().split())][:511] + [3]
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state[0]
    return states.mean(dim=0).numpy()


def test_the_embedding_is_the_mean_over_all_tokens(folder) -> None:
    similarity = BertSimilarity(folder)
    texts = ["dog", "A red dog with long hair", "sky zebra", ""]
    vectors = [by_hand(folder, text) for text in texts]
    expected = [[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in vectors[:2]] for a in vectors]
    result = similarity(texts, texts[:2])  # of different lengths: padded in one batch
    assert result.shape == (4, 2) and result.dtype == np.float32
    assert result == pytest.approx(np.array(expected), abs=1e-6)
    assert similarity.name == str(folder)


def test_long_texts_are_cut_at_512_tokens(folder) -> None:
    long = "dog " * 510
    assert BertSimilarity(folder)([long], [long + "cat " * 50]) == pytest.approx(1.0)
    assert by_hand(folder, long + "cat") == pytest.approx(by_hand(folder, long), abs=1e-6)


def test_each_string_is_embedded_once_in_full_batches(folder) -> None:
    similarity = BertSimilarity(folder, batch_size=2)
    batches = []
    similarity._encoder.register_forward_hook(lambda module, args, kwargs, output: batches.append(len(kwargs["input_ids"])), with_kwargs=True)  # fmt: skip
    first = similarity(["dog", "cat", "dog"], ["sky", "dog", "red"])
    assert batches == [2, 2]  # four different ones
    similarity.embed(["cat", "blue", "cat"])
    assert batches == [2, 2, 1]
    assert np.array_equal(similarity(["dog", "cat", "dog"], ["sky", "dog", "red"]), first)
    assert batches == [2, 2, 1]


@pytest.mark.parametrize("similarity", [ExactSimilarity(), ExactSimilarity(normalize=False), "bert"])
def test_no_texts_have_no_similarities(similarity, folder) -> None:
    if similarity == "bert":
        similarity = BertSimilarity(folder)
    assert similarity([], ["dog"]).shape == (0, 1)
    assert similarity(["dog", "cat"], []).shape == (2, 0)


def test_an_encoder_that_is_not_at_hand_is_one_line_with_the_way_out() -> None:
    with pytest.raises(ValueError, match="'no/such-encoder' is not at hand.*text similarity 'exact-noun'") as caught:
        load_text_similarity("no/such-encoder")
    assert "\n" not in str(caught.value)


def test_names(folder) -> None:
    assert [load_text_similarity(name).name for name in ("exact", "exact-noun", folder)] == [
        "exact",
        "exact-noun",
        str(folder),
    ]


def test_exact() -> None:
    first, second = ["a dog", "cats"], ["dog", "a dog", "cat"]
    assert ExactSimilarity(normalize=False)(first, second).tolist() == [[0, 1, 0], [0, 0, 0]]
    assert ExactSimilarity()(first, second).tolist() == [[1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("a dog", "The dog", True),  # article and case
        ("two cars", "a car", True),  # quantity and number
        ("people", "a person", True),  # irregular plural
        ("the shelves", "shelf", True),
        ("a dress", "dresses", True),  # no blind cutting of "s"
        ("the red hats,", "a red  hat", True),  # spacing and punctuation
        ("all the cups", "cup", True),  # several determiners
        ("a hat", "a coat", False),
        ("a red hat", "a hat", False),  # exact: an adjective more is another noun
        ("the hood of the car", "the hood", False),
        ("a", "A", True),  # a determiner alone is a word
        ("", "", False),  # no phrase matches nothing, not even no phrase
        ("the sky", "", False),
    ],
)
def test_same_noun(first, second, same) -> None:
    assert same_noun(first, second) is same
    assert same_noun(second, first) is same
