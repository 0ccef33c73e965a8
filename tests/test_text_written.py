"""Text that a model writes: exact samples, reproducible, spread over beginnings, and in nobody's way."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tiny import EOS_ID, tiny_bert, tiny_gpt2, tiny_llama, tiny_llava, tiny_qwen3, tiny_t5, tiny_tokenizer
from torch import nn

from hf_blr.inference import replayed
from hf_blr.text import can_write, openings, write_windows
from hf_blr.text import written as module
from hf_blr.text.draws import Codes, Draws, drawn

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}<|end|>{% endfor %}"


def bigram_model(letters=12):
    """A Llama without attention: what follows depends on the last token alone."""
    model = tiny_llama(vocab_size=letters, bos_token_id=0, eos_token_id=1, pad_token_id=0, initializer_range=0.3)
    for layer in model.model.layers:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
    return model


class Tokenless:
    """A tokenizer without special tokens: the model's config has to name them."""


@torch.no_grad()
def transitions(model):
    """P(next | last), `[V, V]`."""
    return model(torch.arange(model.config.vocab_size)[:, None]).logits[:, 0].softmax(-1)


def test_the_same_seed_writes_the_same_and_another_one_does_not(capsys):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    first = write_windows(model, tokenizer, 6, 40, seed=3, progress=False)
    assert first.shape == (6, 40) and first.dtype == torch.int64 and first.device.type == "cpu"
    assert (first[:, 0] == EOS_ID).all()
    assert capsys.readouterr().err == ""
    assert torch.equal(first, write_windows(model, tokenizer, 6, 40, seed=3))
    assert "writing text" in capsys.readouterr().err
    other = write_windows(model, tokenizer, 6, 40, seed=4, progress=False)
    assert (first[:, 1:] != other[:, 1:]).float().mean() > 0.9


def test_every_token_follows_the_models_distribution():
    model, windows, length = bigram_model(), 64, 128
    expected = transitions(model)
    ids = write_windows(model, Tokenless(), windows, length, progress=False)
    # without the first token of each window, which is stratified
    last, following = ids[:, 1:-1].flatten(), ids[:, 2:].flatten()
    counts = torch.zeros_like(expected).index_put_((last, following), torch.tensor(1.0), accumulate=True)
    wanted = counts.sum(1, keepdim=True) * expected
    common = wanted > 5
    assert common.sum() > 60
    squares = ((counts - wanted).square() / wanted)[common].sum()
    freedom = int(common.sum())
    # four standard deviations above the mean of chi-square; greedy text, a temperature or top-k are far beyond
    assert squares < freedom + 4 * (2 * freedom) ** 0.5


def test_each_beginning_comes_as_often_as_its_probability_says():
    model, windows = bigram_model(), 300
    after_start = transitions(model)[0]
    ids = write_windows(model, Tokenless(), windows, 3, seed=1, progress=False)
    counts = torch.bincount(ids[:, 1], minlength=len(after_start))
    assert ((counts - windows * after_start).abs() < 1.0001).all()
    # carried on: rows with one beginning share no more of the next token than they must
    pairs = after_start[:, None] * transitions(model)
    counted = torch.zeros_like(pairs).index_put_((ids[:, 1], ids[:, 2]), torch.tensor(1.0), accumulate=True)
    assert ((counted - windows * pairs).abs()[pairs > 2 / windows] < 1.0001).all()
    # and in no order, so that a part of them is spread too
    assert not (ids[1:, 1] >= ids[:-1, 1]).all()


def test_the_end_of_a_document_does_not_end_the_window():
    ids = write_windows(bigram_model(), Tokenless(), 16, 64, progress=False)
    assert (ids[:, 1:] == 1).sum() > 16
    after = ids[:, 1:][ids[:, :-1] == 1]
    assert len(after.unique()) > 4


def test_settings_and_state_of_the_model_are_neither_used_nor_changed():
    # it has dropout
    model, tokenizer = tiny_gpt2(), tiny_tokenizer()
    plain = write_windows(model, tokenizer, 4, 32, progress=False)
    config = model.generation_config
    config.temperature, config.top_k, config.repetition_penalty, config.max_new_tokens = 0.1, 2, 3.0, 5
    config.do_sample, config.bad_words_ids = True, [[int(plain[0, 1])]]
    kept, state = copy.deepcopy(config), torch.get_rng_state()
    model.train()
    model.transformer.h[0].eval()
    assert torch.equal(write_windows(model, tokenizer, 4, 32, progress=False), plain)
    assert model.generation_config is config and config.to_dict() == kept.to_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and not model.transformer.h[0].training
    torch.manual_seed(99)
    assert torch.equal(write_windows(model, tokenizer, 4, 32, progress=False), plain)


