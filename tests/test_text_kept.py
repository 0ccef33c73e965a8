"""Windows that are written once and fitted to again."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny import EOS_ID, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from hf_blr.cli import main
from hf_blr.linear import blr_modules
from hf_blr.text import keep_windows, load_windows, scored_dataset, sources, write_windows


def load(file, seqlen=16, num_samples=9, model=None):
    return load_windows(str(file), model or tiny_llama(), tiny_tokenizer(), seqlen, num_samples)


def test_windows_come_back_and_long_ones_are_cut(tmp_path):
    file, windows = tmp_path / "w.safetensors", torch.arange(4 * 18).view(4, 18)
    keep_windows(windows, file)
    assert torch.equal(load(file, seqlen=18), windows)
    assert torch.equal(load(file, seqlen=8), windows[:, :16].reshape(8, 8))
    assert len(load(file, seqlen=8, num_samples=3)) == 3
    mixed = load_windows({str(file): 1, "self": 1}, tiny_llama(), tiny_tokenizer(), 18, 4, progress=False)
    assert (mixed[:, 0] == EOS_ID).tolist() == [False, True, False, True]
    assert scored_dataset(str(file), tiny_llama()) == "builtin"


def test_the_teacher_writes_what_a_model_is_fine_tuned_on(tmp_path, monkeypatch):
    dense, out = str(tmp_path / "dense"), str(tmp_path / "out")
    tiny_llama().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    assert main(["compress", dense, out, "--structure", "low_rank", "--rank", "8", "--dataset", "none"]) == 0
    wrote = []
    monkeypatch.setattr(sources, "write_windows", lambda *args, **kw: wrote.append(args) or write_windows(*args, **kw))
    common = ["--dataset", "self", "--steps", "2", "--seqlen", "32", "--json", str(tmp_path / "f.json")]
    assert main(["finetune", out, str(tmp_path / "tuned"), *common, "--teacher", dense]) == 0
    ((author, _, *sizes),) = wrote
    assert not blr_modules(author) and sizes == [8, 32, 0]
    assert json.loads((tmp_path / "f.json").read_text())["after"]["dataset"] == "builtin (test)"


def test_what_cannot_be_fitted_to_says_why(tmp_path):
    file = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="holds no windows that `hf-blr write` wrote"):
        load(file)
    save_file({"weight": torch.zeros(2, 2)}, file)
    with pytest.raises(ValueError, match="holds no windows that `hf-blr write` wrote: 'input_ids'"):
        load(file)
    keep_windows(torch.full((2, 16), 300), file)
    with pytest.raises(ValueError, match="seqlen of at most 16"):
        load(file, seqlen=17)
    with pytest.raises(ValueError, match="holds the token 300, beyond the 257 of LlamaForCausalLM"):
        load(file)
    with pytest.raises(ValueError, match=r"ending in \.safetensors, got .*w\.pt"):
        keep_windows(torch.zeros(2, 2).long(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"token ids \[n, seqlen\], got torch.float32 of \[2, 2\]"):
        keep_windows(torch.zeros(2, 2), file)


def test_the_command_line_writes_and_fits_to_it(tmp_path, capsys):
    dense, file, out = (str(tmp_path / name) for name in ("dense", "text.safetensors", "out"))
    tiny_llama().save_pretrained(dense)
    tiny_tokenizer().save_pretrained(dense)
    sizes = ["--num-samples", "6", "--seqlen", "32"]
    assert main(["write", dense, str(tmp_path / "text.pt"), *sizes]) == 2
    assert "ending in .safetensors" in capsys.readouterr().err
    assert main(["write", dense, file, *sizes, "--seed", "4"]) == 0
    assert f"192 tokens written to {file}" in capsys.readouterr().out
    written = write_windows(tiny_llama(), tiny_tokenizer(), 6, 32, 4, progress=False)
    assert torch.equal(load(file, seqlen=32), written)
    assert main(["write", dense, file, *sizes]) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    text, begun = tmp_path / "text.txt", str(tmp_path / "begun.safetensors")
    text.write_text("To be gone on from. " * 20)
    assert main(["write", dense, begun, *sizes, "--begin-with", str(text), "--begin-tokens", "8"]) == 0
    pieces = load(str(text), seqlen=8, num_samples=6)
    assert torch.equal(load(begun, seqlen=32)[:, :8], pieces)
    common = ["--structure", "low_rank", "--rank", "8", *sizes]
    assert main(["compress", dense, out, *common, "--dataset", f"{file}=3,self=1"]) == 0
    assert f"192 tokens (75 % {file}, 25 % self)" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.dataset == {file: 3.0, "self": 1.0}
    assert main(["inspect", out]) == 0
    assert "fitted to activations on 75 %" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compress", dense, out, *common, "--dataset", "self=x"])
    assert "'self=x' is wrong there" in capsys.readouterr().err
