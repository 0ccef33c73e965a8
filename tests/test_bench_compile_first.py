"""Compiling before the measurement: the same blocks, fewer of them, in every measurement that was asked for."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_shape

from hf_blr.bench import compile_first as module
from hf_blr.bench.compile_first import compile_first, parts, run_once
from hf_blr.bench.forms import repeated_blocks
from hf_blr.bench.model_peaks import projection_groups
from hf_blr.bench.models import SHAPES
from hf_blr.bench.rows import Request
from hf_blr.bench.variants import Variant, build_model
from hf_blr.cli import main


@pytest.mark.parametrize("name", [name for name, shape in SHAPES.items() if shape.kind != "diffusion"])
@pytest.mark.parametrize("variant", ["dense", "low_rank"])
def test_a_shallow_model_has_the_blocks_of_the_whole_one(name, variant):
    whole, cut = (
        repeated_blocks(build_model(shape, Variant.parse(variant), 0.5, "meta", torch.bfloat16))
        for shape in (SHAPES[name], SHAPES[name].of_blocks(2))
    )
    assert len(cut) == 2 < len(whole)
    assert projection_groups(cut[0], False) == projection_groups(whole[0], False)


@pytest.mark.slow
def test_every_measurement_runs_once(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", tiny_shape())
    rows, original = [], module.model_rows
    monkeypatch.setattr(module, "model_rows", lambda *args: rows.extend(original(*args)) or rows)
    request = Request(("prefill", "decode", "training"), forms=("graph",), mode="default", dtype=torch.float32)
    request = replace(request, batches=(1,), decode_batches=(1,), prompt=4, new_tokens=6, training_tokens=8)
    run_once("tiny", Variant.parse("blast:4x4"), request, "cpu")
    assert [row["measurement"] for row in rows] == ["prefill", "decode", "training", "training"]
    assert not any("error" in row for row in rows)


def test_a_request_is_cut_by_what_is_compiled_apart():
    request = Request(batches=(1, 8), tokens=(128, 256), decode_batches=(1, 32))

    def sizes(name):
        return [(p.measurements, p.batches, p.tokens, p.decode_batches) for p in parts(request, SHAPES[name])]

    found = sizes("Llama-7B")
    forwards = [(b, t) for (m,), (b, *_), (t, *_), _ in found if m == "prefill"]
    assert forwards == [(1, 128), (1, 256), (8, 128), (8, 256)]
    assert [d for (m,), _, _, d in found if m == "decode"] == [(1,), (32,)]
    # nothing is compiled to save a model
    assert [m for (m,), *_ in found[6:]] == ["training"]
    # pictures are of the model's sizes
    assert [t for (m,), _, t, _ in sizes("DiT-XL/2") if m == "prefill"] == [(256,)] * 2
    assert [t for (m,), _, t, _ in sizes("ViT-B/16") if m == "prefill"] == [(197,)] * 2
    assert [m for (m,), *_ in sizes("DiT-XL/2")] == ["prefill"] * 2
    assert [m for (m,), *_ in sizes("ViT-B/16")] == ["prefill"] * 2 + ["training"]


def test_the_command_line_asks_for_each_model_and_variant(monkeypatch):
    asked = []
    monkeypatch.setattr("hf_blr.cli.bench_models.compile_first", lambda todo, *args: asked.extend([*todo, args]))
    monkeypatch.setattr("hf_blr.cli.bench_models.model_rows", lambda *args: [])
    command = ["bench", "model", "--models", "Llama-7B", "GPT2-S", "--variants", "dense", "low_rank+fused"]
    assert main([*command, "--device", "cpu", "--mode", "default", "--jobs", "3"]) == 0
    *todo, (request, device, jobs) = asked
    assert [(name, str(variant)) for name, variant in todo] == [
        (name, variant) for name in ("Llama-7B", "GPT2-S") for variant in ("dense", "low_rank+fused")
    ]
    assert (request.mode, device, jobs) == ("default", "cpu", 3)


def test_autotuning_is_not_done_in_several_processes():
    with pytest.raises(ValueError, match="default"):
        compile_first([], Request(mode="max-autotune"), "cpu", 2)
