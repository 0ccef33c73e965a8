"""`hf-blr bench model`: the models' sizes, the forms they run in, and rows that survive failures."""

import json

import pytest
import torch
from tiny import tiny_llama, tiny_shape

from hf_blr.bench import measure, models, rows
from hf_blr.bench.forms import compile_pieces, pieces_without_cache, repeated_blocks, switched_on
from hf_blr.bench.models import SHAPES
from hf_blr.bench.report.files import ResultFile, read_result
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant, build_model
from hf_blr.cli import main
from hf_blr.cli.bench_models import usual_variants
from hf_blr.inference.replayed import StepGraph, stepping_by
from hf_blr.integration import blr_modules


@pytest.mark.parametrize(
    "name, variant, parameters",
    [
        # as the paper's repository builds them, embeddings and heads included
        ("Llama-7B", "dense", 6.738e9),
        ("Llama-7B", "blast:paper", 3.564e9),
        ("Llama-3.2-1B", "dense", 1.236e9),
        ("Llama-3.2-1B", "blast:paper", 0.676e9),
        # 12 blocks of 192 * (768 + 2304 + 36 + 2 * (768 + 3072 + 36)) and a dense 768 x 768, embeddings, biases, norms
        ("GPT2-S", "blast:paper", 12 * (192 * 10860 + 768 * 768 + 6912) + 51281 * 768 + 25 * 1536),
        ("ViT-B/16", "dense", 86.6e6),
        # q, k, v, two MLP layers, a dense output projection, biases and norms in each block; embeddings and head
        ("ViT-B/16", "blast:paper", 12 * (80 * 3 * 1545 + 128 * 2 * 3849 + 768 * 768 + 9984) + 744192 + 770536),
        ("Llama-3-8B", "dense", 8.030e9),
        ("Qwen3-4B", "dense", 4.022e9),
    ],
)
def test_sizes_of_the_papers_models(name, variant, parameters):
    model = build_model(SHAPES[name], Variant.parse(variant), 0.5, "meta", torch.bfloat16)
    # transformers 5.0 only declares ties on the meta device
    model.tie_weights()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_our_ranks_keep_half_of_each_projection():
    model = build_model(SHAPES["Llama-3-8B"], Variant.parse("monarch:4x4"), 0.5, "meta", torch.bfloat16)
    modules = blr_modules(model)
    assert len(modules) == 7 * 32
    assert all(0.45 < m.spec.ratio <= 0.5 and m.spec.rank % 32 == 0 for m in modules.values())


@pytest.mark.parametrize(
    "name, variant, message",
    [("Llama-3-8B", "blast:paper", "no ranks for this model"), ("Llama-7B", "blast:7x7", "divisible")],
)
def test_what_cannot_be_built_is_said(name, variant, message):
    with pytest.raises(ValueError, match=message):
        build_model(SHAPES[name], Variant.parse(variant), 0.5, "meta", torch.bfloat16)


def test_models_in_formats_of_fewer_bits():
    names = rows.trained_names(tiny_shape())
    found = {}
    for text in ("dense", "dense/fp8", "low_rank", "low_rank/fp8+fused", "low_rank:paper/int4"):
        model = build_model(tiny_shape(), Variant.parse(text), 0.5, "cpu", torch.float32)
        assert model(input_ids=torch.arange(4)[None]).logits.isfinite().all()
        found[text] = rows.model_sizes(model, names)
        kept = {module.storage.name for module in blr_modules(model).values()}
        assert kept == ({text.partition("+")[0].partition("/")[2] or "plain"} if text != "dense" else set())
    # codes stand for as many numbers
    for plain, narrow in (("dense", "dense/fp8"), ("low_rank", "low_rank/fp8+fused")):
        assert found[plain]["projection_parameters"] == found[narrow]["projection_parameters"]
        saved = found[plain]["weight_bytes"] - found[narrow]["weight_bytes"]
        # of four bytes one is left, and a scale of two for each row
        assert 2.5 < saved / found[plain]["projection_parameters"] < 3


