"""Fits on the compressed model's own activations: who writes to the stream, what is regressed, what it buys."""

import copy

import pytest
import torch
from tiny import batches_for, build, divergence, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from transformers import SwinConfig, SwinForImageClassification

from hf_blr import BLRConfig, compress
from hf_blr.calibration.blockwise import iterate_grams, whole_model_grams
from hf_blr.calibration.residual import residual_writers
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.dense import dense_weight
from hf_blr.modes import evaluating
from hf_blr.plan import resolve_plan

CONFIG = BLRConfig("low_rank", ratio=0.5)


def trace(model, batches):
    with evaluating(model):
        return SequentialChain.trace(model, list(resolve_plan(model, CONFIG)), batches)


def surveyed(chain):
    """(groups with one input, residual writers, layers) of the first block."""
    segment = chain.segments[0]
    prefix, names = next(iter(segment.groups.items()))
    block, piece = chain.model.get_submodule(prefix), segment.piece
    return *chain.survey(block, prefix, names, piece.hidden[0], piece.calls[prefix][0], None), names


WRITERS = {
    tiny_llama: ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"],
    tiny_gpt2: ["transformer.h.0.attn.c_proj", "transformer.h.0.mlp.c_proj"],
    # normalises what it adds, so the sum of its outputs is not what it adds
    tiny_bert: [],
}


@pytest.mark.parametrize("build", [*WRITERS, tiny_vit])
def test_residual_writers_are_found_by_what_they_add(build):
    model = build()
    chain = trace(model, batches_for(model))
    groups, writers, names = surveyed(chain)
    assert sorted(name for group in groups for name in group) == sorted(names)
    if build is tiny_vit:
        assert len(writers) == 2
        assert len(groups[0]) == 3
    else:
        assert writers == WRITERS[build]
    if build is tiny_llama:
        assert [len(group) for group in groups] == [3, 1, 2, 1]


def test_targets_that_are_only_some_of_the_layers_are_grouped_among_themselves():
    model = tiny_llama()
    names = ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.up_proj"]
    with evaluating(model):
        chain = SequentialChain.trace(model, names, batches_for(model))
    groups, writers, _ = surveyed(chain)
    assert groups == [[name] for name in names]
    assert writers == WRITERS[tiny_llama]


def test_outputs_that_do_not_add_up_are_no_writers():
    outputs = {"a": torch.randn(2, 5, 4), "b": torch.randn(2, 5, 4), "narrow": torch.randn(2, 5, 2)}
    assert residual_writers(outputs["a"] + outputs["b"], outputs) == ["a", "b"]
    assert residual_writers(outputs["a"], outputs) == ["a"]
    assert residual_writers(0.2 * outputs["a"] + outputs["b"], outputs) == []
    assert residual_writers(torch.randn(2, 5, 4), {"narrow": outputs["narrow"]}) == []


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_vit, tiny_bert])
def test_targets_are_the_weights_while_nothing_is_compressed(build):
    model = build()
    chain = trace(model, batches_for(model))
    seen = {}
    for group in chain.problems(damping=1e-4):
        for name, problem in group.items():
            weight = dense_weight(model.get_submodule(name))
            torch.testing.assert_close(problem.target, weight, rtol=1e-3, atol=1e-4)
            seen[name] = problem
    assert set(seen) == set(resolve_plan(model, CONFIG))