def test_batches_change_nothing(monkeypatch):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    at_once = write_windows(model, tokenizer, 7, 24, progress=False)
    sizes = []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda ids, **kw: sizes.append(len(ids)) or generate(ids, **kw))
    # keys and values of two blocks with two heads of 16 in float32, and a row of logits
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * (2 * 2 * 2 * 16 * 4 * 24 + 24 * 257))
    assert torch.equal(write_windows(model, tokenizer, 7, 24, progress=False), at_once)
    assert sizes == [3, 3, 1]


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_qwen3, tiny_llava], ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_of_every_kind_and_dtype_write(make, dtype):
    ids = write_windows(make().to(dtype), tiny_tokenizer(), 3, 20, progress=False)
    assert ids.shape == (3, 20) and ids.max() <= EOS_ID and len(ids.unique()) > 20


@pytest.mark.parametrize("make", [tiny_bert, tiny_t5, lambda: nn.Linear(2, 2)], ids=["bert", "t5", "module"])
def test_what_cannot_write_is_refused_by_name(make):
    model = make()
    assert not can_write(model)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} cannot write text.*\"builtin\""):
        write_windows(model, tiny_tokenizer(), 2, 8)


def test_a_chat_begins_with_the_users_turn_and_needs_a_template():
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with pytest.raises(ValueError, match='begins with the chat template.* has none: take "self"'):
        write_windows(model, tokenizer, 2, 32, chat=True)
    tokenizer.chat_template = TEMPLATE
    opening = tokenizer("[user]")["input_ids"]
    ids = write_windows(model, tokenizer, 4, 32, chat=True, progress=False)
    assert ids.shape == (4, 32) and (ids[:, : len(opening)] == torch.tensor(opening)).all()
    assert len(ids[:, len(opening)].unique()) == 4
    with pytest.raises(ValueError, match="more than the 6 tokens that a window begins with, got 4 and 6"):
        write_windows(model, tokenizer, 4, 6, chat=True)


def test_windows_go_on_from_beginnings_that_take_turns():
    model, pieces, windows = bigram_model(), torch.tensor([[3, 5, 2], [7, 4, 9]]), 600
    ids = write_windows(model, Tokenless(), windows, 5, seed=1, beginnings=pieces, progress=False)
    assert ids.shape == (windows, 5) and torch.equal(ids[:, :3], pieces.repeat(windows // 2, 1))
    # what follows depends on the piece, as the model says
    for piece in range(2):
        counts = torch.bincount(ids[piece::2, 3], minlength=12)
        expected = windows / 2 * transitions(model)[pieces[piece, -1]]
        assert ((counts - expected).abs() < 4 * expected.clamp_min(1).sqrt()).all()
    assert torch.equal(ids, write_windows(model, Tokenless(), windows, 5, seed=1, beginnings=pieces, progress=False))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"beginnings": torch.zeros(2, 0, dtype=torch.long)}, "token ids .m, b., int64, got torch.int64 of .2, 0."),
        ({"beginnings": torch.zeros(3, dtype=torch.long)}, "token ids .m, b., int64, got torch.int64 of .3."),
        ({"beginnings": torch.zeros(1, 3)}, "token ids .m, b., int64, got torch.float32 of .1, 3."),
        ({"beginnings": torch.full((1, 3), 999)}, "token id 999 is beyond the vocabulary"),
        ({"beginnings": torch.zeros(1, 8, dtype=torch.long)}, "more than the 8 tokens that a window begins with"),
        ({"beginnings": torch.zeros(1, 3, dtype=torch.long), "chat": True}, "not with both: leave one out"),
    ],
    ids=["none", "row", "float", "vocabulary", "length", "chat"],
)
def test_beginnings_that_cannot_be_gone_on_from_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        write_windows(tiny_llama(), tiny_tokenizer(), 2, 8, progress=False, **given)


def test_the_first_token_is_the_tokenizers_then_the_configs_beginning_then_an_end():
    model, tokenizer = tiny_llama(bos_token_id=7, eos_token_id=[9, 8]), tiny_tokenizer()
    assert openings.first_token(model, tokenizer) == EOS_ID
    assert openings.first_token(model, Tokenless()) == 7
    model.config.bos_token_id = None
    assert openings.first_token(model, Tokenless()) == 9
    model.config.eos_token_id = None
    with pytest.raises(ValueError, match="neither Tokenless nor the config of Llama.*set tokenizer.bos_token"):
        openings.first_token(model, Tokenless())


