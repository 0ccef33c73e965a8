"""Batches with labels for models with a decoder of their own: it is fed from the labels, as in the model's own loss."""

import copy

import pytest
import torch
from tiny import build, tiny_llama, tiny_t5, tiny_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    BartModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration.batches import text_batch
from hf_blr.linear import blr_modules


def tiny_bart(made=BartForConditionalGeneration):
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return build(made, BartConfig(vocab_size=257, d_model=64, forced_eos_token_id=2, **sizes, **heads))


def tiny_whisper():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 8}
    lengths = {"max_source_positions": 32, "max_target_positions": 32}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = WhisperConfig(vocab_size=257, d_model=64, **sizes, **heads, **lengths, **tokens)
    return build(WhisperForConditionalGeneration, config)


def source(model):
    generator = torch.Generator().manual_seed(0)
    if isinstance(model, WhisperForConditionalGeneration):
        return {"input_features": torch.randn(4, 8, 64, generator=generator)}
    return {"input_ids": torch.randint(3, 250, (4, 20), generator=generator)}


def labels():
    return torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(1))


def fed(model, labels):
    """The labels, one to the right."""
    start = torch.full((len(labels), 1), model.config.decoder_start_token_id)
    return torch.cat([start, labels[:, :-1]], 1)


@pytest.mark.parametrize("build_model", [tiny_t5, tiny_bart, tiny_whisper])
@pytest.mark.parametrize("fisher", [True, False])
def test_labels_feed_the_decoder(build_model, fisher):
    model, given = build_model(), labels()
    config = BLRConfig("low_rank", ratio=0.6, fisher=fisher, **({} if fisher else {"allocation": "uniform"}))
    inputs = source(model)
    found = collect_statistics(model, config, calibration=[inputs | {"labels": given}])
    right = collect_statistics(model, config, calibration=[inputs | {"decoder_input_ids": fed(model, given)}])
    assert found.grams.keys() == right.grams.keys() and not found.unreached
    for field in ("grams", "output_grams"):
        for name, matrix in getattr(right, field).items():
            assert torch.equal(getattr(found, field)[name], matrix), (field, name)


@pytest.mark.parametrize("build_model", [tiny_t5, tiny_whisper])
def test_a_model_is_compressed_with_the_batches_it_is_trained_with(build_model):
    dense = build_model()
    batch = source(dense) | {"labels": labels()}
    model = copy.deepcopy(dense)
    compress(model, BLRConfig("low_rank", ratio=0.6), calibration=[batch], progress=False)
    assert blr_modules(model)
    assert abs(model(**batch).loss - dense(**batch).loss) < 0.05 * dense(**batch).loss


READERS = {
    "llama": (tiny_llama, None),
    "t5": (tiny_t5, "labels"),
    "bart": (tiny_bart, "labels"),
    "base": (lambda: tiny_bart(BartModel), "decoder_input_ids"),
    "classifier": (lambda: tiny_bart(BartForSequenceClassification), None),
}


@pytest.mark.parametrize("build_model, written", READERS.values(), ids=READERS)
def test_the_decoder_goes_on_with_the_text_that_the_encoder_reads(build_model, written):
    ids = torch.arange(24).view(2, 12)
    batch = text_batch(build_model(), ids)
    if written is None:
        assert batch.keys() == {"input_ids"} and torch.equal(batch["input_ids"], ids)
    else:
        assert batch.keys() == {"input_ids", written}
        assert torch.equal(torch.cat([batch["input_ids"], batch[written]], 1), ids)


def test_a_text_fits_both_sides_and_says_what_it_cost():
    model, text = tiny_t5(), "A line about one thing, then a line about another. " * 60
    config = BLRConfig("low_rank", ratio=0.6, dataset=[text], seqlen=32, num_samples=32)
    report = compress(model, config, tokenizer=tiny_tokenizer(), progress=False)
    assert {name.partition(".")[0] for name in blr_modules(model)} == {"encoder", "decoder"}
    assert report.fitted_to == "activations" and report.held_out_tokens > 0 and report.divergence > 0


def test_labels_that_do_not_count_draw_no_loss():
    model, given = tiny_bart(), labels()
    config, inputs = BLRConfig("low_rank", ratio=0.6), source(model)
    given[:, 8:] = -100
    head = [{"decoder_input_ids": fed(model, given.clamp_min(1))[:, :8]}, {"labels": given}]
    short, long = (collect_statistics(model, config, calibration=[inputs | each]) for each in head)
    # what comes behind them is not seen by those before, and no gradient comes from there
    for name, matrix in short.output_grams.items():
        assert (long.output_grams[name] - matrix).norm() < 1e-3 * matrix.norm(), name
