"""`blr_config=`: one keyword for every `from_pretrained`, switched on and off."""

import copy
import inspect

import pytest
import torch
from tiny import tiny_llama, tiny_logits, tiny_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel, pipeline

from hf_blr import integration
from hf_blr.compression import compress
from hf_blr.config import BLRConfig
from hf_blr.integration import blr_modules

integration.register()

CONFIG = BLRConfig("low_rank", rank=6)
TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "Pack my box with five dozen liquor jugs. " * 20,
]
CALIBRATED = BLRConfig("low_rank", rank=6, dataset=TEXTS, num_samples=4, seqlen=32)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense checkpoint with a tokenizer beside it."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def bare(tmp_path):
    """A dense checkpoint without a tokenizer."""
    tiny_llama().save_pretrained(tmp_path)
    return tmp_path


def test_on_off_on():
    wrapped = PreTrainedModel.__dict__["from_pretrained"]
    integration.enable()
    assert PreTrainedModel.__dict__["from_pretrained"] is wrapped
    integration.disable()
    original = PreTrainedModel.__dict__["from_pretrained"]
    assert original is wrapped.__func__.hf_blr_original
    assert inspect.signature(wrapped.__func__) == inspect.signature(original.__func__)
    integration.disable()
    assert PreTrainedModel.__dict__["from_pretrained"] is original
    integration.enable()
    assert PreTrainedModel.__dict__["from_pretrained"].__func__.hf_blr_original is original


def test_wrapper_of_another_package_survives(dense, monkeypatch):
    ours = PreTrainedModel.__dict__["from_pretrained"]

    def theirs(cls, *args, **kwargs):
        return ours.__func__(cls, *args, **kwargs)

    theirs.__dict__.update(ours.__func__.__dict__)
    method = classmethod(theirs)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", method)
    integration.disable()
    try:
        assert PreTrainedModel.__dict__["from_pretrained"] is method
        assert not blr_modules(LlamaForCausalLM.from_pretrained(dense))
        with pytest.raises(TypeError, match="blr_config"):
            LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG)
    finally:
        integration.enable()
    assert blr_modules(LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG))


def test_every_door(dense):
    reference = tiny_logits(LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG))

    class Mine(LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return super().from_pretrained(*args, **kwargs)

    as_dict = {"structure": "low_rank", "rank": 6}
    doors = {
        "auto": AutoModelForCausalLM.from_pretrained(dense, blr_config=CONFIG),
        "subclass": Mine.from_pretrained(dense, blr_config=CONFIG),
        "dict": LlamaForCausalLM.from_pretrained(dense, blr_config=as_dict),
        "explicit None": LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG, quantization_config=None),
        "quantization_config": LlamaForCausalLM.from_pretrained(dense, quantization_config=CONFIG),
        "quantization_config dict": LlamaForCausalLM.from_pretrained(
            dense, quantization_config={**as_dict, "quant_method": "hf_blr"}
        ),
        "path by keyword": LlamaForCausalLM.from_pretrained(pretrained_model_name_or_path=dense, blr_config=CONFIG),
    }
    for door, model in doors.items():
        assert torch.equal(tiny_logits(model), reference), door
    piped = pipeline("text-generation", model=str(dense), model_kwargs={"blr_config": CONFIG})
    assert torch.equal(tiny_logits(piped.model), reference)


def test_both_keywords(dense):
    with pytest.raises(ValueError, match="blr_config and quantization_config"):
        LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG, quantization_config=CONFIG)
    with pytest.raises(TypeError, match="blr_config must be a BLRConfig or a dict.*int"):
        AutoModel.from_pretrained(dense, blr_config=3)


def test_the_callers_config_is_not_changed(dense):
    config = copy.deepcopy(CONFIG)
    first = LlamaForCausalLM.from_pretrained(dense, blr_config=config)
    assert config == CONFIG
    assert config.layers is None
    assert len(first.config.quantization_config.layers) == 14


def test_without_the_keyword_nothing_changes(dense):
    model, info = LlamaForCausalLM.from_pretrained(dense, output_loading_info=True)
    assert not blr_modules(model)
    assert torch.equal(tiny_logits(model), tiny_logits(tiny_llama()))
    assert not info["missing_keys"]


def test_calibrated_fit(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, blr_config=CALIBRATED)
    by_hand = LlamaForCausalLM.from_pretrained(dense)
    compress(by_hand, CALIBRATED, tokenizer=tiny_tokenizer(), progress=False)
    assert torch.equal(tiny_logits(model), tiny_logits(by_hand))
    assert not torch.equal(tiny_logits(model), tiny_logits(AutoModel.from_pretrained(dense, blr_config=CONFIG)))
    assert model.config.quantization_config.dataset == "<list of 2 texts>"


def test_calibrated_fit_with_the_callers_tokenizer(bare):
    with pytest.raises(ValueError, match="token"):
        AutoModelForCausalLM.from_pretrained(bare, blr_config=CALIBRATED)
    loaded = AutoModelForCausalLM.from_pretrained(
        bare, blr_config=CALIBRATED, tokenizer=tiny_tokenizer(), output_loading_info=True
    )
    model, info = loaded
    assert len(blr_modules(model)) == 14
    assert not info["missing_keys"]


def test_calibrated_fit_needs_the_wrapper(dense):
    integration.disable()
    try:
        with pytest.raises(ValueError, match=r"hf_blr\.enable\(\)"):
            LlamaForCausalLM.from_pretrained(dense, quantization_config=CALIBRATED)
        streamed = LlamaForCausalLM.from_pretrained(dense, quantization_config=CONFIG)
        assert len(blr_modules(streamed)) == 14
    finally:
        integration.enable()


def test_a_compressed_checkpoint_is_not_fitted_again(dense, tmp_path, monkeypatch):
    model = LlamaForCausalLM.from_pretrained(dense, blr_config=CONFIG)
    model.save_pretrained(tmp_path)

    def fit(*args, **kwargs):
        raise RuntimeError("nothing may be fitted")

    monkeypatch.setattr("hf_blr.integration.streaming.factorize", fit)
    monkeypatch.setattr("hf_blr.compression.replace.factorize", fit)
    other = copy.deepcopy(CALIBRATED)
    other.rank = 2
    for model_class in (LlamaForCausalLM, AutoModelForCausalLM):
        with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
            loaded = model_class.from_pretrained(tmp_path, blr_config=other)
        assert torch.equal(tiny_logits(loaded), tiny_logits(model))
