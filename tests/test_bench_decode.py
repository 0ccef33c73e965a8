"""Decoding with one compiled block for all layers: the same text, one compilation, no break."""

import statistics
from contextlib import contextmanager, nullcontext
from threading import Barrier, BoundedSemaphore, Lock, Thread, get_ident

import decode_in_bits
import pytest
import torch
from tiny import VOCAB_SIZE, build, tiny_gpt2, tiny_llama
from torch._dynamo.utils import counters
from transformers import CompileConfig, Qwen3Config, Qwen3ForCausalLM, StaticCache

import hf_blr
from hf_blr import ops
from hf_blr.bench import generation
from hf_blr.bench.forms import repeated_blocks
from hf_blr.bench.models import Shape
from hf_blr.bench.one_block import numbered, why_not_one_block, with_one_block
from hf_blr.bench.report.files import read_result
from hf_blr.bench.variants import Variant, build_model
from hf_blr.config import BLRConfig
from hf_blr.inference.replayed import StepGraph, stepping_by

LAYERS = 3
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def tiny_qwen3(**kw):
    """Norms on queries and keys, grouped queries, and heads that are wider than hidden size / heads."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 128}
    return build(Qwen3ForCausalLM, Qwen3Config(**{**sizes, **heads, "initializer_range": 0.1, **kw}))


def blast(**kw):
    model = tiny_llama(**kw)
    hf_blr.compress(model, BLRConfig("blast", rank=4, num_blocks=(4, 4)))
    return model


def fused(**kw):
    model = blast(**kw)
    hf_blr.fuse(model)
    return model


def generated(model, ids, step, texts=2, new_tokens=9, **inputs):
    """What `generate()` says, its steps taken by `step`, on one cache that is reset between the texts."""
    config = CompileConfig()
    config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=16)
    with stepping_by(model, StepGraph(step, torch.device("cpu"))):
        for _ in range(texts):
            cache.reset()
            settings = {"compile_config": config, "max_new_tokens": new_tokens, **SETTINGS, **inputs}
            yield model.generate(ids, past_key_values=cache, **settings).tolist()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make, graphs",
    [
        # the blocks as one, and the norm and the rotary embedding outside of them
        (lambda: tiny_llama(num_hidden_layers=LAYERS), 3),
        (lambda: tiny_qwen3(num_hidden_layers=LAYERS), 3),
        # its last norm is torch's own, which stays as it is
        (lambda: tiny_gpt2(n_layer=LAYERS), 1),
    ],
    ids=["llama", "qwen3", "gpt2"],
)
def test_one_compilation_for_all_layers_and_the_same_text(make, graphs, backend):
    model = make()
    ids = torch.arange(10).view(2, 5)
    plain = model.generate(ids, max_new_tokens=9, **SETTINGS).tolist()
    counters.clear()
    assert list(generated(model, ids, with_one_block(model, "default", backend))) == [plain, plain]
    assert counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    assert [numbered(block)[0].layer_idx for block in repeated_blocks(model)] == [0, 1, 2]
    assert all(block._compiled_call_impl is None for block in repeated_blocks(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [blast, fused])
def test_blocks_with_kernels_share_a_compilation_too(make):
    pytest.importorskip("triton")
    model = make(num_hidden_layers=2, hidden_size=16, intermediate_size=32)
    ids = torch.arange(3)[None]
    plain = model.generate(ids, max_new_tokens=4, **SETTINGS).tolist()
    counters.clear()
    with ops.use_impl("triton"):
        assert list(generated(model, ids, with_one_block(model, "default", "aot_eager"), 1, 4)) == [plain]
    assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_a_new_cache_is_written_to_and_not_the_one_before():
    model = tiny_llama(num_hidden_layers=LAYERS)
    ids = torch.arange(10).view(2, 5)
    plain = model.generate(ids, max_new_tokens=9, **SETTINGS).tolist()
    step = with_one_block(model, "default", "eager")
    counters.clear()
    assert [*generated(model, ids, step, 1), *generated(model, ids, step, 1)] == [plain, plain]
    assert counters["stats"]["unique_graphs"] == 3


def test_a_fused_block_is_one_call_for_each_group():
    model = fused(num_hidden_layers=LAYERS)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    block = torch.compile(model.model.layers[0], fullgraph=True, backend=backend)
    x = torch.randn(1, 6, 64)
    positions = model.model.rotary_emb(x, torch.arange(6)[None])
    with torch.no_grad():
        expected = model.model.layers[0](x, position_embeddings=positions)
        with ops.use_impl("triton"):
            torch.testing.assert_close(block(x, position_embeddings=positions), expected, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if "hf_blr" in str(node.target)]
    assert sorted(call.split(".")[1] for call in calls) == ["blast", "blast", "grouped_blast", "grouped_blast"]


@pytest.mark.parametrize(
    "make, kw, reason",
    [
        (tiny_llama, {}, None),
        (tiny_qwen3, {}, None),
        (tiny_gpt2, {}, None),
        (tiny_gpt2, {"scale_attn_by_inverse_layer_idx": True}, "attention that depends on its number"),
        (tiny_qwen3, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}, "StaticSlidingWindow"),
    ],
)
def test_why_blocks_cannot_share(make, kw, reason):
    model = make(**kw)
    said = why_not_one_block(model, StaticCache(config=model.config, max_cache_len=16))
    assert said is None if reason is None else reason in said


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_texts_of_different_lengths_are_masked_alike():
    model = tiny_llama(num_hidden_layers=LAYERS)
    ids, mask = torch.arange(10).view(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=9, **SETTINGS).tolist()
    unmasked = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **SETTINGS).tolist()
    step = with_one_block(model, "default", "eager")
    assert list(generated(model, ids, step, 2, attention_mask=mask)) == [plain, plain] != [unmasked, unmasked]
    assert "create_masks_for_generate" not in vars(model)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_rows_say_what_was_compiled(monkeypatch):
    monkeypatch.setattr(generation, "with_one_block", lambda model, mode: with_one_block(model, mode, "eager"))
    clock, clocks, said, rows = generation.StepClock, [], [], []
    monkeypatch.setattr(generation, "StepClock", lambda device: clocks.append(clock(device)) or clocks[-1])

    @contextmanager
    def turn():
        said.append(len(clocks))
        yield
        said.append(len(clocks))

    settings = {"rounds": 2, "turn": turn, "so_far": rows.append}
    row = generation.decode(tiny_llama(), 2, 4, 6, "compiled", "default", "cpu", **settings)
    assert row["pieces"] == "one block" and row["attention"] == "sdpa"
    assert row["graph_ms"] == statistics.median(row["graph_ms_of_rounds"]) > 0 and len(row["graph_ms_of_rounds"]) == 2
    # the first generation is not timed
    assert said == [1, 2, 2, 3]
    assert [len(found["graph_ms_of_rounds"]) for found in rows] == [1, 2] and rows[1] == row


@pytest.fixture
def tiny_benchmark(monkeypatch):
    monkeypatch.setattr(generation, "with_one_block", lambda model, mode: with_one_block(model, mode, "eager"))
    monkeypatch.setitem(decode_in_bits.SHAPES, "tiny", Shape("text", tiny_llama))
    monkeypatch.setattr(decode_in_bits, "PROMPT", 4)
    monkeypatch.setattr(decode_in_bits, "NEW_TOKENS", 6)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
def test_rows_of_the_benchmark_of_decoding_in_bits(tiny_benchmark):
    turns, kept = [], []

    @contextmanager
    def turn():
        turns.append(len(kept))
        yield

    row = decode_in_bits.row_of("tiny", "low_rank/int4", 2, "cpu", nullcontext(), turn, kept.append)
    assert row["batch"] == 2 and row["ratio"] == 0.5 and len(row["graph_ms_of_rounds"]) == decode_in_bits.ROUNDS
    # a turn for each round, at whose end there is a row
    assert turns == list(range(decode_in_bits.ROUNDS)) and len(kept) == decode_in_bits.ROUNDS


def test_rows_take_turns_and_one_that_fails_lets_the_others_go_on(monkeypatch, tmp_path):
    """In threads in place of processes, so without models: torch's default dtype is one for all threads."""
    together, alone, order, kept = Barrier(3, timeout=60), Lock(), [], []
    lock = decode_in_bits.Turns.turn

    @contextmanager
    def turn(turns):
        with lock(turns):
            order.append(get_ident())
            assert not alone.acquire(blocking=False)
            yield
            if (tmp_path / "rows.json").exists():
                kept.append(len(read_result(tmp_path / "rows.json")["rows"]))

    monkeypatch.setattr(decode_in_bits.Turns, "turn", turn)

    def row_of(name, variant, batch, device, building, turn, so_far):
        row = {"model": name, "variant": variant, "batch": batch}
        for _ in range(decode_in_bits.ROUNDS):
            with turn():
                if variant == "dense":
                    raise ValueError("no room")
                so_far(row)
        return row

    monkeypatch.setattr(decode_in_bits, "row_of", row_of)
    jobs = [("tiny", variant, 1, "cpu", "abc") for variant in ("low_rank", "dense", "low_rank/int4")]
    building = BoundedSemaphore(1)
    threads = [
        Thread(target=decode_in_bits.work, args=(job, building, together, alone, str(tmp_path / "rows.json")))
        for job in jobs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rounds = [set(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == decode_in_bits.ROUNDS and all(len(of) == 3 for of in rounds)
    # from the first round on, beside that of the failure if it came before
    assert kept[0] in (1, 2) and kept[-1] == 3
    rows = read_result(tmp_path / "rows.json")["rows"]
    assert sorted((row["variant"], "error" in row) for row in rows) == [
        ("dense", True),
        ("low_rank", False),
        ("low_rank/int4", False),
    ]


def test_fused_variants():
    assert str(Variant.parse("monarch:4x4+fused")) == "monarch:4x4+fused" and Variant.parse("low_rank+fused").fused
    assert str(Variant.parse("dense+attention")) == "dense+attention" and not Variant.parse("dense").fused
    assert not Variant.parse("blast:4x4").fused
    for text in ("dense+fused", "low_rank+attention", "dense:4x4", "blast:4x4+fast", "blast+fused:4x4"):
        with pytest.raises(ValueError, match="expected"):
            Variant.parse(text)


def test_what_cannot_be_fused_is_said():
    from hf_blr.bench import models

    shape = models.Shape(
        "text", models.gpt2(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=99, activation_function="tanh")
    )
    with pytest.raises(ValueError, match="can run together"):
        build_model(shape, Variant.parse("low_rank+fused"), 0.5, "cpu", torch.float32)


def test_fused_and_pivoted_models_are_built():
    from tiny import tiny_shape

    model = build_model(tiny_shape(), Variant.parse("blast:4x4+fused"), 0.5, "cpu", torch.float32)
    assert model.model.layers[0].mlp.gate_proj.group[0] is model.model.layers[0].mlp.up_proj.group[0]
    pivoted = build_model(tiny_shape(), Variant.parse("pivoted"), 0.5, "cpu", torch.float32)
    assert pivoted.model.layers[0].mlp.gate_proj.spec.structure == "pivoted"
