"""Scores on tasks, through lm-eval itself where it is installed."""

import copy
import json
import sys

import pytest
from tiny import tiny_llama, tiny_t5, tiny_tokenizer

from hf_blr import BLRConfig, compress, to_dense
from hf_blr.cli import main
from hf_blr.evaluation import task_scores

#: lm-eval's language for a choice between two words
TASK = """
task: parity
dataset_path: json
dataset_kwargs:
  data_files: {{test: {documents}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["even", "odd"]
doc_to_target: answer
metric_list:
  - metric: acc
  # how far apart the words lie: any other logits give another number
  - metric: brier_score
"""


@pytest.fixture
def folder(tmp_path):
    """Holds a task, "parity"."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"question": f"{i} is", "answer": i % 2}) + "\n" for i in range(8)))
    (tmp_path / "parity.yaml").write_text(TASK.format(documents=documents))
    return tmp_path


def test_without_lm_eval_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        task_scores(tiny_llama(), tiny_tokenizer(), ["parity"])


def test_models_that_predict_no_next_token_are_refused():
    with pytest.raises(TypeError, match="no causal language model"):
        task_scores(tiny_t5(), tiny_tokenizer(), ["parity"])


def test_a_model_is_scored_as_it_is_in_memory(folder):
    pytest.importorskip("lm_eval")
    model = tiny_llama().train()
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    scores = task_scores(model, tiny_tokenizer(), ["parity"], folder=folder)
    assert 0 <= scores["parity"]["acc,none"] <= 1 and scores["parity"]["acc_stderr,none"] >= 0
    assert model.training
    twin = task_scores(to_dense(copy.deepcopy(model)), tiny_tokenizer(), ["parity"], folder=folder)
    assert twin["parity"] == pytest.approx(scores["parity"], rel=1e-4)
    assert task_scores(tiny_llama(), tiny_tokenizer(), ["parity"], folder=folder)["parity"] != twin["parity"]
    with pytest.raises(ValueError, match="knows no task nonsense"):
        task_scores(model, tiny_tokenizer(), ["nonsense"], folder=folder)


@pytest.mark.parametrize("through", ["evaluate", "run"])
def test_the_command_line_scores_a_compressed_checkpoint(through, folder, capsys):
    pytest.importorskip("lm_eval")
    model = tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    if through == "evaluate":
        names = ["--tasks", "parity", "--task-folder", str(folder)]
        assert main(["evaluate", str(folder / "model"), *names, "--json", str(folder / "out.json")]) == 0
        (row,) = json.loads((folder / "out.json").read_text())["rows"]
        assert row["scores"] == task_scores(model, tiny_tokenizer(), ["parity"], folder=folder)
    else:
        given = ["--model", "hf", "--model_args", f"pretrained={folder / 'model'}", "--tasks", "parity"]
        assert main(["run", "lm_eval", *given, "--include_path", str(folder), "--device", "cpu"]) == 0
    assert "parity" in capsys.readouterr().out
