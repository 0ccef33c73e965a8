"""What a compression cost on text that no fit saw."""

import copy
import random

import pytest
import torch
from tiny import tiny_bert, tiny_inputs, tiny_llama, tiny_tokenizer, tiny_vit

from hf_blr import BLRConfig, compress
from hf_blr.calibration import held_out
from hf_blr.calibration.batches import calibration_batches, set_apart
from hf_blr.calibration.held_out import HeldOut

TEXT = ["".join(random.Random(0).choices("abcdefghij ", k=3000))]
CONFIG = BLRConfig("low_rank", ratio=0.5, dataset=TEXT, seqlen=32, num_samples=32)


def test_one_window_of_seventeen_is_held_out():
    windows = torch.arange(68)[:, None].expand(68, 4)
    fitted, apart = set_apart(windows, 64)
    assert len(fitted) == 64 and apart[:, 0].tolist() == [0, 17, 34, 51]
    assert sorted(torch.cat([fitted, apart])[:, 0].tolist()) == list(range(68))
    # too few to spare one, and never more than were asked for
    assert [len(part) for part in set_apart(windows[:16], 64)] == [16, 0]
    assert [len(part) for part in set_apart(windows, 10)] == [10, 4]


def test_fits_do_not_see_what_is_held_out():
    fitted, apart = calibration_batches(tiny_llama(), CONFIG, tiny_tokenizer(), None)
    seen = {tuple(row.tolist()) for batch in fitted for row in batch["input_ids"]}
    kept = [tuple(batch["input_ids"][0].tolist()) for batch in apart]
    assert sum(len(batch["input_ids"]) for batch in fitted) == 32 and len(kept) == 2 and seen.isdisjoint(kept)


def test_the_report_says_the_divergence_from_the_dense_model():
    model = tiny_llama()
    dense = copy.deepcopy(model)
    report = compress(model, CONFIG, tokenizer=tiny_tokenizer(), progress=False)
    _, apart = calibration_batches(dense, CONFIG, tiny_tokenizer(), None)
    ids = torch.cat([batch["input_ids"] for batch in apart])
    with torch.no_grad():
        p, q = (m(ids).logits.double().log_softmax(-1) for m in (dense, model))
    expected = (p.exp() * (p - q)).sum(-1).mean().item()
    assert report.held_out_tokens == ids.numel() and report.divergence == pytest.approx(expected, rel=0.01)
    assert expected > 1e-3 and f"{report.divergence:.4f} nats a token" in str(report)
    assert report.to_dict()["divergence"] == report.divergence


def test_the_dense_model_is_no_way_from_itself():
    model = tiny_llama()
    batches = [{"input_ids": torch.randint(0, 256, (1, 32))} for _ in range(3)]
    kept = HeldOut(model, batches)
    assert kept.tokens == 96 and abs(kept.divergence(model)) < 1e-3


def test_what_is_kept_is_bounded(monkeypatch):
    batches = [{"input_ids": torch.randint(0, 256, (1, 32))} for _ in range(4)]
    monkeypatch.setattr(held_out, "MOST_TOKENS", 70)
    assert HeldOut(tiny_llama(), batches).tokens == 64
    monkeypatch.setattr(held_out, "MOST_BYTES", 2 * 40 * tiny_llama().config.vocab_size)
    assert HeldOut(tiny_llama(), batches).tokens == 32


@pytest.mark.parametrize("build", [tiny_bert, tiny_vit])
def test_the_callers_own_batches_are_all_fitted_to(build):
    model = build()
    report = compress(model, BLRConfig("low_rank", ratio=0.6), calibration=[tiny_inputs(model)], progress=False)
    assert report.divergence is None and report.held_out_tokens == 0 and "nats" not in str(report)
