"""`fuse`: projections that share their input run together, and nothing else about the model changes."""

import copy
import gc
import io
import threading
import weakref

import pytest
import torch
from fusion_cases import CONFIGS, compressed
from tiny import tiny_bert, tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits
from torch import nn

import hf_blr
from hf_blr import ops
from hf_blr.inference.grouped import MARK, ProjectionGroup
from hf_blr.linear import BLRLinear
from hf_blr.ops.triton.grouped import split
from hf_blr.ops.triton.grouped_monarch import stacked
from hf_blr.structures import Blast, LowRank

pytest.importorskip("triton")


@pytest.fixture
def computed(monkeypatch):
    """Each group that computes appends its modules here."""
    calls, compute, gated = [], ProjectionGroup.compute, ProjectionGroup.gated

    def counted(self, x, activation):
        out = gated(self, x, activation)
        if out is not None:
            calls.append(self.modules)
        return out

    monkeypatch.setattr(ProjectionGroup, "compute", lambda self, x: calls.append(self.modules) or compute(self, x))
    monkeypatch.setattr(ProjectionGroup, "gated", counted)
    return calls


@pytest.fixture
def attention(computed):
    """q, k and v of one attention block, fused; their kernels run under the interpreter."""
    torch.manual_seed(0)
    block = nn.Module()
    for name, n in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6)):
        block.add_module(name, BLRLinear.from_spec(Blast(8, n, 3, (2, 3))))
    assert hf_blr.fuse(block) == [("q_proj", "k_proj", "v_proj")]
    with ops.use_impl("triton"):
        yield block


def one_block():
    """The interpreter takes its time for each layer."""
    return tiny_llama(num_hidden_layers=1)


def alone(module, x):
    with ops.use_impl("reference"):
        return module(x)


@pytest.mark.parametrize("structure", CONFIGS)
def test_a_fused_model_gives_the_same_logits_with_one_call_for_each_group(structure, computed):
    model = compressed(structure, one_block)
    expected = tiny_logits(model)
    groups = hf_blr.fuse(model)
    assert len(groups) == 2 and groups[0] == tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    with ops.use_impl("triton"):
        torch.testing.assert_close(tiny_logits(model), expected, rtol=1e-4, atol=1e-4)
    assert len(computed) == 2


def test_nothing_changes_where_no_kernel_runs(computed):
    model = compressed()
    expected = tiny_logits(model)
    hf_blr.fuse(model)
    torch.testing.assert_close(tiny_logits(model), expected)
    assert not computed


def test_factors_lie_side_by_side_and_take_no_more_memory(attention):
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in attention.parameters()}
    assert sum(storages.values()) == 4 * sum(p.numel() for p in attention.parameters())
    assert k.u.data_ptr() + k.u.numel() * 4 == v.u.data_ptr()
    assert q.v[0].data_ptr() + q.v[0].numel() * 4 == k.v[0].data_ptr()


def test_low_rank_layers_of_several_ranks_are_read_as_one():
    block = nn.Module()
    for name, rank in (("q_proj", 4), ("k_proj", 2), ("v_proj", 3)):
        block.add_module(name, BLRLinear.from_spec(LowRank(8, 12, rank)))
    hf_blr.fuse(block)
    assert split(range(3), (stacked([module.v for module in block.children()]), 1)) == [range(3)]


@torch.no_grad()
def test_groups_take_their_outputs_and_nothing_stays(attention, computed):
    x = torch.randn(5, 8)
    for order in (("q_proj", "k_proj", "v_proj"), ("v_proj", "q_proj", "k_proj")):
        outs = [getattr(attention, name)(x) for name in order]
        for name, out in zip(order, outs, strict=True):
            torch.testing.assert_close(out, alone(getattr(attention, name), x))
        assert not hasattr(x, MARK)
    assert len(computed) == 2
    attention.q_proj(x)
    waiting = weakref.ref(getattr(x, MARK)[1][1][0])
    del x
    gc.collect()
    assert waiting() is None


@torch.no_grad()
def test_layers_that_read_different_tensors_run_alone_again(attention, computed):
    for _ in range(20):
        x, other = torch.randn(2, 5, 8)
        for module, given in zip(attention.children(), (x, x, other), strict=True):
            torch.testing.assert_close(module(given), alone(module, given))
    assert len(computed) == 8


