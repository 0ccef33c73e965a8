"""What blocks are called with besides the hidden states, batch by batch: positions, masks, per-layer inputs, shapes."""

import weakref

import pytest
import torch
from tiny import batches_for, build, divergence, tiny_bert, tiny_gpt2, tiny_llama
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, T5Config, T5EncoderModel

from hf_blr import BLRConfig, compress
from hf_blr.calibration import aim, arguments
from hf_blr.calibration.arguments import with_own_state
from hf_blr.calibration.blockwise import BlockChain, iterate_grams, whole_model_grams
from hf_blr.calibration.calls import Call
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.modes import evaluating
from hf_blr.plan import resolve_plan
from hf_blr.targets import find_targets


def tiny_gemma4(shared=0, layers=2):
    """Its blocks are handed a part of the embedding for each layer; the last `shared` ones another block's keys too."""
    sizes = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "global_head_dim": 16}
    more = {"vocab_size_per_layer_input": 257, "hidden_size_per_layer_input": 16, "num_kv_shared_layers": shared}
    kinds = {"layer_types": ["full_attention"] * layers, "initializer_range": 0.1}
    return build(Gemma4ForCausalLM, Gemma4TextConfig(**sizes, **heads, **more, **kinds))


def tiny_t5_encoder():
    """Its first block computes a position bias that the second one is handed."""
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 257}
    return build(T5EncoderModel, T5Config(**sizes))


def ids(count, length, seed=0):
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(seed))


def packed(count, length):
    """Positions that start again in the middle of each row, at another place in each."""
    starts = [1 + 5 * i % (length - 1) for i in range(count)]
    return torch.stack([torch.cat([torch.arange(n), torch.arange(length - n)]) for n in starts])


def padded(count, length):
    """Masks that hide another number of positions at the end of each row."""
    return (torch.arange(length) < torch.arange(3, 3 + count)[:, None]).long()


def batches_of(tokens, size, **more):
    return [
        {"input_ids": tokens[i : i + size], **{key: value[i : i + size] for key, value in more.items()}}
        for i in range(0, len(tokens), size)
    ]


CASES = {
    "llama": (tiny_llama, batches_of(ids(5, 16), 2)),
    "positions": (tiny_llama, batches_of(ids(5, 16), 1, position_ids=packed(5, 16))),
    "positions at once": (tiny_llama, batches_of(ids(5, 16), 5, position_ids=packed(5, 16))),
    "ragged": (tiny_llama, batches_of(ids(5, 16), 2, position_ids=packed(5, 16))),
    "lengths": (tiny_llama, [{"input_ids": ids(2, n)} for n in (16, 9, 16, 3)]),
    "masks": (tiny_llama, batches_of(ids(6, 16), 2, attention_mask=padded(6, 16))),
    "bert masks": (tiny_bert, batches_of(ids(6, 16), 2, attention_mask=padded(6, 16))),
    "gpt2 masks": (tiny_gpt2, batches_of(ids(6, 16), 2, attention_mask=padded(6, 16))),
    "per-layer inputs": (tiny_gemma4, batches_of(ids(5, 16), 2)),
    "shared keys": (lambda: tiny_gemma4(shared=2, layers=4), batches_of(ids(5, 16), 2)),
    "position bias": (tiny_t5_encoder, [{"input_ids": ids(2, n)} for n in (16, 9, 16)]),
}


@pytest.mark.parametrize("case", CASES)
def test_grams_block_by_block_are_those_of_whole_passes(case):
    make, batches = CASES[case]
    model = make()
    names = find_targets(model)
    right = whole_model_grams(model, names, batches)
    groups = list(iterate_grams(model, names, batches))
    assert len(groups) == model.config.num_hidden_layers
    found = {name: gram for group in groups for name, gram in group.items()}
    assert set(found) == set(right)
    for name, gram in right.items():
        torch.testing.assert_close(found[name], gram, rtol=1e-4, atol=1e-4 * gram.abs().max().item(), msg=name)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma4])
def test_one_batch_or_many_give_the_same_model(make):
    tokens, logits = ids(6, 16), []
    for size in (6, 4, 1):
        model = make()
        config = BLRConfig("low_rank", ratio=0.5, fisher=False, modules_to_not_convert=["per_layer"])
        compress(model, config, calibration=batches_of(tokens, size, position_ids=packed(6, 16)), progress=False)
        with torch.no_grad():
            logits.append(model(input_ids=tokens).logits)
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("sequential", [True, False])
def test_a_mask_of_ones_changes_nothing(sequential):
    dense, results = tiny_llama(), []
    plain = batches_for(dense)
    for masked in (False, True):
        model = tiny_llama()
        ones = {"attention_mask": torch.ones_like(plain[0]["input_ids"])} if masked else {}
        config = BLRConfig("low_rank", ratio=0.5, sequential=sequential)
        compress(model, config, calibration=[{**batch, **ones} for batch in plain], progress=False)
        results.append(divergence(dense, model, plain))
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_blocks_are_refined_on_batches_of_several_shapes(monkeypatch):
    monkeypatch.setattr(aim, "STREAM_SHARE", 1.0)
    model = tiny_llama()
    batches = [{"input_ids": ids(8, n, seed=n)} for n in (24, 17, 20)]
    config = BLRConfig("blast", ratio=0.4, num_blocks=2, fisher=False, block_steps=30, fit_rounds=4)
    report = compress(model, config, calibration=batches, progress=False)
    assert len(report.blocks) == 2
    assert all(block.error_after < block.error_before for block in report.blocks)


