"""Factors of one block refined together: what falls, what stays, what is reported."""

import copy

import pytest
import torch
from tiny import batches_for, divergence, tiny_gpt2, tiny_llama, tiny_vit

from hf_blr import BLRConfig, compress
from hf_blr.calibration import aim, joint
from hf_blr.calibration.calls import Call
from hf_blr.formats import FactorInBits


class Chain:
    """Runs blocks as they are."""

    def forward_as(self, block, function, hidden, call):
        return call.on(function, hidden)


SETTINGS = {"ratio": 0.4, "fisher": False, "fit_rounds": 4}


def compressed(build, steps, structure="blast", blocks=(2, 4), dtype=torch.float32, **more):
    model = build().to(dtype)
    batches = batches_for(model)
    if model.main_input_name == "pixel_values":
        batches = [{key: value.to(dtype) for key, value in batch.items()} for batch in batches]
    config = BLRConfig(structure, num_blocks=blocks, block_steps=steps, **{**SETTINGS, **more})
    return model, compress(model, config, calibration=batches, progress=False), batches


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_vit])
@pytest.mark.parametrize(
    "structure, blocks", [("low_rank", None), ("pivoted", None), ("monarch", 2), ("blast", (2, 4))]
)
def test_blocks_come_closer_to_the_dense_ones(build, structure, blocks, monkeypatch):
    """All of the way to the dense stream: half of it is what a trained model wants, and takes random ones less far."""
    monkeypatch.setattr(aim, "STREAM_SHARE", 1.0)
    plain, without, batches = compressed(build, 0, structure, blocks)
    model, report, _ = compressed(build, 30, structure, blocks)
    assert without.blocks == [] and len(report.blocks) == 2
    assert all(block.error_after < block.error_before for block in report.blocks)
    assert sum(b.error_after for b in report.blocks) < 0.97 * sum(b.error_before for b in report.blocks)
    dense = build()
    assert divergence(dense, model, batches) < divergence(dense, plain, batches)


@pytest.mark.parametrize("structure, stored", [("low_rank", "int3"), ("pivoted", "fp8"), ("dense", "int2")])
def test_blocks_in_bits_come_closer_by_their_scales(structure, stored, monkeypatch):
    monkeypatch.setattr(aim, "STREAM_SHARE", 1.0)
    whole = structure == "dense"
    more = {"dense_format": stored} | ({"ratio": None} if whole else {"factor_format": stored, "allocation": "uniform"})
    plain, _, batches = compressed(tiny_llama, 0, structure, None, **more)
    model, report, _ = compressed(tiny_llama, 30, structure, None, **more)
    # that of the first block, whose inputs are the same
    name = "model.layers.0.mlp.down_proj." + ("w" if whole else "u")
    before, after = plain.get_submodule(name), model.get_submodule(name)
    assert isinstance(after, FactorInBits) and not torch.equal(after.weight_scale, before.weight_scale)
    part = before.storage.code_part
    assert torch.equal(getattr(after, part).view(torch.uint8), getattr(before, part).view(torch.uint8))
    assert len(report.blocks) == 2
    assert all(block.error_after < block.error_before for block in report.blocks)
    dense = tiny_llama()
    assert divergence(dense, model, batches) < divergence(dense, plain, batches)