def test_fewer_blocks_are_another_model_in_rows():
    request = rows.Request(("prefill",), batches=(1,), forms=("graph",), dtype=torch.float32, blocks=1)
    (row,) = rows.model_rows("tiny", tiny_shape(), [Variant("dense")], request, Timer("cpu", 0.01, 3))
    assert row["model"] == "tiny, 1 blocks" and row["ms"] > 0
    # half of the two blocks that it has
    whole = build_model(tiny_shape(), Variant("dense"), 0.5, "meta", torch.float32)
    assert (
        row["projection_parameters"]
        == rows.model_sizes(whole, rows.trained_names(tiny_shape()))["projection_parameters"] / 2
    )


def test_pivoted_layers_gather_from_everywhere():
    """A fresh module's order would read neighbours, and fits give no such."""
    modules = blr_modules(build_model(tiny_shape(), Variant.parse("pivoted"), 0.5, "cpu", torch.float32)).values()
    for module in modules:
        fresh = torch.arange(module.in_features).int()
        assert module.order.sort().values.equal(fresh) and not module.order.equal(fresh)
    with pytest.raises(ValueError, match="no pivoted"):
        build_model(tiny_shape(), Variant.parse("pivoted:paper"), 0.5, "meta", torch.float32)


def test_variants_by_name():
    for text in ("dense", "low_rank", "low_rank:paper", "pivoted", "monarch:4x4", "blast:4x16"):
        assert str(Variant.parse(text)) == text
    for text in (
        "dense+attention",
        "dense/fp8",
        "dense/int4+fused",
        "low_rank/fp8+fused",
        "blast:4x4/int4",
        "blast:4x4@128/int4",
    ):
        assert str(Variant.parse(text)) == text
    for text in (
        "dense:4x4",
        "blast:four",
        "butterfly",
        "blast:1x2x3",
        "low_rank/int9",
        "dense+fused",
        "dense/fp8+attention",
        "dense@128",
        "low_rank:paper@128",
        "low_rank@many",
    ):
        with pytest.raises(ValueError, match="expected"):
            Variant.parse(text)


def test_variants_of_ranks_that_a_number_divides():
    shape = SHAPES["Llama-3-8B"].of_blocks(1)
    model = build_model(shape, Variant.parse("low_rank@128/fp8"), 0.5, "meta", torch.bfloat16)
    assert [module.spec.rank for module in blr_modules(model).values()] == [1024, 384, 384, 1024, 1536, 1536, 1536]
    assert model.config.quantization_config.rank_multiple == 128


@pytest.mark.slow
def test_usual_variants_are_those_that_can_be_built():
    usual = {name: list(map(str, usual_variants(shape))) for name, shape in SHAPES.items()}
    assert len(usual["Llama-7B"]) == 8 and len(usual["Llama-3-8B"]) == 5
    assert "blast:paper+fused" in usual["DiT-XL/2"] and "monarch:paper+fused" not in usual["DiT-XL/2"]
    for name in ("GPT2-S", "ViT-B/16"):
        for variant in usual_variants(SHAPES[name]):
            build_model(SHAPES[name].of_blocks(1), variant, 0.5, "cpu", torch.float32)


def test_a_replayed_step_generates_the_same_text():
    model, device = tiny_llama(), torch.device("cpu")
    from transformers import CompileConfig, StaticCache

    ids = torch.arange(10).view(2, 5)
    plain = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    calls = []

    def call(**inputs):
        calls.append(inputs["input_ids"].data_ptr())
        return model(**inputs)

    config = CompileConfig()
    config._compile_all_devices = True
    cache = StaticCache(config=model.config, max_cache_len=16)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "compile_config": config}
    with stepping_by(model, StepGraph(call, device)):
        for _ in range(2):
            cache.reset()
            replayed = model.generate(ids, max_new_tokens=9, past_key_values=cache, **settings)
            assert replayed.tolist() == plain.tolist()
    # eight steps a text: the first as it came, all others on the inputs that were copied once
    assert len(calls) == 16 and len(set(calls[1:])) == 1
    assert "get_compiled_call" not in vars(model)


