"""Trials of structures in bits end early where nothing could come of them, and no plan changes by it."""

from functools import cache

import pytest
import torch
from bits_cases import all_options, config, dense, shared, statistics
from torch import nn

from hf_blr import BLRConfig
from hf_blr.calibration.fisher import Statistics
from hf_blr.compression.allocation import allocate, loss_of
from hf_blr.compression.bits import TimeLimit, formats_of, share_bits
from hf_blr.compression.hull import Hull
from hf_blr.compression.layer_trials import Layer
from hf_blr.compression.rounding_trials import trials_of
from hf_blr.ops.table import implementation_of
from hf_blr.plan import resolve_plan
from hf_blr.structures import Blast, Dense


def test_what_is_above_the_hull_is_best_at_no_price():
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(12, 2, generator=generator, dtype=torch.float64)
    # a curve of falling losses has many corners
    points[:, 1] = 0.2 * points[:, 1] + (1 - points[:, 0]) ** 2
    hull = Hull.of(map(tuple, points.tolist()))
    assert 3 < len(hull.points) < 12
    prices = torch.logspace(-4, 4, 4001, dtype=torch.float64)
    least = (points[:, 1:] + prices * points[:, :1]).min(0).values
    found = set()
    for cost, loss in torch.rand(200, 2, generator=generator, dtype=torch.float64).tolist():
        expected = bool((loss + prices * cost >= least - 1e-6).all())
        found.add(expected)
        assert hull.above((cost, loss)) == expected, (cost, loss)
    assert found == {True, False}


def test_nothing_is_above_an_option_that_is_cheaper_than_all():
    hull = Hull.of([(2.0, 1.0), (4.0, 0.0)])
    assert not hull.above((1.9, 5.0)) and hull.above((2.0, 1.0)) and hull.above((9.0, 0.0))
    assert not Hull.of([]).above((1.0, 1.0))


@cache
def trials(hopeless_too):
    wanted = config(4)
    free = {name: layer.spec for name, layer in resolve_plan(dense(), wanted).items()}
    layers = {name: Layer(dense(), name, statistics(), wanted) for name in free}
    return trials_of(layers, free, formats_of(wanted), hopeless_too)


def test_hopeless_structures_have_one_fit_and_no_codes(monkeypatch):
    fitted, rounded = [], []
    fit, losses = Layer.fit, Layer.rounded_losses
    monkeypatch.setattr(Layer, "fit", lambda self, spec: fitted.append(spec.structure) or fit(self, spec))
    monkeypatch.setattr(
        Layer,
        "rounded_losses",
        lambda self, found, spec, formats: (
            rounded.extend(spec.structure for _ in formats) or losses(self, found, spec, formats)
        ),
    )
    found = trials.__wrapped__(False)
    hopeless = [shape for of_kind in found.values() for shape, tries in of_kind.items() if tries[0].hopeless]
    assert len(hopeless) == 6 and {shape.structure for shape in hopeless} == {"blast"}
    assert fitted.count("blast") == 6 and "blast" not in rounded and rounded.count("low_rank") > 10
    for kind, of_kind in trials(True).items():
        for shape, tries in of_kind.items():
            assert found[kind][shape] == tries or (shape in hopeless and tries[0].truncation > 1)


@pytest.mark.parametrize("bits", [2.5, 4.3, 9.0])
def test_no_plan_changes_by_what_is_not_tried(bits):
    _, options = all_options()
    numbers = sum(dense().get_submodule(name).weight.numel() for name in options)
    assert shared(bits)[1] == pytest.approx(loss_of(allocate(options, bits * numbers)), rel=1e-6)


def test_reasons_name_what_was_not_tried_further():
    _, _, reasons = shared(4.3)
    for choice in reasons.values():
        assert set(choice.hopeless) == {"blast 4x4", "blast 4x16", "blast 16x16"}
        assert all(1 < factor < 2 for factor in choice.hopeless.values())


def test_with_a_budget_of_time_all_are_tried():
    wanted = config(4.3)
    limit = TimeLimit(1.0, lambda name, spec, storage, whole: 0.0)
    _, _, reasons = share_bits(dense(), resolve_plan(dense(), wanted), statistics(), wanted, limit)
    assert all(choice.hopeless == {} for choice in reasons.values())


def test_a_structure_that_the_matrix_has_is_tried_in_full():
    """Its first fit loses next to nothing, whatever other matrices lose by these blocks."""
    generator = torch.Generator().manual_seed(0)
    spec = Blast(64, 64, 4, (4, 4))
    draw = {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes().items()}
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(64, 64, bias=False))
    with torch.no_grad():
        model.q_proj.weight.copy_(implementation_of("blast").dense(**draw) / 16)
    x, g = torch.randn(512, 64, generator=generator), torch.randn(512, 64, generator=generator)
    found = Statistics({"q_proj": x.T @ x}, {"q_proj": (g.T @ g)[None]}, 512)
    wanted = BLRConfig("auto", bits_per_weight=3.0)
    layer = Layer(model, "q_proj", found, wanted)
    tries = trials_of({"q_proj": layer}, {"q_proj": Dense.whole(64, 64)}, formats_of(wanted), False)[layer.kind]
    (tried,) = [each for shape, each in tries.items() if (shape.structure, shape.num_blocks) == ("blast", (4, 4))]
    assert len(tried) == 2 and not tried[0].hopeless and tried[0].truncation < 0.01
