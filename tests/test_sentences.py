"""The benchmark of sentence embeddings, on a tiny encoder."""

import json

import protocol
import pytest
import sentence_sets
import sentences
import torch
from tiny import tiny_bert, tiny_tokenizer

TEXT = "\n".join(
    f"The {word} of a house has {n} windows. Is there {word} enough for {n} of us?"
    for n, word in enumerate(["roof", "wall", "door", "floor", "stair", "attic", "lamp", "table", "chair"])
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    tiny_bert().bert.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(protocol, "BATCH", 4)
    monkeypatch.setattr(sentences, "SEQLEN", 16)
    monkeypatch.setattr(sentences, "TWICE_JOINT", {"passes": 2, "block_steps": 2})
    monkeypatch.setattr(sentences, "STEPS", 3)
    return tmp_path


def test_rows_hold_cosines_to_the_dense_model_on_sentences_it_names(folder, capsys):
    text, result = str(folder / "text.txt"), folder / "s.json"
    where = ["--model", str(folder / "model"), "--device", "cpu", "--json", str(result), "--ratios", "0.9", "0.5"]
    where += ["--epochs", "2", "--only", "*ours", "*refined"]
    arguments = [*where, "--parts", f"own={text}", "--calibration", "own", "--sentences", f"own={text}"]
    sentences.main(arguments)
    rows = json.loads(result.read_text())["rows"]
    assert (
        len(rows) == 14
        and {row.get("learning_rate") for row in rows} == {None, 5e-4}
        and all(row["kept"] <= row["ratio"] + 0.005 and row["sentences"] == 18 for row in rows)
    )
    cosines = {(row["method"], row["structure"], row["ratio"]): row["cosine"] for row in rows}
    for method, structure in {key[:2] for key in cosines}:
        assert cosines[method, structure, 0.5] < cosines[method, structure, 0.9] < 1
    capsys.readouterr()
    sentences.main(arguments)
    assert capsys.readouterr().out == "" and json.loads(result.read_text())["rows"] == rows


def test_embeddings_do_not_depend_on_the_padding(folder):
    model, tokenizer = tiny_bert().bert, tiny_tokenizer()
    found = sentence_sets.embeddings(model, tokenizer, ["one", "a much longer sentence"])
    alone = sentence_sets.embeddings(model, tokenizer, ["one"])
    torch.testing.assert_close(found[:1], alone)
    with torch.no_grad():
        hidden = model(torch.tensor([tokenizer("one")["input_ids"]])).last_hidden_state[0]
    torch.testing.assert_close(alone[0], hidden.mean(0) / hidden.mean(0).norm())


def test_sentence_transformers_gives_the_same(folder):
    pytest.importorskip("sentence_transformers")
    # not the model of the folder, which it reads with the mean as its pooling
    model, texts = tiny_bert(seed=1).bert, ["one", "a much longer sentence"]
    found = sentences.library_embeddings(model, str(folder / "model"), texts)
    torch.testing.assert_close(found, sentence_sets.embeddings(model, tiny_tokenizer(), texts))


def test_sentences_are_cut_at_marks_and_kept_by_their_length(monkeypatch):
    text = "Too short. This one has just five words! What about a question of eight words?\nand a line without any mark"
    assert sentence_sets.sentences_of(text) == [
        "This one has just five words!",
        "What about a question of eight words?",
        "and a line without any mark",
    ]


def test_fitting_to_sentences_reads_them_as_the_encoder_does(folder):
    text, result = str(folder / "text.txt"), folder / "s.json"
    where = ["--model", str(folder / "model"), "--device", "cpu", "--json", str(result), "--ratios", "0.6"]
    more = ["--parts", f"own={text}", "--fit-to", "sentences", "--sentences", f"own={text}", "--only", "pivoted*ours"]
    sentences.main([*where, *more])
    sentences.main([*where, *more, "--fitted", "5"])
    row, some = json.loads(result.read_text())["rows"]
    tokenizer = tiny_tokenizer()
    assert row["calibration"] == "sentences of own"
    sizes = [len(tokenizer(each)["input_ids"]) for each in sentence_sets.sentences_of(TEXT)]
    assert row["calibration_tokens"] == sum(sizes)
    assert 5 * min(sizes) <= some["calibration_tokens"] <= 5 * max(sizes)


def test_of_several_rates_the_best_on_held_out_sentences_is_taken(folder):
    text, result = str(folder / "text.txt"), folder / "s.json"
    where = ["--model", str(folder / "model"), "--device", "cpu", "--json", str(result), "--ratios", "0.6"]
    where += ["--parts", f"own={text}", "--fit-to", "sentences", "--sentences", f"own={text}", "--batch", "4"]
    only = ["--only", "pivoted 0.6 ours, refined"]
    with pytest.raises(SystemExit):
        sentences.main([*where, *only, "--rate", "3", "1e-9"])
    sentences.main([*where, *only, "--rate", "3", "1e-9", "--held-out", "4", "--epochs", "1", "2"])
    once, twice = json.loads(result.read_text())["rows"]
    tried = once["rates_tried"]
    assert once["learning_rate"] == twice["learning_rate"] == 1e-9 and tried["1e-09"] < tried["3"]
    # one epoch at the best rate is the trial itself
    assert once["held_out_distance"] == pytest.approx(tried["1e-09"], rel=1e-4)
    # so small a rate changes nothing
    assert once["held_out_distance_before"] == pytest.approx(once["held_out_distance"], rel=1e-3)
    assert twice["finetune_tokens"] == 2 * once["finetune_tokens"] and once["held_out"] == 4
    sentences.main([*where, *only, "--trained", "8", "--epochs", "1"])
    fewer = json.loads(result.read_text())["rows"][2]
    assert fewer["finetune_tokens"] < fewer["calibration_tokens"] and "held_out" not in fewer
    drawn, left_out = sentence_sets.drawn_sentences([TEXT], 0, 4)
    assert len(drawn) == 14 and not set(drawn) & set(left_out)
    sizes = [len(tiny_tokenizer()(each)["input_ids"]) for each in drawn]
    assert once["finetune_tokens"] == once["calibration_tokens"] == sum(sizes)
