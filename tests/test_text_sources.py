"""Windows from any dataset: mixtures and their shares, and what "default" comes to."""

import json
import logging

import pytest
import torch
from tiny import EOS_ID, tiny_bert, tiny_llama, tiny_tokenizer

from hf_blr import BLRConfig, compress
from hf_blr.config.texts import TEXTS, WRITTEN, dataset_from, describe
from hf_blr.text import NAMED, load_text, load_windows, resolve_dataset, scored_dataset, sources, write_windows
from hf_blr.text.mixtures import mixed_windows, turns, window_counts


def test_the_names_that_a_config_knows_are_those_that_are_read_or_written():
    assert sorted([*NAMED, *WRITTEN]) == list(TEXTS)


def test_shares_count_windows_and_add_up():
    assert window_counts({"a": 1, "b": 1}, 6) == {"a": 3, "b": 3}
    assert window_counts({"a": 0.7, "b": 0.2, "c": 0.1}, 128) == {"a": 90, "b": 25, "c": 13}
    assert window_counts({"a": 3, "b": 1}, 3) == {"a": 2, "b": 1}
    with pytest.raises(ValueError, match="share of 'b', 0.01, comes to none of 8 windows"):
        window_counts({"a": 99, "b": 1}, 8)


def test_sources_take_turns():
    assert turns([2, 2]).tolist() == [0, 2, 1, 3]
    assert turns([4, 2]).tolist() == [0, 4, 1, 2, 5, 3]
    assert turns([3]).tolist() == [0, 1, 2]


def files(tmp_path, **lengths):
    """Files of one letter each: {letter: characters}."""
    for letter, length in lengths.items():
        (tmp_path / f"{letter}.txt").write_text(letter * length)
    return {letter: str(tmp_path / f"{letter}.txt") for letter in lengths}


def letters(windows):
    """The letter of each window; with one token a byte, a window of one file holds only one."""
    assert (windows == windows[:, :1]).all()
    return tiny_tokenizer().decode(windows[:, 0])


def test_a_mixture_has_exactly_its_shares_and_is_the_same_each_time(tmp_path):
    paths = files(tmp_path, x=3000, y=3000)
    shares = {paths["x"]: 3, paths["y"]: 1}
    arguments = shares, tiny_llama(), tiny_tokenizer(), 16, 12
    windows = load_windows(*arguments)
    assert windows.shape == (12, 16)
    assert letters(windows).count("x") == 9 and letters(windows[:4]).count("x") == 3
    assert torch.equal(windows, load_windows(*arguments))


def test_a_short_source_shortens_all_in_proportion_and_says_so(tmp_path, caplog):
    paths = files(tmp_path, x=3000, y=35)
    with caplog.at_level(logging.WARNING):
        windows = load_windows({paths["x"]: 3, paths["y"]: 1}, tiny_llama(), tiny_tokenizer(), 16, 40)
    assert letters(windows).count("x") == 8 and letters(windows).count("y") == 2
    assert "y.txt has 2 windows" in caplog.text and "10 of them instead of 40" in caplog.text


def test_what_the_model_writes_is_asked_for_last_and_only_as_much_as_is_taken():
    asked = []

    def windows_from(name, count):
        asked.append((name, count))
        return torch.full((min(count, 2) if name == "b" else count, 4), ord(name[0]))

    assert len(mixed_windows({"self": 1, "b": 1}, 10, 0, windows_from)) == 5
    assert asked == [("b", 5), ("self", 3)]


def test_half_of_a_mixture_is_what_the_model_writes(tmp_path):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    windows = load_windows({"self": 0.5, files(tmp_path, x=900)["x"]: 0.5}, model, tokenizer, 16, 8, 5, progress=False)
    written = windows[windows[:, 0] == EOS_ID]
    assert torch.equal(written, write_windows(model, tokenizer, 4, 16, 5, progress=False))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({}, "at least one source"),
        ({"self": 0}, "share of 'self' in a mixture must be a positive number, got 0"),
        ({"self": -1.0}, "positive number, got -1.0"),
        ({"self": "half"}, "positive number, got 'half'"),
        ({"self": float("nan")}, "positive number, got nan"),
        ({"self": True}, "positive number, got True"),
        ({"wikitext": 1}, "'wikitext' in a mixture is neither the name of a text.*\"wikitext2\""),
        ({"default": 1}, "must be a name or a path, got 'default'"),
        ({3: 1}, "must be a name or a path, got 3"),
    ],
)
def test_mistakes_in_a_mixture_are_named_when_a_config_is_made(dataset, message):
    with pytest.raises(ValueError, match=message):
        BLRConfig(ratio=0.5, dataset=dataset)


