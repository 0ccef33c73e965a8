"""A structure is a folder and a line: one that the package has never heard of goes all the way."""

import dataclasses
from pathlib import Path

import kronecker
import pytest
import torch
from kronecker import RECORD, Kronecker
from tiny import tiny_inputs, tiny_llama, tiny_logits, tiny_tokenizer
from transformers import AutoModelForCausalLM

import hf_blr
from hf_blr import BLRConfig, compress, ops, structures
from hf_blr.bench import cases, layers, timing
from hf_blr.bench.models import SHAPES
from hf_blr.bench.shapes import aligned_spec
from hf_blr.bench.variants import Variant, build_model
from hf_blr.cli import main
from hf_blr.factorize import factorize
from hf_blr.finetune import mark_only_factors_trainable
from hf_blr.integration import blr_modules
from hf_blr.ops import table
from hf_blr.plan import plan_from_layers
from hf_blr.roofline.devices import DEVICES
from hf_blr.roofline.stages import predict, stages
from hf_blr.roofline.training import training_stages

PACKAGE = Path(hf_blr.__file__).parent


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(structures, "_records", dict(structures._records))
    monkeypatch.setattr(table, "_table", dict(table._table))
    structures.register(RECORD)


def compressed(**settings):
    model = tiny_llama()
    ids = tiny_inputs(model)["input_ids"]
    report = compress(model, BLRConfig("kronecker", **settings), calibration=[ids], progress=False)
    return model, report


def test_no_file_of_the_package_names_it():
    assert not [file for file in PACKAGE.rglob("*.py") if "kronecker" in file.read_text().lower()]


def test_it_compresses_saves_and_loads(tmp_path):
    # with weighed outputs the plain error may be anything; without, no fit is worse than zero
    model, report = compressed(ratio=0.6, fisher=False)
    assert report.layers and all(0 < layer.rel_error < 1 for layer in report.layers)
    assert {type(module).__name__ for module in blr_modules(model).values()} == {"KroneckerLinear"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    torch.testing.assert_close(tiny_logits(hf_blr.to_dense(loaded)), tiny_logits(model), rtol=1e-4, atol=1e-4)


def test_it_is_stored_in_bits(tmp_path):
    model, _ = compressed(ratio=0.6, factor_format="int4", fisher=False)
    assert {module.storage.name for module in blr_modules(model).values()} == {"int4"}
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), tiny_logits(model))


def test_a_full_rank_fit_is_exact():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    fitted = factorize(weight, Kronecker(24, 16, 16, (4, 4)))
    assert fitted.rel_error < 1e-5


def test_it_streams_in_from_a_dense_checkpoint(tmp_path):
    dense = tiny_llama()
    dense.save_pretrained(tmp_path)
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, blr_config=BLRConfig("kronecker", ratio=0.6))
    expected = tiny_llama()
    compress(expected, BLRConfig("kronecker", ratio=0.6), progress=False)
    torch.testing.assert_close(tiny_logits(streamed), tiny_logits(expected), rtol=1e-4, atol=1e-4)


def test_it_trains():
    model, _ = compressed(ratio=0.6, fisher=False)
    mark_only_factors_trainable(model)
    inputs = tiny_inputs(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(**inputs, labels=inputs["input_ids"]).loss
    first.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert model(**inputs, labels=inputs["input_ids"]).loss < first


def test_kernels_refuse_it_with_the_reason():
    module = structures.structure_named("kronecker").load("module")(Kronecker(16, 16, 2, (4, 4)))
    with ops.use_impl("triton"), pytest.raises(RuntimeError, match="kronecker has no kernels"):
        module(torch.randn(3, 16))
    with ops.use_impl("dense"):
        torch.testing.assert_close(module(torch.eye(16)), module.dense_weight().T + module.bias)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(torch.eye(16)), module(torch.eye(16)))


def test_it_is_a_choice_of_the_command_line(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ["--structure", "kronecker", "--ratio", "0.6", "--dataset", "none"]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "out"), *arguments]) == 0
    assert "kronecker" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compress", "--help"])
    assert "kronecker" in capsys.readouterr().out


def test_auto_tries_it():
    model, report = tiny_llama(), None
    ids = tiny_inputs(model)["input_ids"]
    report = compress(model, BLRConfig("auto", ratio=0.6, fit_rounds=2), calibration=[ids], progress=False)
    assert report.layers
    from hf_blr.compression.shapes import shapes_for

    shapes = shapes_for(structures.LowRank(64, 64, 1), BLRConfig("auto", ratio=0.6, dataset="builtin"))
    assert "kronecker" in {shape.structure for shape in shapes}