def test_a_step_is_captured_again_for_another_cache():
    seen = []
    step = StepGraph(lambda **inputs: seen.append(inputs["x"]), torch.device("cpu"))
    first, second = object(), object()
    values = [torch.ones(1) * i for i in range(4)]
    for value, cache in zip(values, (first, first, second, second), strict=True):
        step(x=value, past_key_values=cache)
    assert [int(x) for x in seen] == [0, 1, 2, 3]
    assert seen[0] is values[0] and seen[1] is not values[1] and seen[2] is values[2] and seen[3] is not values[3]


@pytest.mark.parametrize("pieces, cached, compilations", [(repeated_blocks, False, 1), (pieces_without_cache, True, 2)])
def test_equal_pieces_are_compiled_once(pieces, cached, compilations):
    model = build_model(tiny_shape(), Variant.parse("blast:4x4"), 0.5, "cpu", torch.float32)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=cached).logits
        graphs = []
        calls = compile_pieces(pieces(model), "default", lambda graph, inputs: graphs.append(graph) or graph)
        with switched_on(pieces(model), calls):
            out = model(input_ids=ids, use_cache=cached).logits
        model(input_ids=ids[:, :3], use_cache=cached)
    assert len(graphs) == compilations
    torch.testing.assert_close(out, plain)


def test_attention_needs_no_mask_in_memory():
    model = tiny_llama()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with measure.maskless_attention(model, "text"):
            assert model.config._attn_implementation == measure.CAUSAL_SDPA
            torch.testing.assert_close(model(input_ids=ids).logits, plain)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("form", ["eager", "graph"])
def test_a_training_step_moves_the_projections_alone(form):
    model = build_model(tiny_shape(), Variant.parse("monarch:4x4"), 0.5, "cpu", torch.float32)
    names = rows.trained_names(tiny_shape())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    row = measure.training(model, "text", names, 1, 8, form, "default", Timer("cpu", 0.01, 3))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.endswith("_proj.u") or name.endswith("_proj.v")}
    assert row["trained_parameters"] == sum(before[name].numel() for name in moved) and row["ms"] > 0


@pytest.mark.slow
def test_rows_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", tiny_shape())
    file = tmp_path / "models.json"
    small = ["--batches", "2", "--decode-batches", "2", "--prompt", "4", "--new-tokens", "6", "--training-tokens", "8"]
    options = ["--device", "cpu", "--dtype", "float32", "--forms", "eager", "graph", "--seconds", "0.01"]
    arguments = [
        "bench",
        "model",
        "--models",
        "tiny",
        "--variants",
        "dense",
        "blast:4x4",
        "monarch:7",
        "low_rank:paper",
    ]
    assert main([*arguments, *small, *options, "--json", str(file)]) == 0
    result = read_result(file)
    by = {(r["variant"], r["measurement"], r.get("form")): r for r in result["rows"]}
    assert len(result["rows"]) == len(by) == 3 * 7 + 1
    assert "divisible" in by["monarch:7x7", "build", None]["error"]
    for variant in ("dense", "blast:4x4", "low_rank:paper"):
        for form in ("eager", "graph"):
            assert by[variant, "prefill", form]["ms"] > 0 and by[variant, "decode", form]["tokens_per_second"] > 0
            assert by[variant, "training", form]["ms"] > 0
        assert by[variant, "decode", "graph"]["graph_ms"] > 0 and by[variant, "storage", "eager"]["load_s"] > 0
        assert not any("error" in row for key, row in by.items() if key[0] == variant)
    dense, blast = by["dense", "storage", "eager"], by["blast:4x4", "storage", "eager"]
    assert blast["disk_bytes"] < dense["disk_bytes"] and blast["weight_bytes"] < dense["weight_bytes"]
    assert blast["projection_parameters"] <= 0.5 * dense["projection_parameters"]
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_a_training_step_that_keeps_fewer_activations(monkeypatch):
    from tiny import tiny_shape

    from hf_blr.bench.report.model_tables import compared

    # one layer has activations enough to choose among, and takes less time to compile
    shape = tiny_shape(num_hidden_layers=1)
    settings = {"forms": ("compiled",), "mode": "default", "training_tokens": 8, "dtype": torch.float32}
    found = []
    for budget in (0.5, 1.0):
        request = rows.Request(("training",), activation_budget=budget, stop_at_errors=True, **settings)
        found += rows.model_rows("tiny", shape, [Variant.parse("low_rank")], request, Timer("cpu", 0.01, 3))
        # how long the other takes says nothing of its row
        monkeypatch.setattr(measure, "training", lambda *args, row=found[-1]: {"ms": row["ms"]})
    found = [row for row in found if row["form"] == "compiled"]
    assert [row.get("activation_budget") for row in found] == [0.5, None]
    # each is compared with its like
    dense = [{**row, "variant": "dense", "ms": 2 * row["ms"]} for row in found]
    lines = compared([*dense, *found], "training")
    assert sum("keeps 50 % of activations" in line["form"] for line in lines) == 2
    assert all(line["speed over dense"] == (1 if line["variant"] == "dense" else 2) for line in lines)


