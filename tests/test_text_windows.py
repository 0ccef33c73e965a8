"""Only as much of a long text is tokenised as its windows need; a short one gives what it always gave."""

import pytest
import torch
from tiny import EOS_ID, tiny_llama, tiny_tokenizer
from tokenizers import processors

from hf_blr.text import load_windows, sample_windows, tokenize
from hf_blr.text.windows import LONGEST_WORD, windows_of


def words(count):
    return " ".join(f"w{i}" for i in range(count))


class Counting:
    """A tokenizer that knows how many characters it was given."""

    def __init__(self):
        self.tokenizer, self.characters = tiny_tokenizer(), 0

    def __call__(self, text, **kwargs):
        self.characters += len(text)
        return self.tokenizer(text, **kwargs)


def test_a_text_shorter_than_eight_characters_a_token_is_cut_as_a_whole():
    tokenizer, documents = tiny_tokenizer(), [words(300), words(200)]
    expected = sample_windows(tokenize(tokenizer, documents), 32, 10, seed=2)
    assert torch.equal(windows_of(tokenizer, documents, 32, 10, seed=2), expected)
    assert torch.equal(load_windows(documents, tiny_llama(), tokenizer, 32, 10, 2), expected)
    with pytest.raises(ValueError, match="too few for one window of seqlen=8000"):
        windows_of(tokenizer, documents, 8000, 1)
    for counts, name in (((0, 10), "seqlen"), ((32, 0), "num_samples")):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            load_windows(documents, tiny_llama(), tokenizer, *counts)


def test_of_a_longer_text_windows_lie_apart_in_order_and_begin_with_words():
    tokenizer, text = Counting(), words(20000)
    windows = windows_of(tokenizer, [text], 32, 10, seed=2)
    assert windows.shape == (10, 32) and windows.dtype == torch.int64
    places = [text.index(tokenizer.tokenizer.decode(window)) for window in windows]
    assert places == sorted(places) and min(b - a for a, b in zip(places, places[1:], strict=False)) >= 32
    assert all(text[place] == " " for place in places)
    # eight characters for each token, of a text of more than ten times as many
    assert tokenizer.characters <= 8 * 10 * 32 < len(text) / 10
    assert torch.equal(windows, windows_of(tokenizer, [text], 32, 10, seed=2))
    assert not torch.equal(windows, windows_of(tokenizer, [text], 32, 10, seed=3))


def test_every_part_of_a_long_text_can_be_chosen():
    text = "".join(letter * 256 for letter in "abcdefgh")
    seen = {
        tiny_tokenizer().decode(windows_of(tiny_tokenizer(), [text], 32, 1, seed=seed)[0, :1]) for seed in range(60)
    }
    assert seen == set("abcdefgh")


class Sparse(Counting):
    """One token for a run of letters: their pieces are too short for a window."""

    def __call__(self, text, **kwargs):
        super().__call__(text)
        return {"input_ids": [ord(c) for i, c in enumerate(text) if c != "x" or text[i - 1 : i] != "x"]}


def test_pieces_of_too_few_tokens_are_passed_over_and_at_worst_the_text_is_cut_as_a_whole():
    dense, sparse = "abcdefgh" * 32, "x" * 256
    windows = windows_of(Sparse(), [(dense + sparse) * 4], 32, 4)
    assert not (windows == ord("x")).any()
    tokenizer, documents = Sparse(), [dense + sparse * 7]
    expected = sample_windows(tokenize(tokenizer, documents), 32, 6)
    assert torch.equal(windows_of(tokenizer, documents, 32, 6), expected) and len(expected) == 6


def test_a_text_without_blanks_is_cut_where_it_is():
    text = "字" * (8 * 64) + "x" * (LONGEST_WORD + 1)
    assert windows_of(tiny_tokenizer(), [text], 16, 4).shape == (4, 16)


def test_pieces_of_a_text_do_not_begin_it():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", EOS_ID)]
    )
    assert tokenize(tokenizer, ["text"])[0] == EOS_ID
    assert not (windows_of(tokenizer, [words(20000)], 32, 10) == EOS_ID).any()
