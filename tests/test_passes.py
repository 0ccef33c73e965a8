"""A model that is fitted again, weighed by what the fits before it left."""

import pytest
import torch
from tiny import batches_for, divergence, tiny_llama, tiny_mixtral

from hf_blr import BLRConfig, compress, to_dense
from hf_blr.calibration import collect_statistics
from hf_blr.compression import passes, pipeline

SETTINGS = {"structure": "pivoted", "ratio": 0.3}


@pytest.fixture
def whole_text(monkeypatch):
    monkeypatch.setattr(passes, "SPARED", 1)


def made(passes, build=tiny_llama, **more):
    model = build()
    batches = batches_for(model, count=8)
    report = compress(model, BLRConfig(passes=passes, **{**SETTINGS, **more}), calibration=batches, progress=False)
    return model, report, batches


@pytest.mark.parametrize("build", [tiny_llama, tiny_mixtral])
def test_a_second_pass_is_that_with_statistics_of_the_model_that_the_first_left(build, whole_text):
    first, _, batches = made(1, build)
    config = BLRConfig(**SETTINGS)
    statistics = collect_statistics(to_dense(first), config, calibration=batches)
    wanted = build()
    compress(wanted, config, calibration=batches, statistics=statistics, progress=False)
    found, *_ = made(2, build)
    state = found.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in wanted.state_dict().items())


def test_a_second_pass_comes_closer(whole_text):
    # a head that is sure of something, as trained ones are
    def build():
        model = tiny_llama()
        model.lm_head.weight.data *= 4
        return model

    dense = build()
    apart = []
    for number in (1, 2):
        model, _, batches = made(number, build)
        apart.append(divergence(dense, model, batches))
    assert apart[1] < 0.97 * apart[0]


def test_the_first_pass_reads_a_part_of_the_text_and_leaves_the_model_alone(monkeypatch):
    read, own = [], passes.fit_layers

    def fit(model, names, start, batches, config, *rest):
        read.append((model, len(batches), config.block_steps))
        return own(model, names, start, batches, config, *rest)

    monkeypatch.setattr(passes, "fit_layers", fit)
    dense = tiny_llama()
    _, report, batches = made(3, lambda: dense, block_steps=2)
    assert [(count, steps) for _, count, steps in read] == 2 * [(len(batches) // 4, 0)] and len(report.blocks) == 2
    assert all(model is not dense for model, *_ in read)


def test_a_resumed_run_does_not_make_its_first_pass_again(tmp_path, monkeypatch):
    wanted, *_ = made(2)
    model, config = tiny_llama(), BLRConfig(passes=2, **SETTINGS)
    batches, own = batches_for(model, count=8), pipeline.fit_layers
    monkeypatch.setattr(pipeline, "fit_layers", stopped)
    with pytest.raises(KeyboardInterrupt):
        compress(model, config, calibration=batches, resume=tmp_path / "kept", progress=False)
    monkeypatch.setattr(pipeline, "fit_layers", own)
    monkeypatch.setattr(passes, "fit_layers", stopped)
    compress(model, config, calibration=batches, resume=tmp_path / "kept", progress=False)
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in wanted.state_dict().items())


def stopped(*_):
    raise KeyboardInterrupt


def test_what_cannot_be_fitted_again_is_refused():
    with pytest.raises(ValueError, match="set fisher=True, or passes=1"):
        BLRConfig("low_rank", ratio=0.5, passes=2, fisher=False)
    with pytest.raises(ValueError, match="passes must be an integer of at least 1"):
        BLRConfig("low_rank", ratio=0.5, passes=0)
    model = tiny_llama()
    for asked in ({"passes": 2}, {"block_steps": 2}, {"allocation": "loss"}, {"structure": "auto"}):
        with pytest.raises(ValueError, match="and there is none: give text"):
            compress(model, BLRConfig(**{"structure": "low_rank", "ratio": 0.5, **asked}), progress=False)
    config = BLRConfig(passes=2, **SETTINGS)
    statistics = collect_statistics(model, config, calibration=batches_for(model))
    with pytest.raises(ValueError, match="passes=2 fit the model again to text, and there is none: give text"):
        compress(model, config, statistics=statistics, progress=False)