def test_logits_that_are_not_finite_are_reported():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(ValueError, match="logits that are not finite; load it in bfloat16"):
        write_windows(model, tiny_tokenizer(), 2, 8, progress=False)


def test_rows_that_are_alone_draw_by_noise():
    codes = Codes(4, 2, seed=0)
    draws = Draws(codes, torch.arange(4), torch.device("cpu"))
    uniform = torch.zeros(4, 4)
    first = draws(None, uniform).argmax(-1)
    # a quarter each: every row has a token of its own, and is alone from then on
    assert first.sort().values.tolist() == [0, 1, 2, 3] and torch.equal(draws.width, torch.full((4,), 0.25).double())
    second = draws(None, uniform).argmax(-1)
    assert torch.equal(second, (codes.noise[:, 1] * 4).long())


def test_what_has_no_probability_is_never_drawn():
    draws = Draws(Codes(2, 1, seed=0), torch.arange(2), torch.device("cpu"))
    # the ends of the unit interval, which are drawn once in 2^53 times
    draws.codes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    scores = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).repeat(2, 1)
    assert draws(None, scores).argmax(-1).tolist() == [1, 2]
    # in the first of many chunks of a large vocabulary, and behind its last token
    scores = torch.full((2, 1000), -torch.inf)
    scores[:, [5, 600]] = 0.0
    draws = Draws(Codes(2, 1, seed=0), torch.arange(2), torch.device("cpu"))
    draws.codes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draws(None, scores).argmax(-1).tolist() == [5, 600]


@pytest.mark.parametrize("vocabulary", [12, 256, 257, 1000])
def test_chunks_find_the_token_that_a_sum_over_all_of_them_finds(vocabulary):
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(64, vocabulary, generator=generator) * 4).softmax(-1)
    points = torch.rand(64, 1, generator=generator, dtype=torch.float64)
    tokens, lower, upper = drawn(probabilities, points)
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    sums = torch.cat([torch.zeros(64, 1), sums / sums[:, -1:]], -1)
    assert torch.equal(tokens, torch.searchsorted(sums[:, 1:].contiguous(), points, right=True))
    torch.testing.assert_close((lower, upper), (sums.gather(-1, tokens), sums.gather(-1, tokens + 1)))
    assert (lower <= points).all() and (points < upper).all()


def test_windows_longer_than_the_models_positions_are_refused():
    with pytest.raises(ValueError, match="seqlen=129 is beyond the 128 positions of GPT2LMHeadModel"):
        write_windows(tiny_gpt2(), tiny_tokenizer(), 1, 129)
    assert write_windows(tiny_gpt2(), tiny_tokenizer(), 1, 128, progress=False).shape == (1, 128)


@pytest.mark.parametrize("rows", [5, 2])
def test_replayed_steps_write_the_same_text(monkeypatch, rows):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    plain = write_windows(model, tokenizer, 5, 24, seed=2, progress=False)
    before, calls = set(vars(model)), []
    monkeypatch.setattr(module, "can_replay", lambda model: True)
    monkeypatch.setattr(module, "rows_at_once", lambda model, seqlen: rows)
    step = replayed.StepGraph.__call__
    monkeypatch.setattr(replayed.StepGraph, "__call__", lambda self, **given: calls.append(1) or step(self, **given))
    assert torch.equal(write_windows(model, tokenizer, 5, 24, seed=2, progress=False), plain)
    # all tokens but what a window begins with and the one that the first forward says
    assert len(calls) == 22 * -(-5 // rows)
    assert set(vars(model)) == before
    # a large cache is not attended to as a whole in each step
    monkeypatch.setattr(module, "REPLAYED_BYTES", rows * module.cache_bytes(model, 24) - 1)
    write_windows(model, tokenizer, rows, 24, progress=False)
    assert len(calls) == 22 * -(-5 // rows)


@pytest.mark.parametrize(
    "devices, changes, can",
    [
        (["cuda:0"], {}, True),
        (["cpu"], {}, False),
        (["cuda:0", "cuda:1"], {}, False),
        (["cuda:0"], {"_can_compile_fullgraph": False}, False),
        (["cuda:0"], {"layer_types": ["sliding_attention", "full_attention"]}, False),
        (["cuda:0"], {"sliding_window": 8}, False),
    ],
)
def test_models_on_one_gpu_that_ask_the_host_nothing_are_replayed(devices, changes, can):
    config = SimpleNamespace(**changes)
    config.get_text_config = lambda: config
    model = SimpleNamespace(config=config, _can_compile_fullgraph=True)
    vars(model).update(changes)
    model.parameters = lambda: [SimpleNamespace(device=torch.device(device)) for device in devices]
    assert replayed.can_replay(model) is can
