"""MoDeGPT, as a baseline: each of its three decompositions and its allocation are what the paper says they are."""

import copy

import pytest
import torch
from baselines import modegpt
from baselines.modegpt import (
    MOST_REMOVED,
    block_influences,
    hidden_units,
    queries_and_keys,
    shares_removed,
    values_and_outputs,
)
from tiny import tiny_gpt2, tiny_llama

from hf_blr import BLRConfig, collect_statistics
from hf_blr.dense import dense_weight
from hf_blr.targets import find_targets

WINDOWS = torch.randint(0, 256, (8, 32), generator=torch.Generator().manual_seed(0))
BATCHES = list(WINDOWS.split(4))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


@pytest.fixture(scope="module")
def statistics(dense):
    return collect_statistics(dense, BLRConfig(ratio=0.5), calibration=BATCHES)


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_what_is_kept_is_what_is_not_zero_and_no_more_than_asked_for(dense, statistics, ratio):
    model, kept = modegpt(dense, ratio, statistics, BATCHES, epsilon=1.0)
    weights = [dense_weight(model.get_submodule(name)) for name in find_targets(dense)]
    total = sum(weight.numel() for weight in weights)
    assert kept == sum(int((weight != 0).sum()) for weight in weights)
    assert 0.98 * ratio * total < kept <= ratio * total


def test_nothing_changes_where_everything_is_kept(dense, statistics):
    model, _ = modegpt(dense, 1.0, statistics, BATCHES, epsilon=0.1)
    with torch.no_grad():
        torch.testing.assert_close(model(WINDOWS).logits, dense(WINDOWS).logits, rtol=1e-3, atol=1e-3)


def test_values_and_outputs_are_the_best_of_their_rank_over_all_heads_of_a_group():
    (groups, each), size, features = (2, 3), 4, 10
    v, o = random(groups * size, features), random(features, groups * each * size, seed=1)
    x = random(50, features, seed=2)
    new_v, new_o = values_and_outputs(v, o, x.T @ x, (groups, each), 0.5)
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        heads = [slice(h * size, (h + 1) * size) for h in range(group * each, (group + 1) * each)]
        whole = torch.cat([x @ v[rows].T @ o[:, head].T for head in heads], 1)
        found = torch.cat([x @ new_v[rows].T @ new_o[:, head].T for head in heads], 1)
        least = torch.linalg.svdvals(whole)[2:].square().sum()
        torch.testing.assert_close((whole - found).square().sum(), least, rtol=1e-4, atol=0)
        assert (new_v[rows] != 0).any(1).sum() == 2


def test_pairs_of_rotary_dimensions_are_chosen_for_the_whole_group_and_stay_as_they_are():
    (groups, each), size, features = (2, 2), 6, 8
    q, k = random(groups * each * size, features), random(groups * size, features, seed=1)
    # one head of the first group asks for pair 1 = (1, 4), where the other is silent; the second group's keys hold 2
    q.view(groups, each, size, features)[0, 0, [1, 4]] *= 100
    q.view(groups, each, size, features)[0, 1, [1, 4]] *= 0.1
    k.view(groups, size, features)[1, [2, 5]] *= 100
    new_q, new_k = queries_and_keys(q, k, torch.eye(features, dtype=torch.float64), (groups, each), 0.4)
    assert (new_k.view(groups, size, features) != 0).any(2).nonzero().tolist() == [[0, 1], [0, 4], [1, 2], [1, 5]]
    kept_of_q = (new_q.view(groups, each, size, features) != 0).any(3)
    assert torch.equal(kept_of_q, (new_k.view(groups, 1, size, features) != 0).any(3).expand_as(kept_of_q))
    assert torch.equal(new_q[new_q != 0], q[new_q != 0]) and torch.equal(new_k[new_k != 0], k[new_k != 0])


def test_an_input_that_is_never_seen_says_nothing_of_a_dimension():
    q, k = random(4, 3), random(4, 3, seed=1)
    q[[0, 2], 2] = 1e3
    gram = torch.diag(torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    q[[0, 2], :2] = 0.01
    _, new_k = queries_and_keys(q, k, gram, (1, 1), 0.5)
    assert (new_k != 0).any(1).nonzero().flatten().tolist() == [1, 3]


def test_units_that_others_stand_in_for_go_and_the_down_projection_is_least_squares():
    activations = random(200, 4)
    # the last two are sums of the first four, and small
    activations = torch.cat([activations, 0.1 * activations[:, :2] + 1e-3 * random(200, 2, seed=1)], 1)
    down = random(5, 6, seed=2)
    chosen, new = hidden_units(down, activations.T @ activations, 4)
    assert chosen.tolist() == [0, 1, 2, 3] and not new[:, 4:].any()
    best = torch.linalg.lstsq(activations[:, :4], activations @ down.T).solution.T
    torch.testing.assert_close(new[:, :4], best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("removed", [0.2, 0.7])
def test_the_allocation_maximises_influence_kept_and_entropy(removed):
    influences = torch.tensor([0.9, 0.1, 0.4, 0.15, 0.05], dtype=torch.float64)
    epsilon = 0.3

    def gain(phi):
        return (influences * (1 - phi)).sum(-1) - epsilon * torch.xlogy(phi, phi).sum(-1)

    phi = shares_removed(influences, removed, epsilon)
    assert phi.mean().item() == pytest.approx(removed) and phi.max() <= MOST_REMOVED
    moved = phi + 0.01 * torch.nn.functional.normalize(random(10000, 5) - random(10000, 5).mean(1, keepdim=True))
    feasible = moved[((moved >= 0) & (moved <= MOST_REMOVED)).all(1)]
    assert len(feasible) > 100 and (gain(feasible) < gain(phi)).all()


def test_a_block_that_does_nothing_has_no_influence():
    model = copy.deepcopy(tiny_llama())
    idle = model.model.layers[1]
    for layer in (idle.self_attn.o_proj, idle.mlp.down_proj):
        layer.weight.data.zero_()
    busy, none = block_influences(model, list(model.model.layers), BATCHES).tolist()
    assert none == pytest.approx(0, abs=1e-6) and busy > 0.05


def test_models_of_another_form_are_refused(statistics):
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no blocks with self_attn and mlp"):
        modegpt(tiny_gpt2(), 0.5, statistics, BATCHES, 0.1)
    with pytest.raises(ValueError, match="has biases"):
        modegpt(tiny_llama(attention_bias=True), 0.5, statistics, BATCHES, 0.1)
