import importlib
import json
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import EOS_ID, VOCAB_SIZE, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, tiny_tokenizer
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM

from hf_blr.evaluation import perplexity
from hf_blr.evaluation.perplexity import negative_log_likelihood
from hf_blr.linear import BLRLinear
from hf_blr.structures import make_spec


def token_ids(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def tiny_masked():
    return BertForMaskedLM(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=257))


def tiny_bart():
    # makes up what its decoder reads from the tokens
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 257}
    return BartForConditionalGeneration(BartConfig(**sizes, encoder_attention_heads=2, decoder_attention_heads=2))


def token_nll(model, ids, position, context):
    """-log p(ids[position]) given the `context` tokens before it, one forward for this token alone."""
    logits = model(input_ids=ids[position - context : position][None]).logits[0, -1]
    return F.cross_entropy(logits.double(), ids[position]).item()


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def test_it_is_what_transformers_own_loss_gives_window_by_window(model):
    ids = token_ids(150)
    result = perplexity(model, None, ids, seqlen=32)
    windows = ids[:128].view(4, 32)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert result.ppl == pytest.approx(math.exp(sum(losses) / 4), rel=1e-6)
    assert (result.n_windows, result.n_tokens, result.dropped_tokens) == (4, 4 * 31, 22)
    assert (result.seqlen, result.stride, result.dtype) == (32, 32, "float32")


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity():
    model = tiny_llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, None, token_ids(64), seqlen=16).ppl == pytest.approx(VOCAB_SIZE, rel=1e-6)


@pytest.mark.parametrize(
    ("length", "stride"),
    [(50, 4), (50, 5), (49, 16), (50, 15), (13, 4), (2, 4)],
    ids=lambda value: str(value),
)
def test_a_sliding_window_scores_each_token_once_with_the_context_it_says(model, length, stride):
    ids, seqlen = token_ids(length), 17
    result = perplexity(model, None, ids, seqlen=seqlen, stride=stride, batch_size=2)
    expected = 0.0
    for position in range(1, length):
        # the first window that holds the position
        begin = 0
        while begin + seqlen <= position:
            begin += stride
        expected += token_nll(model, ids, position, position - begin)
    assert result.nll_sum == pytest.approx(expected, rel=1e-6)
    assert result.n_tokens == length - 1 and result.dropped_tokens == 0


def test_stride_one_gives_every_token_all_the_context_there_is(model):
    ids = token_ids(24)
    expected = sum(token_nll(model, ids, position, min(position, 7)) for position in range(1, 24))
    assert perplexity(model, None, ids, seqlen=8, stride=1).nll_sum == pytest.approx(expected, rel=1e-6)


def test_stride_of_a_whole_window_is_the_default(model):
    ids = token_ids(100)
    default, whole = (perplexity(model, None, ids, seqlen=16, stride=stride) for stride in (None, 16))
    assert whole.nll_sum == default.nll_sum and whole.n_tokens == default.n_tokens


def test_batch_size_does_not_change_the_number(model):
    ids = token_ids(100)
    one, three = (perplexity(model, None, ids, seqlen=12, stride=9, batch_size=b) for b in (1, 3))
    assert one.nll_sum == pytest.approx(three.nll_sum, rel=1e-6)
    assert one.n_tokens == three.n_tokens


def test_max_windows_scores_the_first_windows_and_counts_the_rest_as_dropped(model):
    ids = token_ids(100)
    first = perplexity(model, None, ids, seqlen=16, max_windows=2)
    assert first.nll_sum == pytest.approx(perplexity(model, None, ids[:32], seqlen=16).nll_sum, rel=1e-6)
    assert (first.n_windows, first.dropped_tokens) == (2, 68)


def test_logits_are_scored_in_chunks_of_rows_as_if_at_once(monkeypatch):
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    targets = token_ids(50) % 40
    at_once = negative_log_likelihood(logits, targets)
    # as an attribute of the package, the function hides the module of the same name
    module = importlib.import_module("hf_blr.evaluation.perplexity")
    monkeypatch.setattr(module, "LOGITS_PER_CHUNK", 7 * 40)
    assert negative_log_likelihood(logits, targets) == pytest.approx(at_once, rel=1e-7)
    assert at_once == pytest.approx(F.cross_entropy(logits.double(), targets, reduction="sum").item(), rel=1e-6)


def test_text_lists_and_files_go_through_the_tokenizer(model, tmp_path):
    tokenizer, text = tiny_tokenizer(), "one line\nand another, long enough for a window or two"
    (tmp_path / "t.txt").write_text(text)
    expected = perplexity(model, None, torch.tensor(tokenizer(text)["input_ids"])[None], seqlen=16)
    for dataset in (text, [text], str(tmp_path / "t.txt")):
        assert perplexity(model, tokenizer, dataset, seqlen=16).nll_sum == expected.nll_sum
    parts = text.split("\n", 1)
    joined = perplexity(model, tokenizer, parts, seqlen=16)
    assert joined.nll_sum == perplexity(model, tokenizer, "\n\n".join(parts), seqlen=16).nll_sum


