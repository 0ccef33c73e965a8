"""Every structure in every family of models: compressed to its weights, saved, loaded, trained."""

import copy
from functools import cache

import pytest
import torch
from tiny import (
    tiny_bert,
    tiny_gpt2,
    tiny_inputs,
    tiny_llama,
    tiny_logits,
    tiny_mixtral,
    tiny_qwen3,
    tiny_t5,
    tiny_vit,
)

from hf_blr import BLRConfig, compress, to_dense
from hf_blr.integration import blr_modules
from hf_blr.structures import structures

#: {builder: its projections}
FAMILIES = {
    tiny_llama: 14,
    tiny_gpt2: 8,
    tiny_bert: 12,
    tiny_vit: 12,
    tiny_t5: 28,
    tiny_mixtral: 12,
    tiny_qwen3: 14,
}

each_case = pytest.mark.parametrize(
    "build, structure",
    [(build, structure) for build in FAMILIES for structure in structures()],
    ids=lambda value: value if isinstance(value, str) else value.__name__.removeprefix("tiny_"),
)


@cache
def compressed(build, structure):
    """One fit for all tests, none of which changes it."""
    model = build()
    compress(model, BLRConfig(structure, ratio=0.6, fit_rounds=2), progress=False)
    return model


@each_case
def test_every_projection_is_replaced_and_computes_what_its_matrix_says(build, structure):
    model = compressed(build, structure)
    modules = blr_modules(model)
    assert len(modules) == FAMILIES[build]
    assert {module.spec.structure for module in modules.values()} == {structure}
    assert max(module.spec.ratio for module in modules.values()) <= 0.6
    dense = to_dense(copy.deepcopy(model))
    assert not blr_modules(dense)
    torch.testing.assert_close(tiny_logits(model), tiny_logits(dense), rtol=1e-4, atol=1e-4)


@each_case
def test_a_loaded_model_gives_identical_outputs(build, structure, tmp_path):
    model = compressed(build, structure)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {name: m.spec for name, m in blr_modules(loaded).items()} == {
        name: m.spec for name, m in blr_modules(model).items()
    }
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


@each_case
def test_gradients_reach_every_factor(build, structure):
    model = copy.deepcopy(compressed(build, structure))
    model(**tiny_inputs(model))[0].square().mean().backward()
    for name, module in blr_modules(model).items():
        for factor, value in module.factors().items():
            assert value.grad is not None and value.grad.isfinite().all(), f"{name}.{factor}"
            assert value.grad.abs().max() > 0, f"{name}.{factor}"