def test_only_the_first_batch_runs_the_blocks_and_equal_arguments_are_kept_once():
    model, batches = tiny_llama(), batches_of(ids(6, 16), 2)
    ran = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    with evaluating(model):
        chain = BlockChain.trace(model, list(resolve_plan(model, BLRConfig("low_rank", ratio=0.5))), batches)
    assert len(ran) == 1
    assert "forward" not in vars(model.model.layers[0])
    (segment,) = chain.segments
    cosines = [call.kwargs["position_embeddings"][0] for each in segment.piece.calls.values() for call in each]
    assert len(cosines) == 6 and all(cosine is cosines[0] for cosine in cosines)


class Stack(torch.nn.Module):
    """Residual blocks; what leaves one is written anew or in place (2) before the next one, on batches that say so."""

    def __init__(self, blocks):
        super().__init__()
        self.layers = torch.nn.ModuleList(Residual() for _ in range(blocks))

    def forward(self, x, anew):
        for layer in self.layers:
            x = layer(x)
            if anew.any():
                x = x.add_(1) if anew == 2 else x + 1
        return x


class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(16, 32), torch.nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(
    "blocks, anew, pieces", [(3, [0, 0], 1), (3, [1, 1], 3), (3, [2, 2], 3), (3, [0, 1], 3), (12, [1, 1], 0)]
)
def test_where_something_stands_between_blocks_they_come_in_pieces(blocks, anew, pieces, caplog):
    torch.manual_seed(0)
    model = Stack(blocks)
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    batches = [{"x": torch.randn(4, 16), "anew": torch.tensor(each)} for each in anew]
    chain = BlockChain.trace(model, names, batches)
    assert len(chain.segments) == pieces
    right, found = whole_model_grams(model, names, batches), {}
    for group in iterate_grams(model, names, batches):
        found |= group
        for name in group:
            # as a caller does who replaces layers at once
            torch.nn.init.zeros_(model.get_submodule(name).weight)
    assert set(found) == set(right)
    for name in names:
        torch.testing.assert_close(found[name], right[name])
    compress(model, BLRConfig("low_rank", ratio=0.5), calibration=batches, progress=False)
    assert ("fitted on the dense model's inputs" in caplog.text) is (pieces == 0)
    assert ("layers.8 is handed something else than layers.7 puts out" in caplog.text) is (pieces == 0)


@pytest.mark.parametrize("kind", [BlockChain, SequentialChain])
def test_what_entered_a_block_is_not_kept_for_the_next(kind):
    model, batches = tiny_llama(num_hidden_layers=3), batches_of(ids(6, 16), 2)
    chain = kind.trace(model, find_targets(model), batches)
    entered = [weakref.ref(hidden) for hidden in chain.segments[0].piece.hidden]
    groups = chain.run(chain.segments.pop()) if kind is BlockChain else chain.problems(damping=1e-3)
    for group in groups:
        if next(iter(group)).startswith("model.layers.2"):
            break
    assert not any(hidden() is not None for hidden in entered)
    groups.close()


def test_hooks_of_blocks_run_once_in_a_replay():
    model, batches = tiny_llama(), batches_of(ids(6, 16), 2)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
        layer.register_forward_hook(lambda module, args, out: out + 1)
    names = find_targets(model)
    right = whole_model_grams(model, names, batches)
    for group in iterate_grams(model, names, batches):
        for name, gram in group.items():
            torch.testing.assert_close(gram, right[name], rtol=1e-4, atol=1e-3)


def test_what_blocks_leave_for_later_ones_is_each_models_own():
    state, tensor = {"keys": 1}, torch.zeros(2)
    given = {"a": [Call((tensor,), {"state": state})], "b": [Call((), {"state": state})]}
    own = with_own_state(given)
    assert own["a"][0].kwargs["state"] is own["b"][0].kwargs["state"] is not state
    assert own["a"][0].kwargs["state"] == state
    assert own["a"][0].args[0] is tensor


def test_objects_of_unknown_kinds_count_as_different():
    assert arguments.same((1, "a", None, [torch.ones(2)]), (1, "a", None, [torch.ones(2)]))
    assert not arguments.same(object(), object())
    assert not arguments.same(torch.ones(2), torch.ones(3))
    assert not arguments.same({"a": 1}, {"b": 1})
