"""The baselines of the quality benchmark do what their papers say."""

import copy

import pytest
import torch
from baselines import aa_svd, blast_descent, svd_llm_updated, torchao_weights
from tiny import tiny_llama

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.dense import dense_weight
from hf_blr.factorize import relative_error
from hf_blr.structures import FACTOR, Blast
from hf_blr.targets import find_targets

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))


def test_descent_recovers_a_planted_matrix():
    spec = Blast(32, 24, 4, (4, 2))
    generator = torch.Generator().manual_seed(0)
    planted = {name: torch.randn(2, *shape, generator=generator) for name, shape in spec.shapes(FACTOR).items()}
    weights = blast_descent.dense_of(planted)
    factors = blast_descent.preconditioned_descent(weights, Blast(32, 24, 6, (4, 2)), steps=300)
    for weight, found in zip(weights, blast_descent.dense_of(factors), strict=True):
        assert relative_error(weight, found) < 0.02


def test_the_update_of_u_lowers_the_error_on_the_compressed_models_inputs():
    dense = tiny_llama()
    batches = list(WINDOWS.split(4))
    statistics = collect_statistics(dense, BLRConfig("low_rank", ratio=0.4), calibration=batches)
    off = BLRConfig("low_rank", ratio=0.4, sequential=False, fisher=False, damping=1e-4)
    plain = copy.deepcopy(dense)
    compress(plain, off, statistics=statistics, progress=False)
    updated = svd_llm_updated(dense, 0.4, statistics, batches)
    name = "model.layers.0.self_attn.q_proj"
    # nothing was compressed before the first layers: their answer is whitened SVD's
    torch.testing.assert_close(
        updated.get_submodule(name).dense_weight(), plain.get_submodule(name).dense_weight(), rtol=1e-2, atol=1e-3
    )
    name, inputs = "model.layers.1.mlp.down_proj", []
    handle = updated.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            updated(batch)
    handle.remove()
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    weight = dense_weight(dense.get_submodule(name))
    errors = [relative_error(weight, m.get_submodule(name).dense_weight(), rows.T @ rows) for m in (updated, plain)]
    assert errors[0] < errors[1]


def inputs_of(model, name):
    """The rows that reach a layer on the windows."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        model(WINDOWS)
    handle.remove()
    return inputs[0].flatten(0, -2).double()


def test_aa_svd_gives_the_dense_outputs_on_its_own_inputs_as_well_as_any_matrix_of_its_rank():
    dense, name = tiny_llama(), "model.layers.1.mlp.down_proj"
    model = aa_svd(dense, 0.4, list(WINDOWS.split(4)), seed=0, passes=0)
    x, shifted = inputs_of(dense, name), inputs_of(model, name)
    layer = model.get_submodule(name)
    wanted = x @ dense_weight(dense.get_submodule(name)).double().T
    basis = torch.linalg.qr(shifted).Q
    # what no matrix reaches, and the tail of what one of full rank does
    beyond = wanted - basis @ (basis.T @ wanted)
    tail = torch.linalg.svdvals(basis.T @ wanted)[layer.spec.rank :]
    least = beyond.square().sum() + tail.square().sum()
    found = (wanted - shifted @ layer.dense_weight().double().T).square().sum()
    assert least <= found * (1 + 1e-9) and found < 1.001 * least


def test_training_its_blocks_brings_the_last_hidden_states_nearer_to_the_dense_ones():
    dense = tiny_llama()
    with torch.no_grad():
        wanted = dense.model(WINDOWS).last_hidden_state
        closed, trained = (
            aa_svd(dense, 0.4, list(WINDOWS.split(4)), seed=0, passes=passes).model(WINDOWS).last_hidden_state
            for passes in (0, 25)
        )
    assert (trained - wanted).norm() < (closed - wanted).norm()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_torchao_rounds_each_projection_by_a_scale_a_row(name):
    pytest.importorskip("torchao")
    dense = tiny_llama()
    model, stored = torchao_weights(dense, name)
    targets = find_targets(dense)
    count = sum(dense.get_submodule(target).weight.numel() for target in targets)
    rows = sum(dense.get_submodule(target).weight.shape[0] for target in targets)
    # a scale, and of int8 a zero
    assert count + 2 * rows <= stored <= count + 6 * rows
    for target in targets:
        weight, rounded = dense.get_submodule(target).weight, model.get_submodule(target).weight
        assert 1e-4 < relative_error(weight, rounded) < {"int8": 0.02, "fp8": 0.04}[name]
    # what is no projection stays
    assert torch.equal(model.lm_head.weight, dense.lm_head.weight)
