"""What the loss feels of single layers' changes when the tokens of a sequence are not taken as independent."""

import pytest
import torch
from tiny import divergence, tiny_llama

from hf_blr import BLRConfig
from hf_blr.calibration import collect_statistics
from hf_blr.calibration.coherence import losses_of_changes
from hf_blr.compression.allocation import predicted_loss

BATCHES = [{"input_ids": torch.randint(0, 256, (64, 24), generator=torch.Generator().manual_seed(i))} for i in (0, 1)]


@pytest.mark.parametrize("kind", ["self_attn.v_proj", "mlp.down_proj"])
def test_the_loss_of_a_change_is_the_divergence_that_it_makes(kind):
    name, dense, model = f"model.layers.0.{kind}", tiny_llama(), tiny_llama()
    weight = model.get_submodule(name).weight
    # what it does to all tokens alike adds up
    common = torch.randn(weight.shape[0], 1, generator=torch.Generator().manual_seed(1)).expand_as(weight)
    change = 0.02 * weight.std() * common
    weight.data += change
    made = divergence(dense, model, BATCHES)
    (found,) = losses_of_changes(dense, {name: change}, BATCHES).values()
    assert found == pytest.approx(made, rel=0.3)
    statistics = collect_statistics(dense, BLRConfig(ratio=0.5), calibration=BATCHES)
    alone = predicted_loss(change, statistics.grams[name], statistics.output_grams[name], statistics.pairs(name))
    print(kind, made, found, alone)
    assert all(p.requires_grad and p.grad is None for p in dense.parameters())
