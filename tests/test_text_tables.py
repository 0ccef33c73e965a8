"""Text in columns: files, hub ids, streams and conversations, and how much of each is read."""

import pytest
from tiny import tiny_llama, tiny_tokenizer

from hf_blr.evaluation import perplexity
from hf_blr.text import load_text, load_windows, tables

datasets = pytest.importorskip("datasets")

ROWS = [{"title": f"title {i}", "text": f"text {i}", "number": i} for i in range(5)]
CHAT = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "because"}]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, ending, rows=ROWS):
    table = datasets.Dataset.from_list(rows)
    file = str(folder / f"file.{ending}")
    {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[ending](file)
    return file


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_files_are_read_by_column(tmp_path, ending):
    file = write(tmp_path, ending)
    assert load_text(file, "train") == [f"text {i}" for i in range(5)] == load_text(file, "test")
    assert load_text(f"{file}:title", "train") == [f"title {i}" for i in range(5)]
    with pytest.raises(ValueError, match=r"no column 'body' of text; it has \['title', 'text', 'number'\], of which"):
        load_text(f"{file}:body", "train")
    with pytest.raises(ValueError, match="no column 'number' of text"):
        load_text(f"{file}:number", "train")


def test_a_column_without_text_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"no text in .*file\.jsonl \(2 documents, all of them empty\)"):
        load_text(write(tmp_path, "jsonl", [{"text": ""}, {"text": " "}]), "train")
    with pytest.raises(TypeError, match="number 1 is a NoneType"):
        load_text(write(tmp_path, "jsonl", [{"text": "a"}, {"text": None}]), "train")


def test_only_tables_have_columns_and_a_colon_may_be_a_part_of_a_name(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b:c.txt").write_text("colon")
    assert load_text(tmp_path / "b:c.txt", "train") == ["colon"]
    with pytest.raises(ValueError, match=r"a\.txt' has no column 'text': only \.csv, \.jsonl, \.parquet files"):
        load_text(f"{tmp_path / 'a.txt'}:text", "train")


def test_conversations_become_text_by_the_chat_template(tmp_path):
    file = write(tmp_path, "jsonl", [{"source": "here", "messages": CHAT}] * 2)
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="'messages' holds conversations, and .* has no chat template"):
        load_text(file, "train", tokenizer)
    with pytest.raises(ValueError, match="'messages' holds conversations, and no tokenizer was given"):
        load_text(file, "train")
    tokenizer.chat_template = TEMPLATE
    assert load_text(file, "train", tokenizer) == ["[user] why;[assistant] because;"] * 2
    assert load_text(f"{file}:source", "train") == ["here"] * 2
    windows = load_windows(file, tiny_llama(), tokenizer, 16, 4)
    assert tokenizer.decode(windows[0]) == "[user] why;[assi"
    # two conversations of 31 characters and what joins them, a token each
    assert perplexity(tiny_llama(), tokenizer, file, seqlen=16).n_windows == 64 // 16


class Endless:
    """Examples without an end and without a schema, as a stream of `datasets` takes them; counts what was taken."""

    def __init__(self, **row):
        self.row, self.taken = row, 0

    def __call__(self):
        while True:
            self.taken += 1
            yield self.row

    def stream(self):
        return datasets.IterableDataset.from_generator(self)


def test_a_stream_is_read_as_far_as_needed():
    source = Endless(text="word " * 20)
    stream = source.stream()
    assert load_windows(stream, tiny_llama(), tiny_tokenizer(), 16, 4, 1).shape == (4, 16)
    # 8 characters for each of 64 tokens, 100 in a row, and the row that says which columns there are
    assert source.taken <= 8
    with pytest.raises(TypeError, match="streaming dataset may have no end"):
        load_text(stream, "test")


def test_of_a_table_blocks_of_rows_are_read_in_a_random_order(monkeypatch):
    monkeypatch.setattr(tables, "ROWS_PER_READ", 3)
    table = datasets.Dataset.from_dict({"text": [f"{i:10}" for i in range(300)]})
    some = load_text(table, "train", enough=100)
    numbers = [int(document) for document in some]
    assert len(numbers) == 12 and numbers == sorted(numbers) != list(range(12))
    assert all(numbers[i + 1] == numbers[i] + 1 and numbers[i] % 3 == 0 for i in range(0, 12, 3))
    assert some == load_text(table, "train", enough=100) != load_text(table, "train", enough=100, seed=1)
    assert load_text(table, "train", enough=10**6) == load_text(table, "train") == table["text"][:]


@pytest.fixture
def hub(monkeypatch):
    calls = []

    def load_dataset(path, **kwargs):
        calls.append((path, kwargs))
        splits = {
            name: datasets.Dataset.from_list([{"text": f"{name} {row}"} for row in "ab"]) for name in ("train", "test")
        }
        if kwargs["streaming"]:
            return datasets.IterableDatasetDict({name: table.to_iterable_dataset() for name, table in splits.items()})
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_a_hub_id_is_streamed_to_fit_and_read_whole_to_score(hub, monkeypatch):
    assert load_text("owner/name", "train", enough=3) == ["train a"]
    assert load_text("owner/name:text", "test") == ["test a", "test b"]
    assert hub == [("owner/name", {"streaming": True}), ("owner/name", {"streaming": False})]
    with pytest.raises(ValueError, match="no column 'body' of text"):
        load_text("owner/name:body", "test")


def test_a_hub_dataset_of_several_configurations_says_what_to_do(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ValueError("Config name is missing, pick one among ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"by its name alone: .*\['a', 'b'\]\. Pass what datasets\.load_dataset"):
        load_text("owner/name", "train")


def test_what_is_neither_here_nor_on_the_hub_says_both(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise FileNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="'data/text' is no file or folder here.*could not be read from the hub"):
        load_text("data/text", "train")


def test_a_table_of_rows_without_features_is_read_too():
    stream = Endless(body="one", n=1).stream()
    assert stream.features is None
    assert load_text(stream, "train", enough=5) == ["one", "one"]