def test_a_mixture_is_stored_as_it_is_and_read_where_its_files_are_not(tmp_path):
    config = BLRConfig(ratio=0.5, dataset={"self": 2, "wikitext2": 1})
    stored = json.loads(config.to_json_string())
    assert stored["dataset"] == {"self": 2, "wikitext2": 1} and BLRConfig.from_dict(stored) == config
    spec = {"structure": "low_rank", "in_features": 8, "out_features": 8, "rank": 2, "num_blocks": [1, 1]}
    layers = {"0": {**spec, "bias": False, "transposed": False}}
    assert BLRConfig(layers=layers, dataset={"elsewhere": 1}).dataset == {"elsewhere": 1}
    assert describe(config.dataset) == "66.7 % self, 33.3 % wikitext2"


def test_the_command_line_writes_mixtures_with_equal_signs(tmp_path, monkeypatch):
    assert dataset_from("self=0.5,wikitext2=0.5") == {"self": 0.5, "wikitext2": 0.5}
    assert dataset_from("wikitext2") == "wikitext2"
    for wrong in ("self=0.5,wikitext2", "self=a", "=1", "self=1,self=2"):
        with pytest.raises(ValueError, match="NAME=SHARE"):
            dataset_from(wrong)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=1").write_text("x")
    assert dataset_from("a=1") == "a=1"


def test_text_without_documents_is_no_text_to_read():
    for dataset in ("self", "self:chat", {"builtin": 1}):
        with pytest.raises(ValueError, match="has no documents to read"):
            load_text(dataset, "test")
        assert scored_dataset(dataset, tiny_llama()) == "builtin"
    assert scored_dataset("c4", tiny_llama()) == "c4"


DEFAULTS = [("builtin", "builtin", "builtin"), ("self", "self", "builtin")]
DEFAULTS.append(({"self": 0.5, "c4": 0.5}, {"self": 0.5, "c4": 0.5}, "builtin"))


@pytest.mark.parametrize(("default", "of_llama", "of_bert"), DEFAULTS, ids=["builtin", "self", "mixture"])
def test_the_default_suits_every_model(default, of_llama, of_bert, monkeypatch, caplog):
    monkeypatch.setattr(sources, "DEFAULT_TEXT", default)
    with caplog.at_level(logging.WARNING):
        assert resolve_dataset("default", tiny_llama()) == of_llama
        assert not caplog.records
        assert resolve_dataset("default", tiny_bert()) == of_bert
    assert ("BertForSequenceClassification cannot write" in caplog.text) == (default != "builtin")


@pytest.mark.parametrize(("make", "used"), [(tiny_llama, "self"), (tiny_bert, "builtin")], ids=["llama", "bert"])
def test_a_compression_stores_what_the_default_was(make, used, monkeypatch):
    monkeypatch.setattr(sources, "DEFAULT_TEXT", "self")
    model = make()
    config = BLRConfig("low_rank", rank=8, dataset="default", seqlen=32, num_samples=4)
    report = compress(model, config, tokenizer=tiny_tokenizer(), progress=False)
    assert model.config.quantization_config.dataset == used and config.dataset == "default"
    assert report.dataset == used and f"128 tokens ({used})" in str(report)


def test_a_default_that_is_not_read_is_not_stored():
    model = tiny_llama()
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    report = compress(model, BLRConfig("low_rank", rank=8, dataset="default"), calibration=[ids], progress=False)
    assert model.config.quantization_config.dataset is None and report.dataset is None