@torch.no_grad()
@pytest.mark.parametrize("change", ["input", "factor", "moved factor", "other input", "impl"])
def test_no_stale_output(attention, change):
    x = torch.randn(5, 8)
    attention.q_proj(x)
    if change == "input":
        x.mul_(2)
    elif change == "factor":
        attention.k_proj.s.add_(1)
    elif change == "moved factor":
        attention.k_proj.s.data = attention.k_proj.s.data + 1
    elif change == "other input":
        x = x + 1
    else:
        getattr(x, MARK)[1][1][0].fill_(float("nan"))
        with ops.use_impl("auto"):
            torch.testing.assert_close(attention.k_proj(x), alone(attention.k_proj, x))
    torch.testing.assert_close(attention.k_proj(x), alone(attention.k_proj, x))


@torch.no_grad()
def test_a_module_with_an_implementation_of_its_own_takes_its_group_apart(attention, computed):
    x = torch.randn(5, 8)
    attention.q_proj(x)
    getattr(x, MARK)[1][1][0].fill_(float("nan"))
    attention.k_proj.impl = "reference"
    assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))
    assert len(computed) == 1
    x = torch.randn(5, 8)
    for module in attention.children():
        torch.testing.assert_close(module(x), alone(module, x))
    assert len(computed) == 1 and not hasattr(x, MARK)
    attention.k_proj.impl = ""
    attention.q_proj(x)
    assert len(computed) == 2


def test_gradients_go_the_way_of_single_layers(attention, computed):
    x = torch.randn(5, 8)
    with torch.no_grad():
        attention.q_proj(x)
    out = attention.k_proj(x)
    assert out.requires_grad and len(computed) == 1
    out.sum().backward()
    assert attention.k_proj.v.grad.shape == attention.k_proj.v.shape
    attention.requires_grad_(False)
    attention.q_proj(x)
    assert len(computed) == 2
    assert attention.k_proj(x.clone().requires_grad_()).requires_grad


@torch.inference_mode()
def test_inference_mode_runs_layers_alone(attention, computed):
    x = torch.randn(5, 8)
    torch.testing.assert_close(attention.q_proj(x), alone(attention.q_proj, x))
    assert not computed


@pytest.mark.slow
def test_threads_share_modules_and_inputs(attention, monkeypatch):
    # Triton's interpreter runs in one thread at a time
    lock, compute = threading.Lock(), ProjectionGroup.compute

    def locked(self, x):
        with lock:
            return compute(self, x)

    monkeypatch.setattr(ProjectionGroup, "compute", locked)
    inputs = [torch.randn(3, 8) for _ in range(2)]
    with torch.no_grad():
        expected = [[alone(m, x) for m in attention.children()] for x in inputs]
    checked = []

    @torch.no_grad()
    def work():
        for _ in range(5):
            for x, outs in zip(inputs, expected, strict=True):
                for module, out in zip(attention.children(), outs, strict=True):
                    checked.append(torch.allclose(module(x), out, atol=1e-5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(checked) == 3 * 5 * 2 * 3 and all(checked)


@pytest.mark.parametrize("structure", CONFIGS)
def test_saves_and_loads_as_before(structure, tmp_path):
    model = compressed(structure)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = tiny_logits(model)
    hf_blr.fuse(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[n], before[n]) for n in before)
    factors = [t for n, t in after.items() if "_proj." in n]
    assert len({t.untyped_storage().data_ptr() for t in factors}) == len(factors)
    assert all(t.is_contiguous() for t in factors)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(type(model).from_pretrained(tmp_path)), expected)
    model.load_state_dict({name: value * 2 for name, value in before.items()})
    assert torch.equal(model.model.layers[0].self_attn.k_proj.v, 2 * before["model.layers.0.self_attn.k_proj.v"])


@torch.no_grad()
def test_copies_and_pickles_stand_alone(attention, computed):
    x = torch.randn(5, 8)
    file = io.BytesIO()
    torch.save(attention, file)
    file.seek(0)
    for other in (copy.deepcopy(attention), torch.load(file, weights_only=False), copy.copy(attention.q_proj)):
        assert all(getattr(m, "group", None) is None for m in other.modules())
    assert attention.q_proj.group is not None
    other.group = None
    torch.testing.assert_close(other(x), alone(attention.q_proj, x))
    assert not computed


