"""BLRConfig: what it refuses, and that nothing is lost on the way through JSON."""

import json

import pytest
import torch

from hf_blr import BLRConfig
from hf_blr.config import FORMAT_VERSION


@pytest.mark.parametrize(
    "config",
    [
        BLRConfig(ratio=0.5),
        BLRConfig("low_rank", rank=4, target_modules=["q_proj"], modules_to_not_convert="lm_head"),
        BLRConfig("monarch", ratio=0.3, num_blocks=8, dataset="wikitext2", num_samples=3, seqlen=64, seed=5),
        BLRConfig(ratio=0.5, num_blocks=(4, 32), overrides={"down_proj": {"ratio": 0.7, "num_blocks": [8, 4]}}),
    ],
    ids=["plain", "low_rank", "monarch", "overrides"],
)
def test_round_trip_through_json(config):
    data = json.loads(json.dumps(config.to_dict()))
    assert BLRConfig.from_dict(data) == config
    assert BLRConfig(**json.loads(config.to_json_string())).num_blocks == config.num_blocks
    assert data["quant_method"] == "hf_blr" and data["version"] == FORMAT_VERSION


def test_equality_looks_at_every_setting():
    assert BLRConfig(ratio=0.5) == BLRConfig(ratio=0.5)
    assert BLRConfig(ratio=0.5) != BLRConfig(ratio=0.5, seed=1)


def test_text_in_memory_is_described_and_not_stored():
    stored = BLRConfig(ratio=0.5, dataset=["a secret", "another"]).to_dict()
    assert "secret" not in json.dumps(stored)
    assert "2 texts" in stored["dataset"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(), "exactly one of ratio.*and rank"),
        (dict(ratio=0.5, rank=4), "exactly one of ratio.*and rank"),
        (dict(ratio=0.0), r"in \(0, 1\], got 0.0"),
        (dict(ratio=1.5), r"in \(0, 1\], got 1.5"),
        (dict(ratio="half"), "ratio"),
        (dict(rank=0), "rank must be an integer of at least 1"),
        (dict(rank=2.5), "rank must be an integer"),
        (dict(ratio=0.5, structure="svd"), "structure must be one of.*got 'svd'; 'auto' chooses one"),
        (dict(ratio=0.5, num_blocks=0), "num_blocks"),
        (dict(ratio=0.5, num_blocks=(1, 2, 3)), "num_blocks"),
        (dict(ratio=0.5, blocks=4, colour="red"), r"has no \['blocks', 'colour'\].*num_blocks"),
        (dict(ratoi=0.5), r"has no \['ratoi'\] \(did you mean 'ratio'\?\); it takes"),
        (dict(ratio=0.5, version=FORMAT_VERSION + 1), "upgrade hf_blr"),
        (dict(ratio=0.5, quant_method="gptq"), "gptq"),
        (dict(ratio=0.5, dataset=3), "dataset must be"),
        (dict(ratio=0.5, num_samples=0), "num_samples"),
        (dict(ratio=0.5, seqlen=1), "seqlen"),
        (dict(ratio=0.5, damping=-1), "damping"),
        (dict(ratio=0.5, overrides={"q": {"ratio": 2}}), r"overrides\['q'\].*got 2"),
        (dict(ratio=0.5, overrides={"q": {"rnak": 2}}), r"overrides\['q'\] has no \['rnak'\]"),
        (dict(rank=True), "rank must be an integer"),
        (dict(ratio=True), "ratio must be"),
        (dict(ratio=0.5, seed="x"), "seed must be an integer, got 'x'"),
        (dict(ratio=0.5, overrides=5), "overrides must be a dict of dicts"),
        (dict(ratio=0.5, overrides={"q": 3}), "overrides must be a dict of dicts"),
        (dict(ratio=0.5, overrides={"q": {"rank": True}}), r"overrides\['q'\]: rank must be"),
        (dict(ratio=0.5, target_modules=3), "target_modules must be a regular expression or a list of names"),
        (dict(ratio=0.5, modules_to_not_convert=[1]), "modules_to_not_convert must be"),
        (dict(ratio=0.5, layers="x"), "layers must be a dict of dicts"),
        (dict(ratio=0.5, fit_device=0), "fit_device must be a string or None"),
        (dict(ratio=0.5, num_blocks=True), "num_blocks"),
        (dict(ratio=0.5, structure=3), "structure must be one of"),
        (dict(ratio=0.5, version="new"), "version"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        BLRConfig(**arguments)


def test_a_plan_needs_neither_ratio_nor_rank():
    spec = {"structure": "low_rank", "in_features": 8, "out_features": 8, "rank": 2, "num_blocks": [1, 1]}
    config = BLRConfig(layers={"0": {**spec, "bias": False, "transposed": False}})
    assert config.ratio is None and config.rank is None
    assert BLRConfig(**json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="exactly one of ratio"):
        BLRConfig(ratio=0.5, rank=2, layers=config.layers)


def test_every_field_says_what_it_is_and_the_command_line_takes_it():
    import argparse

    from hf_blr.cli import options
    from hf_blr.config import option_fields

    parser = argparse.ArgumentParser()
    options.add_blr(parser)
    args = parser.parse_args(["--ratio", "0.5", "--one-shot", "--num-blocks", "4x16", "--dataset", "none"])
    assert options.blr_config(args) == BLRConfig(ratio=0.5, sequential=False, num_blocks=(4, 16))
    shown = parser.format_help()
    for field in option_fields():
        assert field.metadata["help"] and field.name in (BLRConfig.__doc__ or "")
        assert field.metadata["cli"].get("flag", "") in shown


def test_an_override_of_one_budget_replaces_the_other_and_a_new_structure_forgets_the_blocks():
    config = BLRConfig("blast", ratio=0.5, num_blocks=(4, 4))
    assert config.settings_with({"rank": 3}) == {"structure": "blast", "ratio": None, "rank": 3, "num_blocks": (4, 4)}
    assert config.settings_with({"structure": "low_rank"})["num_blocks"] is None
    assert config.settings_with({"structure": "monarch", "num_blocks": (2, 2)})["num_blocks"] == (2, 2)


def test_compiled_code_writes_a_config_out():
    # as Whisper's forward does with the whole config of its model
    config = BLRConfig("low_rank", ratio=0.5, dataset={"self": 1.0})

    @torch.compile(fullgraph=True, backend="eager")
    def count(x):
        return x + len(config.to_dict())

    assert count(torch.zeros(1)).item() == len(config.to_dict())
