"""The tuner under Triton's interpreter: what it tries, keeps and reads again, with a clock of our own."""

import json
import threading

import pytest
import torch
from compile_targets import DEVICES
from tiny import tiny_llama

import hf_blr
from hf_blr import ops
from hf_blr.config import BLRConfig
from hf_blr.formats import FORMATS
from hf_blr.inference import compile_kernels
from hf_blr.linear import BLRLinear
from hf_blr.ops.rules import columns, few_tokens, mix, products
from hf_blr.ops.triton import side_by_side, tuned
from hf_blr.structures import Monarch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="measures with a clock of its own, on the CPU")
RULE = mix.MixConfig(16, 16, False, 4)
OTHER = mix.MixConfig(32, 16, False, 4)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_BLR_CACHE", str(tmp_path))
    tuned.table_of.cache_clear()
    yield tmp_path
    tuned.table_of.cache_clear()


@pytest.fixture
def clock(monkeypatch):
    """{setting: seconds}; one that is not listed takes a second. Filled by `run`."""
    times, latest = {}, []
    monkeypatch.setattr(tuned, "seconds", lambda call: call() or times.get(latest[-1], 1.0))
    times["run"] = latest.append
    return times


def launched(times, tokens=100):
    """The setting that a launch takes."""
    used = []
    tuned.launch(lambda c: times["run"](c) or used.append(c), "mix", RULE, tokens, (4, 4), torch.empty(1))
    return used[-1]


def test_the_rule_holds_unless_asked_to_tune(clock, folder):
    clock[OTHER] = 0.1
    assert launched(clock) == RULE and not list(folder.iterdir())


def test_the_fastest_is_kept_and_read_by_later_processes(clock, folder):
    clock[OTHER] = 0.5
    with tuned.tuning():
        assert launched(clock) == OTHER
    tuned.table_of.cache_clear()
    assert launched(clock, tokens=128) == OTHER
    assert launched(clock, tokens=129) == RULE
    (file,) = folder.iterdir()
    assert json.loads(file.read_text()) == {"mix 128 4 4 4": [32, 16, False, 4]}


def test_noise_does_not_replace_the_rule(clock):
    clock[OTHER] = 0.99
    with tuned.tuning():
        assert launched(clock) == RULE


def test_settings_that_do_not_fit_the_card_are_passed_over(monkeypatch):
    def seconds(call):
        if call() == OTHER:
            raise tuned.triton.OutOfResources(1, 2, "shared memory")
        return 1.0

    monkeypatch.setattr(tuned, "seconds", seconds)
    assert tuned.fastest(lambda config: config, [RULE, OTHER]) == RULE


def test_a_broken_file_is_reported_and_not_used(clock, folder, caplog):
    tuned.file_of(torch.device("cpu")).write_text("{")
    assert launched(clock) == RULE
    assert "cannot be read" in caplog.text


def test_saving_keeps_what_other_processes_added(folder):
    path = tuned.file_of(torch.device("cpu"))
    tuned.save({"a": [1]}, path)
    tuned.save({"b": [2]}, path)
    assert json.loads(path.read_text()) == {"a": [1], "b": [2]}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_at_most_eight_settings_are_tried(device):
    rules = [
        products.gemm_config(1024, 1024, 2, device),
        mix.mix_config(4, 4, 1024, False, device),
        mix.mix_config(16, 16, 1024, True, device),
        few_tokens.project_config(4, 4096, 1024, 16, True, 2, device),
        few_tokens.one_config(1024, 4096, 1, 2, device),
        few_tokens.one_mix_config(4, 1024, 2, device),
        few_tokens.expand_config(1024, 4096, 16, 2, device),
        columns.column_config(device),
    ]
    for rule in rules:
        found = tuned.candidates(rule)
        assert found[0] == rule and 4 <= len(found) <= 8 and len(set(found)) == len(found)


