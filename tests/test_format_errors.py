"""Files, plans and settings in bits that must not pass: each error names what is wrong."""

import pickle

import pytest
import torch
from format_cases import DOWN, Q, checkpoint, edited, filled, replaced
from tiny import tiny_llama, tiny_logits
from torch.optim.swa_utils import AveragedModel
from transformers import LlamaForCausalLM

from hf_blr import BLRConfig, compress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(tmp_path_factory.mktemp("bits"))


BROKEN = {
    "scale of zero": (filled(f"{Q}.u.weight_scale", (3, 0), 0), rf"{Q}\.u\.weight_scale must be finite and positive"),
    "scale below zero": (filled(f"{Q}.u.weight_scale", (3, 0), -1), "finite and positive"),
    "scale of NaN": (filled(f"{Q}.v.weight_scale", (0, 0), float("nan")), rf"{Q}\.v\.weight_scale must be finite"),
    "scale of infinity": (filled(f"{DOWN}.w.weight_scale", (0, 0), float("inf")), rf"{DOWN}\.w\.weight_scale"),
    "shape of another": (
        filled(f"{Q}.u.weight_shape", (1,), 21),
        rf"{Q}\.u\.weight_shape must say \[64, 20\], got \[64, 21\]",
    ),
    "bits behind the last": (
        filled(f"{Q}.u.weight_packed", (5, 1), -1),
        rf"{Q}\.u\.weight_packed has bits behind the last of 20",
    ),
    "NaN in fp8": (
        replaced(f"{DOWN}.w.weight", lambda t: (t.float() * float("nan")).to(t.dtype)),
        "w.weight holds NaN",
    ),
    "packed as another": (
        replaced(f"{Q}.u.weight_packed", lambda t: t[:, :1].contiguous()),
        rf"{Q}\.u\.weight_packed \(shape \(64, 1\), the config's layers say \(64, 2\)\)",
    ),
    "packed in 64 bits": (
        replaced(f"{Q}.u.weight_packed", torch.Tensor.long),
        rf"{Q}\.u\.weight_packed \(torch.int64, the config's layers say torch.int32\)",
    ),
    "fp8 as numbers": (replaced(f"{DOWN}.w.weight", torch.Tensor.half), rf"{DOWN}\.w\.weight \(torch.float16.*float8"),
    "scale in another dtype": (replaced(f"{Q}.u.weight_scale", torch.Tensor.half), "torch.float16.*bfloat16"),
    "scale missing": (lambda t: t.pop(f"{Q}.u.weight_scale"), rf"Missing .*{Q}\.u\.weight_scale"),
    "factor as numbers": (lambda t: t.update({f"{Q}.u": torch.zeros(64, 20)}), rf"{Q}\.u \(a low_rank module has u\.w"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_bits_are_refused_by_name(case, folder, tmp_path):
    edit, message = BROKEN[case]
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(edited(folder, tmp_path / "broken", edit))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "int5"}, rf"{Q}: format must be one of .* got 'int5'; a later hf_blr may know it"),
        ({"format": "int4", "rank": 1}, rf"{Q}: u \[64, 1\] takes 48.0 bits a number in int4"),
        ({"format": "fp8", "group_size": 4}, rf"{Q}: the format 'fp8' takes no group_size"),
        ({"format": "int4", "group_size": 16}, rf"{Q}: rows of u hold 20 numbers, which groups of 16 do not divide"),
        ({"structure": "dense", "rank": 64, "format": "plain"}, rf"{Q}: a layer of structure 'dense' is smaller in"),
        ({"structure": "dense", "rank": 20}, rf"{Q}: a dense 64x64 matrix has rank 64, got 20"),
    ],
)
def test_plans_that_cannot_be(change, message, folder, tmp_path):
    def edit(config):
        config["layers"][Q].update(change)

    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(edited(folder, tmp_path / "broken", edit_config=edit))


def test_bits_of_a_layer_that_the_config_does_not_list(folder, tmp_path):
    for name, tensor in ((Q, "u"), (DOWN, "w")):
        broken = edited(folder, tmp_path / tensor, edit_config=lambda config, name=name: config["layers"].pop(name))
        with pytest.raises(ValueError, match=rf"{name}\.{tensor}\.weight\S* \(the config's layers do not list"):
            LlamaForCausalLM.from_pretrained(broken)


def test_a_later_format_in_the_settings_is_refused_by_name(folder, tmp_path):
    broken = edited(folder, tmp_path / "broken", edit_config=lambda config: config.update(factor_format="int5"))
    with pytest.raises(ValueError, match="factor_format must be .*a later hf_blr may know more.*int5"):
        LlamaForCausalLM.from_pretrained(broken)


def test_broken_bits_on_disk_are_refused_too(folder, tmp_path):
    broken = edited(folder, tmp_path / "broken", filled(f"{Q}.u.weight_scale", (3, 0), 0))
    with pytest.raises(ValueError, match=r"u\.weight_scale must be finite|upgrade transformers"):
        placed = {"model": "disk", "lm_head": "cpu"}
        LlamaForCausalLM.from_pretrained(broken, device_map=placed, offload_folder=tmp_path / "offload")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(ratio=0.5, factor_format="int5"), "factor_format must be one of .*int5"),
        (dict(ratio=0.5, dense_format=4), "dense_format must be one of"),
        (dict(ratio=0.5, factor_format="int4", group_size=0), "group_size must be a positive integer"),
        (dict(ratio=0.5, factor_format="int4", group_size=-2), "group_size must be a positive integer"),
        (dict(ratio=0.5, group_size=64), "no layer has one"),
        (dict(ratio=0.5, factor_format="fp8", group_size=64), "no layer has one"),
        (dict(structure="dense"), "set dense_format"),
        (dict(structure="dense", ratio=0.5, dense_format="int4"), "keeps the whole matrix: leave ratio"),
        (dict(ratio=0.5, overrides={"q": {"structure": "dense", "rank": 4}}), r"overrides\['q'\].*keeps the whole"),
        (dict(ratio=0.5, overrides={"q": {"factor_format": "int5"}}), r"overrides\['q'\]: factor_format must be"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        BLRConfig(**settings)


@pytest.mark.parametrize("form", ["int8", "int3"])
@pytest.mark.parametrize("seen", [lambda m: tiny_logits(m), lambda m: m.eval(), lambda m: m.state_dict()])
def test_codes_that_were_averaged_are_refused(form, seen):
    model = tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.6, factor_format=form, group_size=-1), progress=False)
    average = AveragedModel(model)
    assert torch.equal(tiny_logits(average.module), tiny_logits(model))
    for _ in range(3):
        average.update_parameters(model)
    with pytest.raises(ValueError, match="codes were written into in place, as by a moving average"):
        seen(average.module)


def test_other_codes_may_come_in_place_of_what_is_there():
    models = [tiny_llama(seed) for seed in (0, 1)]
    for model in models:
        compress(model, BLRConfig("low_rank", ratio=0.6, factor_format="int8", allocation="uniform"), progress=False)
    one, other = models
    tiny_logits(one)
    copied = pickle.loads(pickle.dumps(one))
    one.load_state_dict(other.state_dict())
    assert torch.equal(tiny_logits(one), tiny_logits(other))
    layer = copied.model.layers[0].mlp.up_proj
    layer.u.take(other.model.layers[0].mlp.up_proj.u.codes())
    assert tiny_logits(copied.eval()).isfinite().all()
