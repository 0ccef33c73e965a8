"""Checkpoints that a stranger damaged and wrong inputs: none is taken, and every refusal names what is wrong."""

import json
import logging
from pathlib import Path
from random import Random

import pytest
import robustness
import torch
from damage import of_kind
from damage_bits import FORMATS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from hf_blr import BLRConfig, compress
from hf_blr.checkpoint.files import stored_tensors
from hf_blr.checkpoint.folder import check_folder
from hf_blr.cli import main
from hf_blr.formats.values import fault
from hf_blr.linear import BLRLinear
from hf_blr.plan import LayerPlan
from hf_blr.structures import FACTOR, INDEX, Pivoted, structures

CASES, MANY = 500, 10_000
CHECKS = dict(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def wholes():
    bars = transformers_logging.is_progress_bar_enabled()
    robustness.quiet()
    yield robustness.wholes()
    transformers_logging.set_verbosity_warning()
    logging.getLogger("hf_blr").setLevel(logging.NOTSET)
    if bars:
        transformers_logging.enable_progress_bar()


def check(wholes, kind, seed):
    result, message = robustness.outcome(wholes, kind, Random(seed))
    assert result == robustness.CLEAR, message


@given(kind=st.sampled_from(robustness.ALL_KINDS), seed=st.integers(0, 2**32))
@settings(max_examples=CASES, **CHECKS)
def test_damage_is_refused_by_name(wholes, kind, seed):
    check(wholes, kind, seed)


@pytest.mark.long
@given(kind=st.sampled_from(robustness.ALL_KINDS), seed=st.integers(0, 2**32))
@settings(max_examples=MANY, **CHECKS)
def test_damage_is_refused_by_name_many_times(wholes, kind, seed):
    check(wholes, kind, seed)


@pytest.mark.parametrize("folder", sorted((Path(__file__).parent / "corpus").iterdir()), ids=lambda folder: folder.name)
@pytest.mark.usefixtures("wholes")
def test_what_was_once_refused_is_refused_for_good(folder):
    result, message = robustness.outcome_of_load(folder, json.loads((folder / "names.json").read_text()))
    assert result == robustness.CLEAR, message


@pytest.mark.parametrize("name", [*structures(), *FORMATS])
def test_the_undamaged_checkpoint_loads(name, wholes, tmp_path):
    wholes[name].write(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in wholes[name].tensors.items())


@pytest.mark.parametrize(
    "kind, value, expected",
    [
        (INDEX, torch.tensor([2, 0, 1]), None),
        (INDEX, torch.tensor([2, 0, 2], dtype=torch.int16), "once"),
        (INDEX, torch.tensor([1, 2, 3]), "each integer of 0 to 2"),
        (INDEX, torch.tensor([0.0, 1.0]), "expected integers"),
        (FACTOR, torch.empty(3, 0), None),
        (FACTOR, torch.ones(2).to(torch.float8_e4m3fn), None),
        (FACTOR, torch.tensor([1.0, float("nan")]).bfloat16(), "finite"),
        (FACTOR, torch.tensor([1.0, float("-inf")], dtype=torch.float16), "finite"),
        (FACTOR, torch.ones(2).int(), "floating-point"),
        (FACTOR, torch.empty(2, device="meta"), None),
    ],
)
def test_what_numbers_may_be(kind, value, expected):
    found = fault(kind, value)
    assert found is None if expected is None else expected in found


def test_load_state_dict_checks_the_same_and_changes_nothing():
    layer = BLRLinear.from_spec(Pivoted(12, 8, 3))
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    for name, value in (("order", torch.zeros(12).int()), ("u", torch.full((8, 3), float("nan")))):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            layer.load_state_dict({**{key: t + 0 for key, t in before.items()}, name: value, "bias": torch.ones(8)})
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    turned = {**before, "order": before["order"].flip(0), "bias": torch.ones(8)}
    layer.load_state_dict(turned)
    assert all(torch.equal(t, turned[name]) for name, t in layer.state_dict().items())


def test_a_plan_of_a_rank_that_no_matrix_has_makes_no_room_for_it():
    with pytest.raises(ValueError, match="rank must be at most 8"):
        LayerPlan.from_dict({**Pivoted(12, 8, 10**9).to_dict(), "bias": False, "transposed": False})


def test_factors_that_no_file_has_are_missed_before_there_is_room_for_them(wholes, tmp_path, monkeypatch):
    checkpoint = wholes["low_rank"]
    lost = of_kind(checkpoint, FACTOR, Random(0))
    tensors = {key: t for key, t in checkpoint.tensors.items() if key != lost}
    type(checkpoint)(checkpoint.config, {"model.safetensors": tensors}, {}).write(tmp_path)
    monkeypatch.setattr("hf_blr.integration.quantizer.swap_in", None)
    with pytest.raises(ValueError, match=f"Missing tensors: {lost}"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_tensor_in_two_files_is_refused_and_both_are_named(tmp_path):
    for name, keys in (("a", "xy"), ("b", "yz")):
        save_file({key: torch.zeros(1) for key in keys}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="y: is in .*a.safetensors and in .*b.safetensors"):
        list(stored_tensors([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]))


@pytest.mark.parametrize("door", ["class", "auto", "config", "command line"])
def test_a_plan_of_far_too_many_modules_is_refused_before_transformers_copies_it(door, tmp_path, monkeypatch, capsys):
    compress(model := tiny_llama(), BLRConfig("low_rank", ratio=0.6), progress=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    layers |= {f"model.layers.{i}.mlp.unknown": layers["model.layers.0.mlp.up_proj"] for i in range(10_000)}
    (tmp_path / "config.json").write_text(json.dumps(config))

    def read(*args, **kwargs):
        pytest.fail("Transformers copies the config")

    monkeypatch.setattr(PreTrainedConfig, "from_dict", read)
    doors = {"class": LlamaForCausalLM, "auto": AutoModelForCausalLM, "config": AutoConfig}
    if door in doors:
        with pytest.raises(ValueError, match="list 10014 modules, but the checkpoint's files have 35 tensors"):
            doors[door].from_pretrained(tmp_path)
    else:
        assert main(["evaluate", str(tmp_path)]) == 2
        assert "list 10014 modules, but the checkpoint's files have 35 tensors" in capsys.readouterr().err


def test_what_comes_without_a_config_is_for_others_to_read(tmp_path):
    """A folder of a GGUF file, or a hub id, which is no folder."""
    check_folder(tmp_path)
    check_folder(Path("owner/name"))


def test_long_lists_of_unknown_modules_fit_in_a_line(caplog):
    model = tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    stored = model.config.quantization_config.to_dict()
    layer = stored["layers"]["model.layers.0.mlp.up_proj"]
    stored["layers"] |= {f"elsewhere.{i}": layer for i in range(500)}
    model.config.quantization_config = BLRConfig(**{k: v for k, v in stored.items() if k != "quant_method"})
    with caplog.at_level(logging.WARNING, logger="hf_blr"):
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    assert "elsewhere.0, " in caplog.text and "and 492 more" in caplog.text and "elsewhere.400" not in caplog.text
