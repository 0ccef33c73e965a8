"""Model cards: what they say, what they leave alone, and that they go to the hub with the model."""

import json
from types import SimpleNamespace

import pytest
import transformers.utils.hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from tiny import tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM

import hf_blr
from hf_blr import BLRConfig
from hf_blr.checkpoint.card import CARD, write_card
from hf_blr.cli import main
from hf_blr.plan import plan_in_place
from hf_blr.plan.rows import stored_rows


@pytest.fixture
def model():
    model = tiny_llama()
    model.config._name_or_path = "owner/base"
    hf_blr.compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    return model


def load(folder):
    return ModelCard.load(folder / "README.md")


def test_a_saved_model_has_a_card_with_its_plan(model, tmp_path):
    folder = tmp_path / "smaller"
    model.save_pretrained(folder)
    card = load(folder)
    assert card.data.to_dict() == {"library_name": "transformers", "base_model": "owner/base", "tags": ["hf_blr"]}
    rows, summary = stored_rows(plan_in_place(model), model.dtype)
    assert f"2 x q_proj    | 64 x 64  | low_rank  | 1 x 1  | {rows[0]['rank']} " in card.text and summary in card.text
    size = (folder / "model.safetensors").stat().st_size
    assert f"The weight files have {size / 1e6:.1f} MB" in card.text
    assert "pip install hf-blr" in card.text and "import hf_blr" in card.text
    assert "LlamaForCausalLM.from_pretrained('smaller')" in card.text
    assert "`BLRConfig(structure='low_rank', ratio=0.5)`, fitted to weights" in card.text
    # nothing was measured
    assert "nats" not in card.text