def test_a_writers_target_mends_the_residual_stream():
    dense, broken = tiny_llama(), tiny_llama()
    batches = batches_for(dense)
    chain = trace(broken, batches)
    problems = chain.problems(damping=1e-6)
    for group in problems:
        name = next(iter(group))
        if name.endswith("0.self_attn.o_proj"):
            break
        # as a coarse fit would leave them
        for other in group:
            weight = broken.get_submodule(other).weight
            weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))

    def stream_error():
        ends = []
        for model in (dense, broken):
            handle = model.model.layers[0].post_attention_layernorm.register_forward_pre_hook(
                lambda module, args: ends.append(args[0])
            )
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            handle.remove()
        half = len(ends) // 2
        return sum((a - b).square().sum() for a, b in zip(ends[:half], ends[half:], strict=True)).item()

    before = stream_error()
    weight = broken.get_submodule(name).weight
    best = group[name].target
    weight.data = best
    mended = stream_error()
    assert mended < 0.9 * before
    # the regression's answer: every other matrix is worse
    for seed in range(3):
        nudge = torch.randn(best.shape, generator=torch.Generator().manual_seed(seed))
        weight.data = best + 1e-2 * best.norm() * nudge / nudge.norm()
        assert stream_error() > mended
    problems.close()


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_vit])
@pytest.mark.parametrize(
    "structure, blocks", [("low_rank", None), ("pivoted", None), ("monarch", 2), ("blast", (2, 4))]
)
def test_sequential_fits_come_closer_to_the_dense_model(build, structure, blocks):
    dense = build()
    batches = batches_for(dense)
    off = {"structure": structure, "ratio": 0.4, "num_blocks": blocks, "fisher": False, "fit_rounds": 4}
    results = {}
    for sequential in (False, True):
        model = copy.deepcopy(dense)
        config = BLRConfig(**off, sequential=sequential)
        compress(model, config, calibration=batches, progress=False)
        results[sequential] = divergence(dense, model, batches)
    assert results[True] < 0.8 * results[False]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_layers_left_dense_make_up_for_those_before_them(build, monkeypatch):
    dense = build()
    batches = batches_for(dense)
    names = list(resolve_plan(dense, CONFIG))
    # all of the first block, and of the second nothing
    layers = {name: layer.to_dict() for name, layer in list(resolve_plan(dense, CONFIG).items())[: len(names) // 2]}
    config = BLRConfig("low_rank", ratio=0.5, fisher=False, layers=layers)
    results = {}
    for moved in (False, True):
        if not moved:
            monkeypatch.setattr("hf_blr.compression.replace.set_dense_weight", lambda module, weight: None)
        model = copy.deepcopy(dense)
        compress(model, config, calibration=batches, progress=False)
        monkeypatch.undo()
        results[moved] = divergence(dense, model, batches)
        for name in names[len(names) // 2 :]:
            module, before = model.get_submodule(name), dense.get_submodule(name)
            assert type(module) is type(before)
            assert torch.equal(module.weight, before.weight) is not moved
    assert results[True] < 0.8 * results[False]


def test_layers_that_are_no_targets_keep_their_weights():
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    config = BLRConfig("low_rank", ratio=0.5, modules_to_not_convert=["down_proj"])
    compress(model, config, calibration=batches_for(model), progress=False)
    for one, other in zip(dense.model.layers, model.model.layers, strict=True):
        assert torch.equal(one.mlp.down_proj.weight, other.mlp.down_proj.weight)


def test_blocks_that_write_into_what_they_are_handed_are_not_run_alone(caplog):
    model = tiny_llama()
    forward = model.model.layers[0].forward

    def in_place(hidden, *args, **kwargs):
        return hidden.copy_(forward(hidden, *args, **kwargs)) * 1

    model.model.layers[0].forward = in_place
    names, batches = list(resolve_plan(model, CONFIG)), batches_for(model)
    assert set(trace(model, batches).apart.values()) == {"model.layers.0 writes into what it is handed"}
    (found,) = iterate_grams(model, names, batches)
    assert set(found) == set(names)
    compress(model, CONFIG, calibration=batches, progress=False)
    assert "model.layers.0 writes into what it is handed" in caplog.text


class Block(torch.nn.Module):
    """Residual, or writing into what it is handed."""

    def __init__(self, in_place=False):
        super().__init__()
        self.up, self.down, self.in_place = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16), in_place

    def forward(self, x):
        added = self.down(self.up(x).relu())
        return x.add_(added) * 1 if self.in_place else x + added


class TwoLists(torch.nn.Module):
    """The second list reads what the first leaves of the rows, `keep` says which."""

    def __init__(self, in_place, keep):
        super().__init__()
        self.early = torch.nn.ModuleList(Block(in_place) for _ in range(2))
        self.late = torch.nn.ModuleList(Block() for _ in range(2))
        self.keep = keep

    def forward(self, x):
        x = x.clone()
        for block in self.early:
            x = block(x)
        x = x[self.keep(x)]
        for block in self.late:
            x = block(x)
        return x


@pytest.mark.parametrize("in_place", [False, True])
def test_only_the_part_that_cannot_be_run_alone_is_fitted_on_dense_inputs(in_place, caplog):
    torch.manual_seed(0)
    model, batches = TwoLists(in_place, lambda x: slice(None)), [{"x": torch.randn(40, 16)} for _ in range(2)]
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chain = SequentialChain.trace(model, names, batches)
    assert {block for segment in chain.segments for block in segment.groups} == (
        {"late.0", "late.1"} if in_place else {"early.0", "early.1", "late.0", "late.1"}
    )
    report = compress(model, BLRConfig("low_rank", ratio=0.6, fisher=False), calibration=batches, progress=False)
    assert len(report.layers) == 8
    said = [record.getMessage() for record in caplog.records]
    assert said == (
        [
            "early.0 writes into what it is handed: early.0.up, early.0.down, early.1.up, early.1.down are fitted on "
            "the dense model's inputs"
        ]
        if in_place
        else []
    )


def test_a_part_that_runs_otherwise_when_others_are_compressed_is_fitted_on_dense_inputs(caplog):
    torch.manual_seed(0)
    model = TwoLists(False, lambda x: x.sum(-1) > 0)
    batches, targets = [{"x": torch.randn(40, 16)} for _ in range(2)], {}
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    right = whole_model_grams(model, names, batches)
    for group in SequentialChain.trace(model, names, batches).problems(damping=1e-3):
        for name, problem in group.items():
            targets[name] = problem.target
            if name.startswith("late"):
                torch.testing.assert_close(problem.gram, right[name])
            else:
                torch.nn.init.normal_(model.get_submodule(name).weight)
    assert [name for name in names if targets[name] is None] == [name for name in names if name.startswith("late")]
    assert "late.0 runs otherwise in the model compressed so far" in caplog.text


def test_blocks_that_change_the_streams_shape_have_no_writers():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4]}
    model = build(SwinForImageClassification, SwinConfig(**sizes, window_size=2, num_labels=3, initializer_range=0.1))
    report = compress(model, CONFIG, calibration=batches_for(model), progress=False)
    assert report.fitted_to == "activations" and len(report.layers) + len(report.left_dense) == 13


def test_modes_and_gradients_are_as_before():
    model = tiny_llama().train()
    model.model.embed_tokens.weight.requires_grad_(False)
    compress(model, CONFIG, calibration=batches_for(model), progress=False)
    assert all(module.training for module in model.modules())
    assert not model.model.embed_tokens.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
