"""The examples run, on tiny models in folders."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert, tiny_llama, tiny_mixtral, tiny_tokenizer, tiny_vit
from transformers import BertModel, ViTImageProcessorPil

EXAMPLES = Path(__file__).parents[1] / "examples"

# PEFT asks transformers for it, not this project
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def run(name, monkeypatch, capsys, *arguments):
    """What an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def folder_of(model, path):
    model.save_pretrained(path / "model")
    tiny_tokenizer().save_pretrained(path / "model")
    return ["--model", str(path / "model"), "--output", str(path / "out")]


LM = [
    ("quickstart.py", tiny_llama, ["--seqlen", "128"], "blast: "),
    ("finetune_trainer.py", tiny_llama, ["--steps", "2", "--seqlen", "64"], "train_loss"),
    ("mixture.py", tiny_mixtral, ["--seqlen", "64"], "tensors of experts are factored"),
    ("lora_int4.py", tiny_llama, ["--steps", "2", "--seqlen", "64"], "train_loss"),
]


@pytest.mark.parametrize("name, make, arguments, shown", LM, ids=[name for name, *_ in LM])
def test_examples_with_language_models(name, make, arguments, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    place = folder_of(make(max_position_embeddings=2048), tmp_path)
    if name == "quickstart.py":
        place = place[:2]
    assert shown in run(name, monkeypatch, capsys, *place, *arguments)


def test_the_example_with_a_sentence_encoder(tmp_path, monkeypatch, capsys):
    encoder = BertModel(tiny_bert().config, add_pooling_layer=False)
    printed = run("sentence_encoder.py", monkeypatch, capsys, *folder_of(encoder, tmp_path))
    assert 0.5 < float(printed.rpartition(": ")[2]) < 1 and (tmp_path / "out" / "README.md").exists()


def test_the_example_with_images(tmp_path, monkeypatch, capsys):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "images").mkdir()
    pixels = torch.randint(0, 256, (48, 16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for number, each in enumerate(pixels):
        image.fromarray(each.numpy()).save(tmp_path / "images" / f"{number:02}.png")
    place = folder_of(tiny_vit(), tmp_path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    printed = run("vision_classifier.py", monkeypatch, capsys, str(tmp_path / "images"), *place)
    assert "of 6 other images" in printed and (tmp_path / "out" / "preprocessor_config.json").exists()
