"""The symmetries that experiments/rotations.py measures leave a Llama's logits as they are."""

import model_symmetries as symmetries
import pytest
import torch
from model_symmetries import changed
from rotation_choices import fitted_rotation, log_error
from tiny import tiny_llama, tiny_logits

K, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16


def model(tied=False):
    """Grouped queries, and norms whose weights are not one."""
    llama = tiny_llama(tie_word_embeddings=tied)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for norm in symmetries.norms(llama):
            norm.weight.copy_(0.5 + torch.rand(K, generator=generator))
    return llama


def rotations(*shape):
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(5)))[0]


def same_logits(before, after):
    torch.testing.assert_close(tiny_logits(after), before, rtol=1e-4, atol=1e-4)


def test_heads_in_another_order():
    llama = model()
    before = tiny_logits(llama)
    change = symmetries.head_order(torch.tensor([1, 0]), torch.tensor([[1, 0], [0, 1]]), HEAD_DIM)
    symmetries.change_layer(llama.model.layers[0], change)
    same_logits(before, llama)
    # the queries of one key-value head with the keys of another
    wrong = symmetries.head_order(torch.tensor([0, 1]), torch.tensor([[0, 2], [-1, 1]]), HEAD_DIM)
    symmetries.change_layer(llama.model.layers[0], wrong)
    assert (tiny_logits(llama) - before).abs().max() > 0.1


def test_values_rotated_and_rotated_back():
    llama = model()
    before = tiny_logits(llama)
    change = symmetries.value_rotation(rotations(KV_HEADS, HEAD_DIM, HEAD_DIM), HEADS // KV_HEADS)
    symmetries.change_layer(llama.model.layers[1], {"v_proj": change["v_proj"]})
    assert (tiny_logits(llama) - before).abs().max() > 0.1
    symmetries.change_layer(llama.model.layers[1], {"o_proj": change["o_proj"]})
    same_logits(before, llama)


@pytest.mark.parametrize("tied", [False, True])
def test_a_permuted_stream_keeps_a_tied_embedding(tied):
    llama = model(tied)
    before, weight = tiny_logits(llama), llama.model.embed_tokens.weight.detach().clone()
    symmetries.permute_stream(llama, torch.randperm(K, generator=torch.Generator().manual_seed(2)))
    same_logits(before, llama)
    assert not torch.equal(llama.model.embed_tokens.weight, weight)
    assert (llama.lm_head.weight is llama.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("tied", [False, True])
def test_a_rotated_stream_unties_the_embedding(tied):
    llama = model(tied)
    before = tiny_logits(llama)
    symmetries.rotate_stream(llama, rotations(K, K))
    same_logits(before, llama)
    assert llama.lm_head.weight is not llama.model.embed_tokens.weight
    assert all(torch.equal(norm.weight, torch.ones(K)) for norm in symmetries.norms(llama))


def test_gram_follows_the_weight():
    generator = torch.Generator().manual_seed(7)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(16, 40, generator=generator)
    left, right = rotations(8, 8), rotations(16, 16)
    new_weight, new_gram = symmetries.changed(weight, x @ x.T, (left, right))
    torch.testing.assert_close(new_gram, (right @ x) @ (right @ x).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new_weight @ (right @ x), left @ (weight @ x), rtol=1e-4, atol=1e-4)


def test_a_fitted_rotation_finds_most_of_a_hidden_one():
    generator = torch.Generator().manual_seed(9)
    # half of the numbers buys blocks of rank 4, which these are until they are turned
    blocks = torch.randn(2, 2, 16, 4, generator=generator) @ torch.randn(2, 2, 4, 16, generator=generator)
    turn = torch.randn(32, 32, generator=generator)
    turn = torch.linalg.matrix_exp(0.02 * (turn - turn.T))
    data = {"v_proj": (turn @ blocks.transpose(1, 2).reshape(32, 32), torch.eye(32))}

    def change_of(rotation):
        return {"v_proj": (rotation, None)}

    def squared_error(rotation):
        return log_error(*changed(*data["v_proj"], (rotation, None)), "monarch", (2, 2), 4).exp().item()

    rotation = fitted_rotation([data], change_of, (32, 32), "monarch", (2, 2), steps=60, rate=0.01, rounds=2)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(32), rtol=1e-4, atol=1e-4)
    assert squared_error(rotation) < 0.1 * squared_error(torch.eye(32))
