"""Models inside wrappers and parts of models: what is saved afterwards loads, whichever of them it is."""

import sys
import threading

import pytest
import torch
from tiny import build, tiny_bert, tiny_gpt2, tiny_inputs, tiny_llama, tiny_logits, tiny_t5
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_blr import BLRConfig, collect_statistics, compress, to_dense
from hf_blr.checkpoint.record import live_models
from hf_blr.linear import blr_modules

CONFIG = BLRConfig("low_rank", ratio=0.6)


def tiny_clip():
    blocks = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**blocks, "vocab_size": 257, "max_position_embeddings": 32, "eos_token_id": 256}
    image = {**blocks, "image_size": 16, "patch_size": 8}
    return build(CLIPModel, CLIPConfig(text_config=text, vision_config=image, projection_dim=32))


class Scorer(nn.Module):
    """A model of one's own around one of transformers."""

    def __init__(self, model):
        super().__init__()
        self.backbone, self.head = model, nn.Linear(64, 1)


def reloads(model, folder, run):
    """Whether the model saved and loaded has the same layers replaced and gives the same numbers."""
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder).eval()
    assert list(blr_modules(loaded)) == list(blr_modules(model)) != []
    with torch.no_grad():
        return torch.equal(run(loaded), run(model))


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model)), Scorer],
    ids=["compile", "DataParallel", "both", "own"],
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_the_model_inside_a_wrapper_is_recorded(make, wrap, tmp_path):
    model = make()
    wrapped = wrap(model)
    compress(wrapped, CONFIG, progress=False)
    assert list(model.config.quantization_config.layers) == list(blr_modules(model))
    assert reloads(model, tmp_path, tiny_logits)
    to_dense(wrapped)
    assert not hasattr(model.config, "quantization_config")


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel], ids=["compile", "DataParallel"])
def test_a_wrapped_model_is_fitted_as_it_is_alone(wrap):
    # names among that: a plan made for the model serves the wrapped one
    alone, model, batches = tiny_llama(), tiny_llama(), [tiny_inputs(tiny_llama())]
    compress(alone, CONFIG, calibration=batches, progress=False)
    statistics = collect_statistics(wrap(model), CONFIG, calibration=batches)
    report = compress(wrap(model), CONFIG, calibration=batches, statistics=statistics, progress=False)
    assert [layer.name for layer in report.layers] == list(blr_modules(alone))
    assert torch.equal(tiny_logits(model), tiny_logits(alone))
    given = tiny_llama()
    compress(wrap(given), alone.config.quantization_config, progress=False)
    assert list(blr_modules(given)) == list(blr_modules(alone))


@pytest.mark.parametrize(
    "make, part",
    [
        (tiny_llama, "model"),
        (tiny_llama, "model.layers"),
        (tiny_llama, "model.layers.1.mlp"),
        (tiny_gpt2, "transformer"),
        (tiny_bert, "bert"),
        (tiny_bert, "bert.encoder"),
        (tiny_t5, "encoder"),
        (tiny_t5, "decoder"),
    ],
)
def test_the_whole_of_a_compressed_part_loads(make, part, tmp_path):
    model = make()
    # by default targets stand in repeated blocks, and an MLP alone has none
    targets = ["up_proj", "down_proj"] if part.endswith("mlp") else None
    config = BLRConfig("low_rank", ratio=0.6, target_modules=targets)
    report = compress(model.get_submodule(part), config, progress=False)
    assert [f"{part}.{layer.name}" for layer in report.layers] == list(blr_modules(model))
    assert reloads(model, tmp_path, tiny_logits)
    to_dense(model.get_submodule(part))
    assert not hasattr(model.config, "quantization_config")


def test_a_part_that_is_a_model_loads_alone_too(tmp_path):
    t5, llama, ids = tiny_t5(), tiny_llama(), tiny_inputs(tiny_llama())["input_ids"]
    for part in (t5.encoder, llama.model):
        compress(part, CONFIG, progress=False)
        assert reloads(part, tmp_path / type(part).__name__, lambda model: model(ids)[0])


def test_parts_are_compressed_and_made_dense_one_after_the_other(tmp_path):
    model = tiny_t5()
    compress(model.encoder, CONFIG, progress=False)
    compress(model.decoder, BLRConfig("monarch", ratio=0.5), progress=False)
    assert len(model.config.quantization_config.layers) == 28
    assert reloads(model, tmp_path / "both", tiny_logits)
    to_dense(model.encoder)
    assert {name.partition(".")[0] for name in model.config.quantization_config.layers} == {"decoder"}
    assert reloads(model, tmp_path / "decoder", tiny_logits)


def test_a_part_with_a_config_inside_the_wholes(tmp_path):
    # the part's plan stands in the whole's config.json as well, in that of the part
    model, pixels = tiny_clip(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    compress(model.vision_model, CONFIG, progress=False)
    assert reloads(model, tmp_path / "clip", lambda model: model.get_image_features(pixels)[0])
    to_dense(model)
    model.save_pretrained(tmp_path / "dense")
    assert not blr_modules(CLIPModel.from_pretrained(tmp_path / "dense"))
    assert "hf_blr" not in (tmp_path / "dense" / "config.json").read_text()


def test_layers_of_a_model_in_a_list_of_ones_own(tmp_path):
    model = tiny_llama()
    compress(nn.Sequential(*model.model.layers), CONFIG, progress=False)
    assert reloads(model, tmp_path, tiny_logits)


def test_other_models_are_left_alone():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = tiny_llama(), tiny_llama()

    bystander, two = tiny_llama(), Two()
    two.other.config.quantization_config = asked = object()
    compress(two, BLRConfig("low_rank", ratio=0.6, target_modules=r"one\..*q_proj"), progress=False)
    assert list(two.one.config.quantization_config.layers) == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    assert two.other.config.quantization_config is asked
    assert not hasattr(bystander.config, "quantization_config")


def test_to_dense_stopped_half_way_says_what_is_left(tmp_path, monkeypatch):
    model = tiny_llama()
    compress(model, CONFIG, progress=False)
    layers, calls = list(blr_modules(model)), []
    kind = type(blr_modules(model)[layers[0]])
    original = kind.to_dense

    def stop(module):
        calls.append(module)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(module)

    monkeypatch.setattr(kind, "to_dense", stop)
    with pytest.raises(KeyboardInterrupt):
        to_dense(model)
    assert list(blr_modules(model)) == layers[5:]
    assert reloads(model, tmp_path, tiny_logits)


def test_a_model_that_does_not_know_what_was_asked_for_still_says_its_plan(tmp_path):
    model = tiny_llama()
    compress(model, BLRConfig("low_rank", ratio=0.6), progress=False)
    del model.config.quantization_config
    to_dense(model.model.layers[0])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))


def test_other_threads_build_their_tuples_while_models_are_looked_for():
    model, interval, failed = tiny_llama(), sys.getswitchinterval(), []
    stop = threading.Event()

    def build():
        while not stop.is_set():
            try:
                tuple(i for i in range(200))
            except SystemError as error:
                failed.append(error)

    other = threading.Thread(target=build)
    # the interpreter changes threads as often as it can
    sys.setswitchinterval(1e-5)
    try:
        other.start()
        found = [live_models() for _ in range(8)]
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)
    assert not failed and all(any(each is model for each in models) for models in found)