@pytest.mark.slow
def test_one_failure_costs_one_row(monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("as large\nas that")

    monkeypatch.setattr(measure, "prefill", fail)
    request = rows.Request(("prefill", "training"), batches=(1,), training_tokens=8, dtype=torch.float32)
    found = list(rows.model_rows("tiny", tiny_shape(), [Variant("dense")], request, Timer("cpu", 0.01, 3)))
    assert found[0]["error"] == "OutOfMemoryError: as large as that" and found[1]["ms"] > 0


@pytest.mark.slow
def test_no_text_is_longer_than_the_model_has_positions():
    shape = models.Shape("text", models.gpt2(n_embd=64, n_layer=2, n_head=4, n_positions=64, vocab_size=99))
    sizes = {"tokens": (32, 65), "batches": (1,), "training_tokens": 65}
    request = rows.Request(("prefill", "training"), forms=("graph",), dtype=torch.float32, **sizes)
    fits, too_long, *training = rows.model_rows("tiny", shape, [Variant("dense")], request, Timer("cpu", 0.01, 3))
    assert fits["ms"] > 0 and "64 positions, got 65 tokens" in too_long["error"]
    assert len(training) == 2 and all(row["tokens"] == 64 and row["ms"] > 0 for row in training)


@pytest.mark.slow
def test_a_picture_has_the_tokens_that_it_has():
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = models.Shape("image", models.vit(**sizes, image_size=16, patch_size=8, num_labels=3), prefill=(5,))
    request = rows.Request(tokens=(7,), batches=(2,), forms=("graph",), dtype=torch.float32, stop_at_errors=True)
    found = list(rows.model_rows("vit", shape, [Variant("low_rank")], request, Timer("cpu", 0.01, 3)))
    assert [(r["measurement"], r.get("tokens")) for r in found] == [
        ("prefill", 5),
        ("training", 5),
        ("training", 5),
        ("storage", None),
    ]


def test_diffusers_is_asked_for_by_name(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    (row,) = rows.model_rows("DiT-XL/2", SHAPES["DiT-XL/2"], [Variant("dense")], rows.Request(), Timer("cpu"))
    assert "pip install" in row["error"]
    with pytest.raises(ImportError, match="diffusers"):
        models.dit()()


def test_rows_are_on_disk_at_once_and_stay_apart_by_device(tmp_path):
    path = tmp_path / "results" / "r.json"
    file = ResultFile(path, {"environment": {"device": "a"}})
    file.add([{"ms": 1}])
    assert json.loads(path.read_text())["rows"] == [{"ms": 1}]
    ResultFile(path, {"environment": {"device": "a"}}, append=True).add([{"ms": 2}])
    assert [row["ms"] for row in read_result(path)["rows"]] == [1, 2]
    with pytest.raises(ValueError, match="another file"):
        ResultFile(path, {"environment": {"device": "b"}}, append=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match="rows"):
        read_result(path)
