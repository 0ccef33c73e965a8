"""Positions that a mask hides are no inputs, gradients or tokens."""

import copy

import pytest
import torch
from tiny import batches_for, divergence, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from zoo_inputs import LENGTHS, samples
from zoo_models import build as build_model

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration import aim
from hf_blr.calibration.blockwise import whole_model_grams
from hf_blr.calibration.padding import predicted_positions, real_positions, real_rows, token_count
from hf_blr.calibration.problem import plain_problem
from hf_blr.calibration.residual import residual_writers
from hf_blr.calibration.sequential import SequentialChain
from hf_blr.compression.allocation import predicted_loss
from hf_blr.targets import find_targets


def padded(batches, more=40, left=False):
    """The same tokens with as many again and more that a mask hides."""
    found = []
    for batch in batches:
        ids = batch["input_ids"]
        filler, ones = torch.full((len(ids), more), 255), torch.ones_like(ids)
        order = (1, 0) if left else (0, 1)
        parts = ((ids, ones), (filler, torch.zeros_like(filler)))
        found.append(
            {
                "input_ids": torch.cat([parts[i][0] for i in order], 1),
                "attention_mask": torch.cat([parts[i][1] for i in order], 1),
            }
        )
    return found


def masked(batches):
    return [{**batch, "attention_mask": torch.ones_like(batch["input_ids"])} for batch in batches]


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_bert])
def test_statistics_are_those_of_the_real_tokens(build):
    model = build(max_position_embeddings=128) if build is tiny_bert else build()
    batches, config = batches_for(model), BLRConfig("low_rank", ratio=0.5)
    plain = collect_statistics(model, config, calibration=batches)
    for other in (masked(batches), padded(batches)):
        found = collect_statistics(model, config, calibration=other)
        assert found.tokens == plain.tokens
        for field in ("grams", "output_grams"):
            for name, right in getattr(plain, field).items():
                wrong = (getattr(found, field)[name] - right).norm() / right.norm()
                assert wrong < 1e-3, (field, name)


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_padded_fit_is_that_of_the_real_tokens(sequential, fisher, left):
    dense = tiny_llama()
    batches = batches_for(dense)
    results = []
    for text in (batches, masked(batches), padded(batches, left=left)):
        model = copy.deepcopy(dense)
        config = BLRConfig("low_rank", ratio=0.5, sequential=sequential, fisher=fisher)
        report = compress(model, config, calibration=text, progress=False)
        assert report.calibration_tokens == 3 * 8 * 24
        results.append(divergence(dense, model, batches))
    assert results[1:] == pytest.approx([results[0]] * 2, rel=1e-2)


def test_targets_and_residual_writers_are_those_of_the_real_tokens():
    model, found = tiny_llama(), []
    batches = batches_for(model)
    for text in (batches, padded(batches)):
        chain = SequentialChain.trace(model, find_targets(model), text)
        (segment,), name, block = chain.segments, "model.layers.0", model.model.layers[0]
        piece = segment.piece
        dense = chain.run_dense(block, name, segment.groups[name], piece.hidden, piece.calls[name], segment.real)
        assert len(dense.written) == 2
        problems = chain.group_problems(block, piece.calls[name], dense, dense.groups[1], piece.hidden, 1e-4)
        first = dense.groups[0][0]
        # as for experts that see other tokens now
        real = [masks.get(first) for masks in segment.real]
        found.append((next(iter(problems.values())).gram, plain_problem(dense.inputs[first], real).gram))
    for right, got in zip(*found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-2)


def test_writers_are_found_by_the_real_tokens_alone():
    real = torch.tensor([[True, True, False]])
    outputs = {"a": torch.randn(1, 3, 4), "b": torch.randn(1, 3, 4)}
    added = outputs["a"] + outputs["b"]
    added[~real] = float("nan")
    assert residual_writers(added, outputs, real) == ["a", "b"]


def test_blocks_are_refined_for_the_real_tokens(monkeypatch):
    monkeypatch.setattr(aim, "STREAM_SHARE", 1.0)
    errors = []
    config = BLRConfig("blast", ratio=0.4, num_blocks=2, fisher=False, block_steps=10, fit_rounds=4)
    for pad in (False, True):
        model = tiny_llama()
        batches = batches_for(model)
        report = compress(model, config, calibration=padded(batches) if pad else batches, progress=False)
        errors.append([error for block in report.blocks for error in (block.error_before, block.error_after)])
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)