def test_what_is_known_of_a_model_outlives_a_reload(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == (tmp_path / "a" / "README.md").read_text().replace(
        "'a'", "'b'"
    )
    hf_blr.to_dense(loaded).save_pretrained(tmp_path / "c")
    assert not (tmp_path / "c" / "README.md").exists()


def test_a_card_of_somebody_else_keeps_its_words(model, tmp_path, caplog):
    mine = "---\nlicense: mit\nbase_model: other/base\ntags:\n- mine\n---\n\n# My model\n\nBefore.\n"
    (tmp_path / "README.md").write_text(mine)
    model.save_pretrained(tmp_path)
    once = (tmp_path / "README.md").read_text()
    card = load(tmp_path)
    assert (card.data.license, card.data.base_model, card.data.tags) == ("mit", "other/base", ["mine", "hf_blr"])
    assert card.text.strip().startswith("# My model\n\nBefore.\n") and "2 x q_proj" in card.text
    (tmp_path / "README.md").write_text(once + "\nAfter.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == once + "\nAfter.\n"
    (tmp_path / "README.md").write_text(broken := "---\n: {\n---\nMine.\n")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken and "its metadata cannot be read" in caplog.text


@pytest.fixture
def hub(monkeypatch):
    """A hub that takes one commit; its cards are in `cards`, what was sent in `sent`."""
    hub = SimpleNamespace(cards={}, sent={})

    def create_commit(repo_id, operations, **kwargs):
        for operation in operations:
            with operation.as_file() as file:
                hub.sent[operation.path_in_repo] = file.read().decode(errors="replace")

    def load_card(repo_id, **kwargs):
        if repo_id not in hub.cards:
            raise EntryNotFoundError("no card")
        return ModelCard(hub.cards[repo_id])

    hub.create_repo = lambda repo_id, **kwargs: SimpleNamespace(repo_id=repo_id)
    hub.create_branch = lambda *args, **kwargs: None
    hub.create_commit = create_commit
    for module in (transformers.utils.hub, transformers.modeling_utils):
        monkeypatch.setattr(module, "hf_api", lambda: hub)
    monkeypatch.setattr(transformers.utils.hub.ModelCard, "load", load_card)
    return hub


@pytest.mark.parametrize("by", ["push_to_hub", "save_pretrained"])
@pytest.mark.parametrize("known", [False, True])
def test_the_card_goes_to_the_hub(model, tmp_path, hub, by, known):
    if known:
        hub.cards["me/smaller"] = "---\nlicense: mit\n---\nMy words.\n"
    if by == "push_to_hub":
        model.push_to_hub("me/smaller")
    else:
        model.save_pretrained(tmp_path, push_to_hub=True, repo_id="me/smaller")
    card = ModelCard(hub.sent["README.md"])
    assert "hf_blr" in card.data.tags and card.data.base_model == "owner/base" and "model.safetensors" in hub.sent
    assert "from_pretrained('me/smaller')" in card.text and "2 x q_proj" in card.text
    assert card.data.license == ("mit" if known else None) and ("My words." in card.text) == known


def test_the_command_line_says_what_it_did_and_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("dense")
    tiny_tokenizer().save_pretrained("dense")
    text = tmp_path / "text.txt"
    text.write_text("A line about one thing, then a line about another. " * 60)
    words = ["--structure", "low_rank", "--ratio", "0.5", "--dataset", str(text), "--seqlen", "16"]
    assert main(["compress", "dense", "out", *words, "--num-samples", "34", "--json", "c.json"]) == 0
    report = json.loads((tmp_path / "c.json").read_text())["report"]
    card = load(tmp_path / "out").text
    assert f"{report['divergence']:.4f} nats a token" in card and f"on {report['held_out_tokens']} tokens" in card
    # a path of this machine tells nobody anything
    command = (
        "hf-blr compress dense out --structure low_rank --ratio 0.5 --dataset text.txt --seqlen 16 --num-samples 34"
    )
    assert f"{command} --json c.json" in card and f"fitted to {report['calibration_tokens']} tokens of text.txt" in card
    assert str(tmp_path) not in card and "from_pretrained('out')" in card and "`dense` with" in card

    (tmp_path / "out" / "README.md").write_text("Mine.\n" + card)
    assert main(["evaluate", "dense", "out", "--dataset", str(text), "--seqlen", "64", "--json", "e.json"]) == 0
    assert main(["card", "out", "--results", "e.json", "--name", "me/out"]) == 0
    card = load(tmp_path / "out").text
    for row in json.loads((tmp_path / "e.json").read_text())["rows"]:
        assert f"{row['ppl']:.2f}" in card
    assert card.strip().startswith("Mine.") and card.count("from_pretrained(") == 1 and "('me/out')" in card

    train = ["--dataset", str(text), "--steps", "2", "--seqlen", "32", "--overwrite", "--json", "f.json"]
    assert main(["finetune", "out", "out", *train]) == 0
    card, result = load(tmp_path / "out").text, json.loads((tmp_path / "f.json").read_text())
    assert "hf-blr finetune out out" in card and command in card and card.strip().startswith("Mine.")
    assert all(f"{result[name]['ppl']:.2f}" in card for name in ("before", "after"))

    capsys.readouterr()
    assert main(["card", "dense"]) == 2
    assert "dense is not compressed by hf_blr" in capsys.readouterr().err
    (tmp_path / "e.json").write_text("{}")
    assert main(["card", "out", "--results", "e.json"]) == 2
    assert "e.json is no file that `hf-blr evaluate --json` wrote" in capsys.readouterr().err


def test_a_strangers_words_make_no_text_of_their_own(model, tmp_path):
    origin = model.config.quantization_config.origin
    model.config.quantization_config.origin = {
        **(origin or {}),
        "base_model": "a\n\n# Install\n\nx",
        "command": "a\n```\nb",
    }
    write_card(tmp_path, model.config)
    lines = (tmp_path / CARD).read_text().splitlines()
    assert "# Install" not in lines and any("`a # Install x`" in line for line in lines) and "a ``` b" in lines
    for wrong in ({"divergence": "x"}, {"base_model": [1]}, {"scores": "x"}, {"held_out_tokens": True}, "x"):
        with pytest.raises(ValueError, match="origin must be a dict of numbers, text and scores"):
            BLRConfig("low_rank", ratio=0.5, origin=wrong)
