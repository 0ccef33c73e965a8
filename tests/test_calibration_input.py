"""What callers give to calibrate with: batches in every plausible form, datasets, and how long windows may be."""

import pytest
import torch
from tiny import build, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer
from transformers import LlamaForCausalLM, MPNetConfig, MPNetForMaskedLM, RobertaConfig, RobertaForMaskedLM

from hf_blr import BLRConfig, collect_statistics, compress
from hf_blr.calibration.batches import calibration_batches
from hf_blr.calibration.given import given_batches
from hf_blr.linear import blr_modules
from hf_blr.text import load_text

IDS = torch.arange(16)

REFUSED = {
    "ids [T]": ([IDS[None], IDS], ValueError, r"batch 1 holds token ids of shape \[16\]: give ids\[None\]"),
    "dict of [T]": ([{"input_ids": IDS}], ValueError, r"batch 0 holds token ids of shape \[16\]"),
    "one tensor [N, T]": (IDS.view(4, 4), ValueError, r"got one tensor of shape \[4, 4\]: give a list of it, \[ids\]"),
    "one dict": ({"input_ids": IDS[None]}, TypeError, r"got one dict: give a list of it, \[batch\]"),
    "floats": ([torch.rand(2, 3)], ValueError, "batch 0 holds numbers of torch.float32.*names the argument"),
    "lists": ([{"input_ids": [1, 2, 3]}], TypeError, "batch 0 holds 'input_ids' as a list: give a tensor.*return_tens"),
    "list of lists": ([[1, 2, 3]], TypeError, r"batch 0 is a list: give torch.tensor\(ids\), of shape \[B, T\]"),
    "strings": (["some text", "another"], TypeError, r"batch 0 is a string: give text as BLRConfig\(dataset="),
    "string": ("some text", TypeError, r"got a string: give text as BLRConfig\(dataset="),
    "number": (3, TypeError, "got a int: give a list of batches"),
    "nothing": ([], ValueError, "holds no batch; give at least one"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("run", [compress, collect_statistics])
def test_what_are_no_batches_is_refused_with_what_to_do(case, run):
    given, error, message = REFUSED[case]
    model = tiny_llama()
    with pytest.raises(error, match=message) as raised:
        run(model, BLRConfig("low_rank", ratio=0.6), calibration=given)
    assert "\n" not in str(raised.value)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


NO_MODEL = "got a str: load it first, or compress it while it loads with from_pretrained"


@pytest.mark.parametrize("run", [compress, collect_statistics])
@pytest.mark.parametrize(
    "given, message",
    [
        (("name", BLRConfig("low_rank", ratio=0.6)), NO_MODEL),
        ((LlamaForCausalLM, BLRConfig("low_rank", ratio=0.6)), "got the class LlamaForCausalLM"),
        ((tiny_llama(), {"ratio": 0.6}), r"must be a BLRConfig, got a dict: give BLRConfig\(\*\*config\)"),
        ((tiny_llama(), tiny_tokenizer()), "must be a BLRConfig, got a"),
    ],
)
def test_arguments_of_another_kind_are_refused_with_what_to_do(run, given, message):
    with pytest.raises(TypeError, match=message):
        run(*given)


@pytest.mark.parametrize("run", [compress, collect_statistics])
def test_the_name_of_a_tokenizer_is_refused(run):
    with pytest.raises(TypeError, match="got a str: give AutoTokenizer.from_pretrained"):
        run(tiny_llama(), BLRConfig("low_rank", ratio=0.6, dataset=["text " * 99]), tokenizer="name")


def test_what_are_batches_is_taken():
    from transformers import BatchEncoding

    ids = IDS.view(2, 8)
    forms = [[ids], (ids,), iter([ids]), [{"input_ids": ids}], [BatchEncoding({"input_ids": ids})], ids[None]]
    for given in forms:
        (batch,) = given_batches(given)
        assert type(batch) is dict and torch.equal(batch["input_ids"], ids)
    (images,) = given_batches([{"pixel_values": torch.rand(2, 3, 4, 4)}])
    assert images["pixel_values"].shape == (2, 3, 4, 4)


@pytest.mark.parametrize("text", ["This is my calibration text. " * 20, "two\nlines", "zero\0byte"])
def test_text_in_place_of_a_list_is_refused(text):
    with pytest.raises(
        ValueError, match=r"neither the name of a dataset.* given as a list of strings, \[text\]"
    ) as raised:
        load_text(text, "train")
    assert len(str(raised.value)) < 300


def test_a_config_with_a_stream_has_a_repr():
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()
    assert "<IterableDataset>" in repr(BLRConfig(ratio=0.5, dataset=stream))


SIZES = {"vocab_size": 257, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "pad_token_id": 1}


def tiny_roberta():
    return build(RobertaForMaskedLM, RobertaConfig(**SIZES, num_attention_heads=4, max_position_embeddings=66))


def tiny_mpnet():
    return build(MPNetForMaskedLM, MPNetConfig(**SIZES, num_attention_heads=4, max_position_embeddings=66))


WINDOWS = {
    "config": (tiny_llama, 10**30, 40, 40),
    "positions": (tiny_llama, 10**30, 2048, 128),
    "other name": (tiny_gpt2, 10**30, 2048, 128),
    "bert": (tiny_bert, 10**30, 2048, 64),
    "roberta": (tiny_roberta, 10**30, 2048, 64),
    "mpnet": (tiny_mpnet, 10**30, 2048, 64),
    "tokenizer": (tiny_llama, 100, 2048, 100),
    "no limit": (lambda: tiny_llama(max_position_embeddings=4096), 10**30, 200, 200),
    "-1 for none": (lambda: tiny_llama(max_position_embeddings=4096), -1, 200, 200),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_windows_are_as_long_as_model_and_tokenizer_take(case):
    make, longest, seqlen, expected = WINDOWS[case]
    model, tokenizer = make(), tiny_tokenizer()
    tokenizer.model_max_length = longest
    config = BLRConfig("low_rank", ratio=0.6, dataset=["some words " * 200], seqlen=seqlen, num_samples=4)
    batches, _ = calibration_batches(model, config, tokenizer, None)
    assert {batch["input_ids"].shape[1] for batch in batches} == {expected}
    with torch.no_grad():
        model(**batches[0])


def test_a_block_that_overflows_is_named_before_anything_is_replaced():
    model = tiny_llama().half()
    with torch.no_grad():
        # a massive activation, as float16 runs of models trained in bfloat16 have them
        model.model.layers[1].mlp.up_proj.weight.mul_(6000)
        model.model.layers[1].mlp.gate_proj.weight.mul_(6000)
    ids = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match=r"model\.layers\.1 puts out NaN or infinity.*float16; load the model in bfloat16"
    ):
        compress(model, BLRConfig("low_rank", ratio=0.6, fisher=False), calibration=[ids], progress=False)
    assert not blr_modules(model)