def test_masks_in_another_form_are_left_alone():
    ids, hidden = torch.zeros(2, 4, dtype=torch.long), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert real_positions({"input_ids": ids}) == {}
    assert real_positions({"input_ids": ids, "attention_mask": torch.ones_like(ids)}) == {}
    assert real_positions({"input_ids": ids, "attention_mask": torch.zeros(2, 1, 4, 4)}) == {}
    assert real_positions({"input_features": torch.zeros(2, 4, 8), "attention_mask": hidden}) == {}
    for batch in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(2, 4, 8)}):
        assert torch.equal(real_positions({**batch, "attention_mask": hidden})["tokens"], hidden.bool())
    assert token_count([{"input_ids": ids, "attention_mask": hidden}, {"input_ids": ids}, {"pixels": ids}]) == 6 + 8


def test_inputs_without_a_row_for_each_position_count_whole():
    real = torch.tensor([[True, False], [True, True]])
    for shape, rows in (
        ((2, 2, 5), 3),
        ((4, 5), 3),
        ((2, 3, 5), 6),
        ((2, 5), 2),
        ((2, 1, 2, 5), 3),
        ((3, 2, 2, 5), 12),
    ):
        assert real_rows(torch.zeros(shape), real).shape == (rows, 5)


def test_rows_of_sequences_side_by_side_are_picked_from_there():
    real = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.arange(6).view(2, 3, 1)
    assert real_rows(x, real).flatten().tolist() == [0, 1, 3]
    assert real_rows(x.transpose(0, 1), real).flatten().tolist() == [0, 3, 1]


def test_a_mask_of_text_hides_no_patches():
    model, parts = build_model("clip"), samples("clip", 2)
    ids, mask = torch.randint(3, 250, (2, 5)), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.cat([p["pixel_values"] for p in parts])}
    # five of both: four patches and the class token
    names = [f"{tower}_model.encoder.layers.1.mlp.fc2" for tower in ("text", "vision")]
    rows = collect_statistics(model, BLRConfig("low_rank", ratio=0.5), calibration=[batch]).rows
    assert [rows[name] for name in names] == [7, 10]


def test_a_decoders_positions_are_not_hidden_by_the_encoders_mask():
    model = tiny_t5()
    ids = torch.randint(1, 250, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5])
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    # each row of a normalised input has nearly the same size, so the trace counts rows
    rows = {}
    for length in (8, 6):
        batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids[:, :length]}
        grams = whole_model_grams(model, names, [batch])
        rows[length] = [round(grams[name].trace().item() / 64) for name in names]
    assert rows == {8: [11, 16], 6: [11, 12]}


def test_losses_are_those_of_labelled_positions():
    model, ids = tiny_llama(), batches_for(tiny_llama())[0]["input_ids"]
    labels = torch.full_like(ids, -100)
    labels[:, 10:12] = ids[:, 10:12]
    config = BLRConfig("low_rank", ratio=0.5)
    found = collect_statistics(model, config, calibration=[{"input_ids": ids, "labels": labels}])
    # what stands at 9 and 10 predicts the labels of 10 and 11
    assert found.tokens == 2 * len(ids) and set(found.rows.values()) == {ids.numel()}
    name = "model.layers.1.mlp.down_proj"
    rank = torch.linalg.matrix_rank(found.output_grams[name][0], rtol=1e-5)
    assert rank == 2 * len(ids)
    masked = tiny_bert(max_position_embeddings=128)
    everything = torch.zeros_like(ids)
    mask = torch.ones_like(ids)
    mask[:, 20:] = 0
    assert predicted_positions({"input_ids": ids, "labels": everything[:, 0]}, masked) is None
    counted = predicted_positions({"input_ids": ids, "labels": everything, "attention_mask": mask}, masked)
    assert torch.equal(counted, mask.bool())


@torch.no_grad()
def test_one_ruler_for_layers_that_read_patches_and_tokens():
    """A layer's share of the loss is a mean over its own inputs, whose number is not that of the predictions."""
    model, parts = build_model("llava"), samples("llava", 24)
    statistics = collect_statistics(model, BLRConfig("low_rank", ratio=0.5), calibration=parts)
    # five patches with the class token for each image, and four marks with every text
    rows, name = statistics.rows, "model.vision_tower.encoder.layers.1.self_attn.k_proj"
    assert rows[name] == 24 * 5
    assert rows["model.language_model.layers.0.mlp.up_proj"] == statistics.tokens == 4 * sum(LENGTHS) + 24 * 5
    other = copy.deepcopy(model)
    weight = other.get_submodule(name).weight
    change = 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    weight += change
    found = 0.0
    for part in parts:
        p, q = (each(**part).logits.log_softmax(-1) for each in (model, other))
        found += (p.exp() * (p - q)).sum().item() / statistics.tokens
    expected = predicted_loss(change, statistics.grams[name], statistics.output_grams[name], statistics.pairs(name))
    assert found == pytest.approx(expected, rel=0.4)
