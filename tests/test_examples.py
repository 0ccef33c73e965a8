"""The examples run, on tiny models in folders."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_bert, tiny_llama, tiny_mixtral, tiny_tokenizer, tiny_vit
from transformers import BertModel, ViTImageProcessorPil

import hf_blr

EXAMPLES = Path(__file__).parents[1] / "examples"

# PEFT and TRL ask transformers for it, not this project
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning"),
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
    ("mixture.py", tiny_mixtral, ["--seqlen", "64"], "tensors of experts are compressed"),
    ("mixture.py", tiny_mixtral, ["--seqlen", "64", "--bits", "4.5"], "tensors of experts are compressed"),
    ("lora_int4.py", tiny_llama, ["--steps", "2", "--seqlen", "64"], "train_loss"),
    ("sft_trl.py", tiny_llama, ["--steps", "2", "--seqlen", "64"], "distill_loss"),
    ("sft_trl.py", tiny_llama, ["--steps", "2", "--seqlen", "64", "--lora"], "distill_loss"),
]


@pytest.mark.parametrize("name, make, arguments, shown", LM, ids=[" ".join([name, *more]) for name, _, more, _ in LM])
def test_examples_with_language_models(name, make, arguments, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if name == "sft_trl.py":
        pytest.importorskip("trl")
    place = folder_of(make(max_position_embeddings=2048), tmp_path)
    if name == "quickstart.py":
        place = place[:2]
    assert shown in run(name, monkeypatch, capsys, *place, *arguments)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_the_example_with_several_processes(tmp_path):
    model = tiny_llama(max_position_embeddings=2048)
    dense, output = folder_of(model, tmp_path)[1::2]
    hf_blr.compress(model, hf_blr.BLRConfig("blast", ratio=0.7, fit_rounds=2), progress=False)
    model.save_pretrained(tmp_path / "smaller")
    tiny_tokenizer().save_pretrained(tmp_path / "smaller")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    example = [EXAMPLES / "finetune_gpus.py", tmp_path / "smaller", "--teacher", dense, "--output", output]
    # the loopback device, whatever name this machine has for itself
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    sizes = ["--steps", "2", "--seqlen", "64"]
    done = subprocess.run([*launch, *example, *sizes], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "2 processes: " in done.stdout, done.stderr[-3000:]
    tuned = type(model).from_pretrained(output)
    before, after = model.state_dict(), tuned.state_dict()
    assert {name.split(".")[-1] for name in before if not torch.equal(before[name], after[name])} == {"u", "s", "v"}


def test_the_example_with_a_sentence_encoder(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sentence_transformers")
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