def test_it_is_measured():
    (case,) = cases.shape_cases([(64, 64)], [(4, 4)], 0.5, [3], ["forward+backward"], ["kronecker"])
    rows = layers.bench_case(case, timing.Timer("cpu", 0.01, 3), torch.float32, ("hf_blr",))
    (row,) = [row for row in rows if row["structure"] == "kronecker"]
    assert row["us"] > 0 and row["rel_error"] < 1e-5
    (case,) = cases.paper_cases(["GPT2-S"], [1], ["forward"])[:1]
    assert "kronecker" in {spec.structure for spec in case.specs}
    model = build_model(SHAPES["GPT2-S"], Variant.parse("kronecker:4x4"), 0.5, "meta", torch.bfloat16)
    assert len(blr_modules(model)) == 48


def test_it_is_predicted(capsys):
    spec, device = aligned_spec("kronecker", 4096, 4096, 0.5), DEVICES["H100"]
    kernels = stages(spec, 1024)
    assert sum(stage.flops for stage in kernels) == spec.flops(1024)
    assert predict(spec, 1024, device) > 0 and len(training_stages(spec, 1024)) == 3 * len(kernels)
    assert main(["roofline", "--structures", "kronecker", "--tokens", "1", "1024"]) == 0
    assert "kronecker 4x4" in capsys.readouterr().out


def test_fuse_leaves_it_alone():
    model, _ = compressed(ratio=0.6, fisher=False)
    before = tiny_logits(model)
    hf_blr.fuse(model)
    assert torch.equal(tiny_logits(model), before)
    assert all(module.group is None for module in blr_modules(model).values())


def test_another_record_cannot_take_its_name():
    structures.register(RECORD)
    with pytest.raises(ValueError, match="kronecker"):
        structures.register(dataclasses.replace(RECORD, colour="#000000"))


def test_every_record_is_whole(monkeypatch):
    """Walks the records and says which lacks what."""
    for record in (*structures.structures().values(), *structures.whole_structures().values()):
        for part in (f.name for f in dataclasses.fields(record)):
            value = getattr(record, part)
            if isinstance(value, str) and value.startswith(("hf_blr.", "kronecker.")) and "triton" not in value:
                assert record.load(part) is not None, f"{record.name} has no {part}"
        assert record.load("module").spec_class is record.spec
        assert record.weighed in ("", *record.spec.names("factor"))
        assert set(record.scaled) <= set(record.spec.names("factor"))
        spec = record.spec(16, 16, 16 if record.whole else 2)
        assert set(spec.elementwise) <= set(record.spec.names("factor"))
        assert sum(stage.flops for stage in stages(spec, 3)) == spec.flops(3)
        assert sum(stage.flops for stage in training_stages(spec, 3)) >= 3 * spec.flops(3)
        assert tuple(spec.sizes()) == record.spec.names() == tuple(record.spec.kinds)
        numbers = sum(torch.Size(shape).numel() for shape in spec.shapes().values())
        assert spec.num_parameters == numbers


@pytest.mark.parametrize(
    "call",
    [
        lambda: BLRConfig("nonsense", ratio=0.5),
        lambda: BLRConfig(ratio=0.5, overrides={"q_proj": {"structure": "nonsense"}}),
        lambda: structures.make_spec("nonsense", 8, 8, rank=1),
        lambda: structures.max_rank("nonsense", 8, 8),
        lambda: ops.linear("nonsense", torch.ones(1, 8), []),
        lambda: ops.grouped_linear("nonsense", torch.ones(1, 8), []),
        lambda: plan_from_layers(
            {"q": {**Kronecker(8, 8, 1).to_dict(), "structure": "nonsense", "bias": False, "transposed": False}}
        ),
        lambda: factorize(torch.ones(8, 8), unknown_spec()),
        lambda: stages(unknown_spec(), 1),
        lambda: hf_blr.BLRLinear.from_spec(unknown_spec()),
        lambda: Variant.parse("nonsense:4x4"),
        lambda: aligned_spec("nonsense", 8, 8, 0.5),
    ],
)
def test_an_unknown_structure_fails_by_name(call):
    with pytest.raises((ValueError, KeyError), match="nonsense"):
        call()


def unknown_spec():
    return type("Nonsense", (Kronecker,), {"structure": "nonsense"})(8, 8, 1, (4, 4))


def test_the_folder_is_all_there_is():
    assert sorted(file.name for file in Path(kronecker.__file__).parent.glob("*.py")) == ["__init__.py", "parts.py"]