@torch.no_grad()
def test_a_cast_model_is_right_and_can_be_fused_again(attention, computed):
    x = torch.randn(5, 8).half()
    attention.half()
    outs = [module(x) for module in attention.children()]
    hf_blr.fuse(attention)
    again = [module(x) for module in attention.children()]
    for module, out, other in zip(attention.children(), outs, again, strict=True):
        for got in (out, other):
            torch.testing.assert_close(got, alone(module, x), rtol=1e-2, atol=1e-3)
    assert len(computed) == 2


@torch.no_grad()
def test_unfuse_gives_each_parameter_memory_of_its_own(attention, computed):
    values = [p.clone() for p in attention.parameters()]
    hf_blr.unfuse(attention)
    assert all(torch.equal(p, v) and p.is_contiguous() for p, v in zip(attention.parameters(), values, strict=True))
    assert len({p.untyped_storage().data_ptr() for p in attention.parameters()}) == len(values)
    attention.q_proj(torch.randn(5, 8))
    assert not computed


@pytest.mark.parametrize("structure", ["monarch", "blast"])
def test_training_goes_on_as_before_but_alone(structure):
    models = [compressed(structure), compressed(structure)]
    assert hf_blr.fuse(models[1])
    for model in models:
        model.train()
        assert all(p.is_contiguous() for p in model.parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        inputs = tiny_inputs(model)
        for _ in range(2):
            model(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
    torch.testing.assert_close(tiny_logits(models[1]), tiny_logits(models[0]), rtol=1e-4, atol=1e-4)


# PEFT reads an attribute that newer transformers renamed
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_on_top(computed):
    from peft import LoraConfig, get_peft_model

    model = compressed(build=one_block)
    lora = LoraConfig(r=2, target_modules=hf_blr.lora_targets(model), init_lora_weights=False)
    peft_model = get_peft_model(model, lora)
    expected = tiny_logits(peft_model.eval())
    assert len(hf_blr.fuse(peft_model)) == 2
    with ops.use_impl("triton"):
        torch.testing.assert_close(tiny_logits(peft_model), expected, rtol=1e-4, atol=1e-4)
    assert len(computed) == 2


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("structure", CONFIGS)
def test_compiles_as_one_graph_with_one_op_for_each_group(structure):
    model = compressed(structure, one_block)
    hf_blr.fuse(model)
    ids, graphs = torch.arange(3)[None], []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    with ops.use_impl("triton"):
        expected = model(ids).logits
        got = torch.compile(model, fullgraph=True, backend=backend)(ids).logits
    torch.testing.assert_close(got, expected)
    nodes = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    calls = [str(node.target) for node in nodes if "grouped" in str(node.target)]
    assert len(graphs) == 1 and len(calls) == 2


@pytest.mark.slow
def test_generates_with_a_static_cache():
    model = compressed(build=one_block)
    inputs = tiny_inputs(model)["input_ids"][:1, :4]
    settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    expected = model.generate(inputs, **settings)
    hf_blr.fuse(model)
    with ops.use_impl("triton"):
        assert torch.equal(model.generate(inputs, **settings), expected)


def test_what_does_not_fit_together_is_left_alone():
    assert sum(len(group) == 3 for group in hf_blr.fuse(compressed(build=tiny_bert))) == 2
    assert all(len(group) == 2 for group in hf_blr.fuse(compressed(build=tiny_gpt2)))
    model = compressed()
    attention = model.model.layers[0].self_attn
    attention.k_proj = attention.k_proj.to_dense()
    attention.v_proj = BLRLinear.from_spec(Blast(64, 32, 4, (2, 2)), bias=False)
    model.model.layers[1].self_attn.q_proj.double()
    groups = hf_blr.fuse(model)
    assert ("model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj") in groups and len(groups) == 3
    for name in ("encoder_attn", "attn2"):
        cross = nn.Module()
        cross.add_module(name, compressed().model.layers[0].self_attn)
        assert hf_blr.fuse(cross) == []
    with pytest.raises(ValueError, match="has no BLR modules"):
        hf_blr.fuse(tiny_llama())