@pytest.mark.parametrize("number", [0, 1])
def test_reported_errors_are_those_of_the_block(number):
    """Towards half of the dense model's stream and half of what its block makes of the compressed model's."""
    dense = tiny_llama()
    model, report, batches = compressed(tiny_llama, 10)
    found, calls, outputs = [], {}, {}
    for key, m in (("dense", dense), ("model", model)):

        def see(module, args, kwargs, out, key=key):
            calls[key], outputs[key] = (args, kwargs), out

        m.model.layers[number].register_forward_hook(see, with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            dense(**batch, use_cache=False)
            stream = outputs["dense"]
            model(**batch, use_cache=False)
            args, kwargs = calls["model"]
            wanted = (stream + dense.model.layers[number](*args, **kwargs)) / 2
            change = (outputs["model"] - wanted).square().sum(-1) / wanted.square().sum(-1)
            found.append(change.mean().item())
    block = report.blocks[number]
    assert block.name == f"model.layers.{number}"
    assert block.error_after == pytest.approx(sum(found) / len(found), rel=1e-4)
    assert report.to_dict()["blocks"][number]["error_before"] == block.error_before
    assert "2 blocks refined" in str(report)


@pytest.mark.parametrize("more", [{}, {"factor_format": "int4", "allocation": "uniform"}])
def test_a_step_too_far_is_taken_back(more, monkeypatch):
    plain, *_ = compressed(tiny_llama, 0, **more)
    monkeypatch.setattr(joint, "LEARNING_RATE", 10.0)
    model, report, _ = compressed(tiny_llama, 3, **more)
    assert all(block.error_after == block.error_before for block in report.blocks)
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_of_many_batches_the_last_judges_and_trains_nothing():
    def refined(last):
        """(factors before, after, report) of a block whose last batch should become `last(what leaves it)`."""
        torch.manual_seed(0)
        model = compressed(tiny_llama, 0)[0]
        block, embedded = model.model.layers[0], torch.randn(joint.JUDGED_FROM, 2, 8, 64)
        rotary = model.model.rotary_emb(embedded[0], torch.arange(8)[None])
        call = Call((), {"position_embeddings": rotary})
        aimed = aim.Aim(Chain(), block, [call] * len(embedded), [None] * len(embedded))
        with torch.no_grad():
            left = [aimed.run(block, x, i) for i, x in enumerate(embedded)]
        wanted = [1.1 * y for y in left[:-1]] + [last(left[-1])]
        before = copy.deepcopy(block.state_dict())
        report = joint.refine_block("block", block, aimed, list(embedded), wanted, 10)
        return before, block.state_dict(), report

    towards, further = refined(lambda y: 1.1 * y), refined(lambda y: 1.2 * y)
    assert all(torch.equal(towards[1][key], further[1][key]) for key in towards[1])
    assert towards[2].error_after < towards[2].error_before and towards[2].error_before != further[2].error_before
    # it leaves the block as it should already: whatever the others gain, the old factors come back
    before, after, report = refined(lambda y: y)
    assert report.error_after == report.error_before == 0 and all(
        torch.equal(before[key], after[key]) for key in before
    )


def test_the_same_seed_gives_the_same_factors():
    states = [compressed(tiny_llama, 5, seed=seed)[0].state_dict() for seed in (1, 1, 2)]
    same = [all(torch.equal(states[0][key], other[key]) for key in other) for other in states[1:]]
    assert same == [True, False]


def test_only_factors_move_and_nothing_keeps_a_gradient():
    dense = tiny_llama().train()
    dense.model.norm.weight.requires_grad_(False)
    model = copy.deepcopy(dense)
    config = BLRConfig("blast", num_blocks=(2, 4), block_steps=5, **SETTINGS)
    compress(model, config, calibration=batches_for(model), progress=False)
    state = model.state_dict()
    for name, value in dense.state_dict().items():
        assert name not in state or torch.equal(state[name], value), name
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert not model.model.norm.weight.requires_grad and model.model.embed_tokens.weight.requires_grad


def test_a_bfloat16_model_is_refined_in_float32_and_stays_what_it_is():
    model, report, _ = compressed(tiny_llama, 30, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(block.error_after < block.error_before for block in report.blocks)


def test_steps_with_products_in_bfloat16_come_closer_in_float32(monkeypatch):
    """As on a GPU."""
    plain, *_ = compressed(tiny_llama, 20)
    monkeypatch.setattr(joint, "in_bfloat16", lambda device: torch.autocast("cpu", torch.bfloat16))
    model, report, _ = compressed(tiny_llama, 20)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(block.error_after < block.error_before for block in report.blocks)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.u, plain.model.layers[0].mlp.up_proj.u)


@pytest.mark.parametrize(
    "structure, blocks", [("low_rank", None), ("pivoted", None), ("monarch", 2), ("blast", (2, 4))]
)
def test_gradients_lie_as_their_factors_do(structure, blocks, monkeypatch):
    """Fused steps, on a GPU, refuse others; BLAST's s gets its gradient with the ranks first."""
    step, seen = joint.Muon.step, []

    def watched(self):
        seen.extend(p.grad.stride() == p.stride() for group in self.param_groups for p in group["params"])
        return step(self)

    monkeypatch.setattr(joint.Muon, "step", watched)
    compressed(tiny_llama, 2, structure, blocks)
    assert seen and all(seen)


def test_a_block_left_dense_is_left_alone():
    _, report, _ = compressed(tiny_llama, 5, target_modules=r".*layers\.1\..*proj")
    assert [block.name for block in report.blocks] == ["model.layers.1"]


def test_batches_all_come_before_any_comes_again():
    numbers = joint.order(4, 10, seed=0)
    assert sorted(numbers[:4]) == sorted(numbers[4:8]) == [0, 1, 2, 3] and len(numbers) == 10


def test_settings_that_cannot_be_met_are_refused():
    with pytest.raises(ValueError, match="block_steps refine"):
        BLRConfig("blast", ratio=0.5, block_steps=4, sequential=False)
    with pytest.raises(ValueError, match="block_steps must be an integer"):
        BLRConfig("blast", ratio=0.5, block_steps=-1)
    assert BLRConfig.from_dict(BLRConfig("blast", ratio=0.5, block_steps=7).to_dict()).block_steps == 7