def test_pivoted_layers_are_tuned(folder, monkeypatch):
    monkeypatch.setattr(tuned, "fastest", lambda run, configs: configs[0])
    model = tiny_llama()
    hf_blr.compress(model, BLRConfig("pivoted", ratio=0.6))
    with ops.use_impl("triton"):
        kinds = {key.split()[0] for key in json.loads(hf_blr.tune(model, tokens=(1, 40)).read_text())}
    assert kinds == {"columns", "pivoted_project", "decode_one"}


def test_layers_of_one_size_are_tuned_in_each_format(folder, monkeypatch):
    monkeypatch.setattr(tuned, "fastest", lambda run, configs: configs[0])
    spec = Monarch(128, 64, 16, (4, 2))
    layers = [BLRLinear.from_spec(spec, dtype=torch.float16, storage=FORMATS[name]) for name in ("plain", "fp8")]
    with ops.use_impl("triton"):
        path = hf_blr.tune(torch.nn.Sequential(*layers).eval(), tokens=(40,))
    assert {"block_gemm", "float8_gemm", "cast_rows"} < {key.split()[0] for key in json.loads(path.read_text())}


@pytest.mark.slow
@pytest.mark.parametrize("structure", ["monarch", "blast"])
def test_a_model_is_tuned_for_each_kind_of_layer(structure, folder, monkeypatch):
    model = tiny_llama()
    hf_blr.compress(model, BLRConfig(structure, ratio=0.6, num_blocks=4))
    with pytest.raises(ValueError, match="nothing to tune"):
        hf_blr.tune(model)
    measured = []
    monkeypatch.setattr(tuned, "fastest", lambda run, configs: measured.append(run) or configs[0])
    with ops.use_impl("triton"):
        path = hf_blr.tune(model, tokens=(1, 40))
        count = len(measured)
        assert count == len(json.loads(path.read_text())) > 4
        hf_blr.tune(model, tokens=(1, 40))
        assert len(measured) == count
        # layers that run together are launches of their own
        hf_blr.fuse(model)
        hf_blr.tune(model, tokens=(1,))
        assert len(measured) > count


def test_kernels_of_each_kind_are_compiled_side_by_side(monkeypatch):
    model = tiny_llama()
    # what stays whole runs on kernels of its own in bits
    overrides = {r".*\.mlp\..*": {"structure": "dense", "dense_format": "int4"}}
    config = BLRConfig("low_rank", ratio=0.5, dataset=None, overrides=overrides)
    hf_blr.compress(model, config)
    assert compile_kernels(model) == 0
    monkeypatch.setattr("hf_blr.inference.compiling.on_gpu", lambda module: True)
    ran, forward = [], BLRLinear.forward

    def seen(module, x):
        assert side_by_side.only_compiles.get()
        ran.append((module.spec, len(x)))
        return forward(module, x)

    monkeypatch.setattr(BLRLinear, "forward", seen)
    kinds = {module.spec for module in hf_blr.linear.blr_modules(model).values()}
    assert compile_kernels(model, (9, 1)) == 2 * len(kinds)
    assert sorted(ran, key=str) == sorted(((spec, count) for spec in kinds for count in (9, 1)), key=str)
    assert not side_by_side.only_compiles.get()


def test_launches_of_this_thread_alone_compile_instead_of_running(monkeypatch):
    said = []
    launch = lambda function, *args, grid, warmup: said.append((args, grid, warmup))  # noqa: E731
    monkeypatch.setattr(side_by_side.JITFunction, "run", launch)

    def launched(name):
        side_by_side.JITFunction.run(None, name, grid=(1,), warmup=False)

    with side_by_side.compiling(2):
        launched("own")
        other = threading.Thread(target=launched, args=("other",))
        other.start()
        other.join()
    launched("later")
    assert said == [(("own",), (1,), True), (("other",), (1,), False), (("later",), (1,), False)]


def test_what_is_compiled_is_loaded_too():
    class Kernel:
        loaded = False

        @property
        def run(self):
            self.loaded = True

    kernel = Kernel()
    with side_by_side.Loading(1) as pool:
        assert pool.submit(lambda: kernel).result() is kernel and kernel.loaded