def test_a_named_dataset_is_scored_on_its_test_split(model):
    result = perplexity(model, tiny_tokenizer(), "builtin", seqlen=32, max_windows=2)
    assert result.n_tokens == 62 and 40_000 < result.dropped_tokens < 70_000
    assert "of builtin (test)" in result.protocol


def test_the_protocol_says_how_the_number_was_counted(model):
    ids = token_ids(40)
    whole = perplexity(model, None, ids, seqlen=16).protocol
    assert "<40 token ids>" in whole and "30 tokens scored in 2 windows of 16 without overlap" in whole
    assert "8 tokens dropped" in whole and "no BOS" in whole and "float32" in whole
    ids[0] = EOS_ID
    sliding = perplexity(model, tiny_tokenizer(), ids, seqlen=16, stride=4).protocol
    assert "every 4 tokens" in sliding and "BOS at the start" in sliding


def test_the_dictionary_is_json_and_holds_every_number(model):
    result = perplexity(model, None, token_ids(40), seqlen=16)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["ppl"] == result.ppl and data["protocol"] == result.protocol
    assert data["tokens_per_second"] == pytest.approx(data["n_tokens"] / data["seconds"])


def test_non_finite_logits_show_in_the_number():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[0] = math.inf
    assert not math.isfinite(perplexity(model, None, token_ids(64), seqlen=16).ppl)
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert math.isnan(perplexity(model, None, token_ids(64), seqlen=16).ppl)


def test_a_loss_beyond_exp_is_infinite_and_no_error():
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e6)
    assert perplexity(model, None, token_ids(64), seqlen=16).ppl == math.inf


def test_the_model_keeps_its_mode_and_dropout_is_off_meanwhile():
    model = tiny_gpt2(resid_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    ids = token_ids(64)
    assert perplexity(model, None, ids, seqlen=16).nll_sum == perplexity(model, None, ids, seqlen=16).nll_sum
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="Boom"):
        model.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("Boom")))
        perplexity(model, None, ids, seqlen=16)
    assert [module.training for module in model.modules()] == modes


def test_a_compressed_model_goes_through_the_same_lines():
    dense, compressed = tiny_llama(), tiny_llama()
    module = BLRLinear.from_spec(make_spec("blast", 64, 96, ratio=0.5), bias=False)
    compressed.model.layers[0].mlp.up_proj = module
    with torch.no_grad():
        dense.model.layers[0].mlp.up_proj.weight.copy_(module.weight)
    ids = token_ids(64)
    exact = perplexity(dense, None, ids, seqlen=16).ppl
    assert perplexity(compressed, None, ids, seqlen=16).ppl == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("build", [tiny_bert, tiny_masked, tiny_t5, tiny_bart])
def test_models_that_predict_no_next_token_have_no_perplexity(build):
    # a masked language model gives a row of logits for each token, but sees the token that it is asked for
    model = build()
    with pytest.raises(TypeError, match=f"{type(model).__name__} is no causal language model"):
        perplexity(model, None, token_ids(32), seqlen=16)


def test_names_in_the_place_of_a_model_and_a_tokenizer_are_refused(model):
    with pytest.raises(TypeError, match="takes a loaded model first, got a str: give AutoModelForCausalLM"):
        perplexity("name", tiny_tokenizer(), ["text"])
    with pytest.raises(TypeError, match="got a str: give AutoTokenizer.from_pretrained"):
        perplexity(model, "name", ["text"], seqlen=16)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"seqlen": 1}, "seqlen must be at least 2"),
        ({"seqlen": 256}, "beyond the 128 positions of LlamaForCausalLM; use seqlen=128"),
        ({"stride": 0}, "stride must be between 1 and seqlen=16, got 0"),
        ({"stride": 17}, "got 17"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"max_windows": 0}, "max_windows must be at least 1"),
        ({"dataset": token_ids(9)}, "the text has 9 tokens.*seqlen of at most 9"),
        ({"dataset": token_ids(1), "stride": 4}, "at least 2 are needed"),
        ({"dataset": token_ids(16).view(2, 8)}, r"shape \[T\] or \[1, T\], got torch.int64 of \[2, 8\]"),
        ({"dataset": torch.rand(32)}, "must be integers"),
        ({"dataset": torch.full((32,), 300)}, "token id 300 is beyond the vocabulary of 257"),
        ({"dataset": ["text"]}, "a tokenizer is needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_work(model, kwargs, match):
    with pytest.raises(ValueError, match=match):
        perplexity(model, None, **{"dataset": token_ids(64), "seqlen": 16, **kwargs})
