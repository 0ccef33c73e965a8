"""Ctrl-C or an error in the middle of a compression: what is left works, and says what it is."""

import copy
import logging

import pytest
import torch
from tiny import batches_for, tiny_gpt2, tiny_llama, tiny_logits
from torch import nn

from hf_blr import BLRConfig, compress
from hf_blr.calibration import blockwise, fisher, joint, stand_ins, trace
from hf_blr.calibration.stand_ins import with_stand_ins
from hf_blr.compression import replace
from hf_blr.linear import blr_modules


def stop_at(monkeypatch, place, name, call, error=KeyboardInterrupt):
    """From now on, the function raises at its `call`-th call."""
    original, seen = getattr(place, name), []

    def stopping(*args, **kwargs):
        seen.append(1)
        if len(seen) == call:
            raise error("stopped by the test")
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, stopping)


def hooks_in(model):
    """Everything that calls something of ours from a forward."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


def check_left(model, dense, folder, count):
    """`count` layers are replaced, the config names just those, and the saved model is this one."""
    replaced = blr_modules(model)
    assert len(replaced) == count
    stored = getattr(model.config, "quantization_config", None)
    assert list(stored.layers if stored else ()) == list(replaced)
    assert not hooks_in(model)
    modes = {name: module.training for name, module in dense.named_modules()}
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert list(blr_modules(loaded)) == list(replaced)
    assert torch.equal(tiny_logits(loaded.eval()), tiny_logits(copy.deepcopy(model).eval()))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("kind", ["weights", "sequential", "blockwise", "whole pass"])
def test_a_stopped_fit_leaves_a_model_that_saves_and_loads(kind, make, error, tmp_path, monkeypatch, caplog):
    model = make().train()
    # a part that was frozen in evaluation mode stays so
    model.get_input_embeddings().eval()
    dense = copy.deepcopy(model)
    config = BLRConfig("low_rank", ratio=0.6, allocation="uniform", sequential=kind == "sequential")
    batches = batches_for(model)
    if kind == "whole pass":
        batches = [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]
    stop_at(monkeypatch, replace, "factorize", 6, error)
    with caplog.at_level(logging.WARNING), pytest.raises(error, match="stopped by the test") as stopped:
        compress(model, config, calibration=None if kind == "weights" else batches, progress=False)
    # whoever keeps the traceback keeps all that was under way
    assert stopped.tb
    check_left(model, dense, tmp_path, 5)
    total = 14 if make is tiny_llama else 8
    assert f"{error.__name__} stopped the compression when 5 of {total} layers were replaced" in caplog.text


@pytest.mark.parametrize(
    "place, name, call, count",
    [
        # what the loss feels, before the first fit
        (fisher, "sampled_loss", 2, 0),
        # the chain's first passes
        (trace, "run", 3, 0),
        # between the blocks, with hooks on the layers of the second
        (blockwise.BlockChain, "forward_as", 40, 7),
        # in the refinement of the second block
        (joint, "error", 45, 14),
        # while its layers are exchanged for others
        (stand_ins, "structure_named", 20, 7),
    ],
)
def test_wherever_it_is_stopped(place, name, call, count, tmp_path, monkeypatch):
    model = tiny_llama().train()
    dense = copy.deepcopy(model)
    config = BLRConfig("pivoted", ratio=0.6, allocation="uniform", block_steps=20, fisher=place is fisher)
    stop_at(monkeypatch, place, name, call)
    with pytest.raises(KeyboardInterrupt):
        compress(model, config, calibration=batches_for(model), progress=False)
    check_left(model, dense, tmp_path, count)


def test_a_hook_of_the_users_own_stops_it_and_stays(tmp_path):
    model = tiny_llama()

    def stop(module, args):
        if blr_modules(model.model.layers[0].mlp):
            raise KeyboardInterrupt

    handle = model.model.layers[1].mlp.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        compress(model, BLRConfig("low_rank", ratio=0.6, fisher=False), calibration=batches_for(model), progress=False)
    assert hooks_in(model) == ["model.layers.1.mlp"]
    handle.remove()
    check_left(model, tiny_llama(), tmp_path, len(blr_modules(model)))
    assert 0 < len(blr_modules(model)) < 14


def test_layers_that_stand_in_leave_when_not_all_could_come(monkeypatch):
    model = tiny_llama()
    compress(model, BLRConfig("pivoted", ratio=0.6), progress=False)
    before, logits = list(blr_modules(model).values()), tiny_logits(model)
    pairs = stand_ins.structure_named("pivoted").load("stand_in")
    stop_at(monkeypatch, pairs, "opened", 3)
    with pytest.raises(KeyboardInterrupt), with_stand_ins(model):
        pass
    assert all(a is b for a, b in zip(blr_modules(model).values(), before, strict=True))
    assert torch.equal(tiny_logits(model), logits)


def test_a_plain_module_is_left_with_what_is_replaced(monkeypatch):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    stop_at(monkeypatch, replace, "factorize", 2)
    with pytest.raises(KeyboardInterrupt):
        compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    assert list(blr_modules(model)) == ["0"]
    assert model(torch.randn(2, 16)).shape == (2, 16)
