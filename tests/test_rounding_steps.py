"""The benchmark that leaves out one step of a fit in bits: each step is left out, and back afterwards."""

import json

import conditions
import protocol
import pytest
import rounding_steps
import runs_in_bits
import torch
from rounding_section import steps_section
from rounding_steps import LABELS, OF_FACTORS, OFF, without
from tiny import tiny_llama

from hf_blr.calibration.regression import Regression
from hf_blr.factorize import FitOptions, factorize
from hf_blr.formats import format_named
from hf_blr.structures import Dense, LowRank

SPECS = {"dense": Dense.whole(64, 32), "low_rank": LowRank(64, 32, 16)}
#: what a fit of one layer does not see
OF_MODELS = ("targets for the inputs as they have become", "layers one after the other")


def codes(spec, step):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator) * torch.logspace(0, -1, 64)
    mixed = [torch.randn(256, k, generator=generator) @ torch.randn(k, k, generator=generator) for k in (64, 32)]
    gram, output_gram = (x.T @ x for x in mixed)
    storage = format_named("int4", 16)
    with without(step):
        fitted = factorize(weight, spec, gram, output_gram[None], FitOptions(damping=1e-2), storage)
    return torch.cat([t.numbers(torch.float32).flatten() for t in fitted.tensors.values()])


@pytest.mark.parametrize("structure", SPECS)
def test_each_step_is_left_out_and_back_afterwards(structure):
    spec = SPECS[structure]
    right = codes(spec, "none")
    seen = [right]
    for step in OFF:
        if step == "none" or step in OF_MODELS:
            continue
        found = codes(spec, step)
        same = [torch.equal(found, other) for other in seen]
        # whole matrices have nothing to rotate or to refit
        assert same[0] == (structure == "dense" and step in OF_FACTORS) and sum(same) == same[0], step
        seen += [] if same[0] else [found]
    assert torch.equal(codes(spec, "none"), right)


def test_without_targets_the_dense_matrix_is_fitted():
    regression, weights = Regression(1.0), {"a": torch.eye(3, dtype=torch.float64)}
    x = torch.randn(8, 3)
    regression.add(x, 0.5 * x)
    with without("targets for the inputs as they have become"):
        assert torch.equal(regression.targets(weights, 0.1)["a"], torch.eye(3))
    assert not torch.equal(regression.targets(weights, 0.1)["a"], torch.eye(3))


def test_a_line_says_what_both_lose_without_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(conditions, "RESULTS", tmp_path)
    row = {"model": "tiny, turned", "format": "int4", "structure": "dense", "ratio": 1.0, "without": "none"}
    factors = {**row, "structure": "low_rank", "ratio": 0.8}
    rows = [{**row, "ppl": {"a": 1.25}}, {**factors, "ppl": {"a": 2.5}}]
    rows.append({**factors, "without": "refit of u", "ppl": {"a": 3.0}})
    where = {"device": "card", "torch": "2", "commit": "1234567890", "date": "2026-01-01"}
    fitted = {"calibration": "valid", "calibration_tokens": 4096}
    result = {"rows": rows, "environment": where, "fitted_to": fitted}
    (tmp_path / "rounding_steps.json").write_text(json.dumps(result))
    head, _, none, refit, *rest = steps_section().splitlines()
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["without", "whole, a", "low-rank, a"]
    assert [cell.strip() for cell in none.split("|")[1:-1]] == ["none", "1.25", "2.50"]
    assert [cell.strip() for cell in refit.split("|")[1:-1]] == ["refit of u", "", "3.00"]
    assert "low-rank at 80% of the parameters; fitted to 4 thousand tokens of valid" in rest[-1]


def test_a_row_is_measured_from_the_command_line(tmp_path, monkeypatch):
    for module, name, value in ((protocol, "SEQLEN", 32), (protocol, "BATCH", 4), (runs_in_bits, "GROUP", 8)):
        monkeypatch.setattr(module, name, value)
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "model")
    ids = torch.randint(0, 256, (256,), generator=torch.Generator().manual_seed(0))
    torch.save({"text": ids}, tmp_path / "ids.pt")
    where = ["--model", str(tmp_path / "model"), "--device", "cpu", "--json", str(tmp_path / "s.json")]
    texts = [item for name in ("--texts", "--parts") for item in (name, str(tmp_path / "ids.pt"))]
    only = ["--calibration", "text", "--windows", "4", "--labels", LABELS[0], "--steps", "none"]
    rounding_steps.main([*where, *texts, *only])
    (row,) = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert (row["model"], row["without"]) == ("model, turned", "none") and row["ppl"].keys() == {"text"}
