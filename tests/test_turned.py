"""The same model in another basis of its residual stream."""

import copy

import pytest
import torch
from tiny import tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits
from turned import turned

from hf_blr.targets import find_targets


def uneven(model):
    """The model with weights of norms that differ, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(1 + torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("settings", [{"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}])
def test_a_turned_model_computes_the_same(settings):
    dense = uneven(tiny_llama(**settings)).double()
    for name, parameter in dense.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    before, logits = copy.deepcopy(dense), dense(**tiny_inputs(dense)).logits
    model = turned(dense)
    # Llama's norms compute in float32, whatever the model's dtype
    torch.testing.assert_close(model(**tiny_inputs(model)).logits, logits, rtol=1e-4, atol=1e-5)
    # no weight is where it was
    for name in find_targets(before):
        old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
        assert (old - new).norm() > old.norm()
    assert find_targets(model) == find_targets(before)


def test_it_is_another_basis_for_each_seed_and_survives_a_copy():
    first, again, other = (turned(uneven(tiny_llama(tie_word_embeddings=True)), seed) for seed in (0, 0, 1))
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.allclose(first.state_dict()[name], other.state_dict()[name])
    assert torch.equal(tiny_logits(copy.deepcopy(first)), tiny_logits(first))


def test_a_stream_that_is_read_otherwise_is_refused():
    with pytest.raises(ValueError, match="only the streams of llama, .* can be turned, got 'gpt2'"):
        turned(tiny_gpt2())
