import builtins
import logging

import pytest
import torch
from tiny import EOS_ID, tiny_tokenizer

from hf_blr.text import load_text, sample_windows, tokenize


def test_builtin_splits_cover_all_topics_and_do_not_overlap():
    from pydoc_data.topics import topics

    train, test = load_text("builtin", "train"), load_text("builtin", "test")
    assert train + test == [topics[name] for name in sorted(topics)]
    assert 0.8 < sum(map(len, train)) / sum(map(len, train + test)) < 0.95
    # four characters a token is what tokenizers of today reach on it
    assert sum(map(len, test)) / 4.1 > 12_000


def test_a_file_and_a_folder_are_read_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name, text in (("b.txt", "second"), ("a.md", "first"), ("sub/c.rst", "thïrd"), ("d.bin", "no text")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert load_text(str(tmp_path), "train") == ["first", "second", "thïrd"]
    assert load_text(tmp_path, "test") == load_text(tmp_path, "train")
    assert load_text(tmp_path / "d.bin", "train") == ["no text"]


def test_a_list_is_taken_as_it_is():
    assert load_text(["a", "", "b"], "test") == ["a", "", "b"]


@pytest.mark.parametrize(
    ("dataset", "split", "error", "match"),
    [
        ("builtin", "validation", ValueError, r"split must be one of \['train', 'test'\]"),
        ("no/such/file.txt", "test", ValueError, '"builtin", "c4", "self", "self:chat", "wikitext2"'),
        ([" ", "\n"], "test", ValueError, "no text in <list of 2 texts>"),
        ([], "test", ValueError, "0 documents"),
        (["a", 3], "test", TypeError, "number 1 is a int"),
        (7, "test", TypeError, "got int"),
    ],
    ids=["split", "path", "blank", "empty", "not-a-string", "kind"],
)
def test_bad_datasets_are_refused(dataset, split, error, match):
    with pytest.raises(error, match=match):
        load_text(dataset, split)


def test_a_folder_without_text_and_a_binary_file_are_refused(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"no file ending in \.txt"):
        load_text(tmp_path, "train")
    with pytest.raises(ValueError, match=r"x\.bin' is not UTF-8"):
        load_text(tmp_path / "x.bin", "train")


def test_datasets_tables_are_read_by_their_text_column():
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"title": ["t", "u"], "text": ["a", "b"], "n": [1, 2]})
    assert load_text(table, "test") == ["a", "b"]
    assert load_text(table.remove_columns("text"), "test") == ["t", "u"]
    with pytest.raises(ValueError, match=r"it has \['n'\], of which \[\] hold strings"):
        load_text(table.select_columns("n"), "test")
    with pytest.raises(ValueError, match=r"\['title', 'body'\] hold strings"):
        load_text(table.rename_column("text", "body"), "test")
    with pytest.raises(TypeError, match="streaming"):
        load_text(table.to_iterable_dataset(), "test")


def test_a_dataset_dict_gives_the_split_asked_for():
    datasets = pytest.importorskip("datasets")
    splits = {name: datasets.Dataset.from_dict({"text": [name]}) for name in ("train", "validation")}
    assert load_text(datasets.DatasetDict(splits), "test") == ["validation"]
    assert load_text(datasets.DatasetDict(splits), "train") == ["train"]
    with pytest.raises(ValueError, match="'test' or 'validation' is needed"):
        load_text(datasets.DatasetDict(train=splits["train"]), "test")


class Rows(list):
    def take(self, n):
        return self[:n]


@pytest.mark.parametrize(
    ("name", "split", "repository", "hub_split"),
    [
        ("wikitext2", "train", "Salesforce/wikitext", "train"),
        ("wikitext2", "test", "Salesforce/wikitext", "test"),
        ("c4", "train", "allenai/c4", "train"),
        ("c4", "test", "allenai/c4", "validation"),
    ],
)
def test_hub_datasets_are_asked_for_by_repository_and_split(name, split, repository, hub_split, monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Rows({"text": f"row {i}"} for i in range(3000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = load_text(name, split)
    ((args, kwargs),) = calls
    assert args[0] == repository and kwargs["split"] == hub_split
    assert documents[:2] == ["row 0", "row 1"]
    # C4 never ends, WikiText is taken whole
    assert len(documents) == {"wikitext2": 3000, "c4": 2000 if split == "train" else 1100}[name]


def test_an_unreachable_hub_is_reported_with_what_works_instead(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match='"builtin", a text file or folder'):
        load_text("wikitext2", "test")


def test_without_the_datasets_package_only_hub_text_is_missing(monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ModuleNotFoundError("No module named 'datasets'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    assert load_text("builtin", "test")
    with pytest.raises(ImportError, match="'c4' needs `pip install datasets`"):
        load_text("c4", "train")


def test_documents_are_joined_by_two_newlines_and_tokenised_once(caplog):
    tokenizer = tiny_tokenizer()
    # transformers' loggers do not propagate
    logging.getLogger("transformers").addHandler(caplog.handler)
    documents = ["x" * 100, "", "y" * 100]
    try:
        ids = tokenize(tokenizer, documents)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    # one token a byte, so the ids are as many as the characters; more than the tokenizer's limit of 128
    assert ids.dtype == torch.int64 and len(ids) == 204
    assert tokenizer.decode(ids) == "\n\n".join(documents)
    assert "longer than" not in caplog.text
    assert EOS_ID not in ids
    with pytest.raises(TypeError, match=r"pass \[text\]"):
        tokenize(tokenizer, "text")


def test_windows_are_consecutive_apart_and_chosen_by_the_seed():
    tokens = torch.arange(107)
    everything = sample_windows(tokens, 10, 99)
    assert torch.equal(everything, tokens[:100].view(10, 10))

    some = sample_windows(tokens, 10, 4, seed=3)
    assert some.shape == (4, 10) and (some[:, 0] % 10 == 0).all()
    assert (some[1:, 0] > some[:-1, 0]).all()
    assert torch.equal(some, sample_windows(tokens, 10, 4, seed=3))
    assert any(not torch.equal(some, sample_windows(tokens, 10, 4, seed=seed)) for seed in range(3))


def test_too_little_text_for_a_window_says_what_would_do():
    with pytest.raises(ValueError, match="the text has 7 tokens.*seqlen of at most 7"):
        sample_windows(torch.arange(7), 8, 1)
    with pytest.raises(ValueError, match="at least 1, got 0 and 1"):
        sample_windows(torch.arange(7), 0, 1)
