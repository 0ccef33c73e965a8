"""Compressed transformers of diffusers: saved, loaded, calibrated by denoising, and run in their pipelines."""

import json

import pytest
import torch

import hf_blr
from hf_blr import BLRConfig
from hf_blr.integration import blr_modules

diffusers = pytest.importorskip("diffusers")


def make(model_class, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, model_class)(**settings).eval()


#: a pipeline takes class 1000 for none
CLASSES = {"num_embeds_ada_norm": 1000}


def dit():
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4}
    return make("DiTTransformer2DModel", **sizes, num_layers=2, sample_size=8, patch_size=2, **CLASSES)


def flux():
    sizes = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 1}
    text = {"joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8)}
    return make("FluxTransformer2DModel", **sizes, **text, num_single_layers=1, patch_size=1)


def numbers(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def inputs_of(model):
    if type(model).__name__.startswith("DiT"):
        return {
            "hidden_states": numbers(2, 4, 8, 8),
            "timestep": torch.tensor([3, 40]),
            "class_labels": torch.tensor([1, 2]),
        }
    places = {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3)}
    texts = {"encoder_hidden_states": numbers(2, 5, 32), "pooled_projections": numbers(2, 32)}
    return {"hidden_states": numbers(2, 16, 4), "timestep": torch.tensor([0.3, 0.9]), **texts, **places}


@torch.no_grad()
def output(model):
    return model(**inputs_of(model)).sample


def compressed(model, structure="blast", **kw):
    hf_blr.compress(model, BLRConfig(structure, ratio=0.6, **kw), calibration=[inputs_of(model)], progress=False)
    return model


each = pytest.mark.parametrize("make_model", [dit, flux])


@each
@pytest.mark.parametrize("structure", ["pivoted", "blast"])
def test_what_is_saved_loads_as_it_was(make_model, structure, tmp_path):
    model = compressed(make_model(), structure)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert blr_modules(loaded).keys() == blr_modules(model).keys() and torch.equal(output(loaded), output(model))
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "hf_blr"
    # a plain model, which casts and is saved again
    assert loaded.half().dtype == torch.float16
    type(model).from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert torch.equal(output(type(model).from_pretrained(tmp_path / "again")), output(model))


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_factors_in_bits_come_back_in_their_dtypes(storage, tmp_path):
    model = compressed(dit(), "low_rank", factor_format=storage)
    assert storage in {module.storage.name for module in blr_modules(model).values()}
    model.save_pretrained(tmp_path)
    for asked in ({}, {"torch_dtype": torch.float32}):
        assert torch.equal(output(type(model).from_pretrained(tmp_path, **asked)), output(model))
    with pytest.raises(ValueError, match="torch.float16 rounds scales"):
        type(model).from_pretrained(tmp_path, torch_dtype=torch.float16)


def test_a_dense_checkpoint_is_compressed_while_it_loads(tmp_path):
    dense, config = dit(), BLRConfig("low_rank", ratio=0.6)
    dense.save_pretrained(tmp_path)
    loaded = type(dense).from_pretrained(tmp_path, quantization_config=config)
    hf_blr.compress(dense, config, progress=False)
    assert blr_modules(loaded) and torch.equal(output(loaded), output(dense))
    with pytest.raises(ValueError, match="text says nothing of what a denoiser reads"):
        type(dense).from_pretrained(tmp_path, quantization_config=BLRConfig("low_rank", ratio=0.6, dataset="builtin"))


def test_made_dense_it_says_nothing_of_factors(tmp_path):
    model = compressed(dit())
    expected = output(model)
    model.save_pretrained(tmp_path / "blr")
    for dense in (hf_blr.to_dense(model), type(model).from_pretrained(tmp_path / "blr").dequantize()):
        torch.testing.assert_close(output(dense), expected, rtol=1e-4, atol=1e-4)
        dense.save_pretrained(tmp_path / "dense")
        assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
        assert torch.equal(output(type(model).from_pretrained(tmp_path / "dense")), output(dense))


def test_a_damaged_checkpoint_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = compressed(dit())
    model.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    factor = next(key for key in tensors if key.endswith(".u"))
    save_file({key: value for key, value in tensors.items() if key != factor}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=factor):
        type(model).from_pretrained(tmp_path)
    norm = next(key for key in tensors if "pos_embed" in key or "norm" in key)
    save_file({key: value for key, value in tensors.items() if key != norm}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="would stay random"):
        type(model).from_pretrained(tmp_path)
    save_file({**tensors, factor: tensors[factor] * float("nan")}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="finite"):
        type(model).from_pretrained(tmp_path)


@pytest.fixture
def pipeline():
    sizes = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1, "latent_channels": 4}
    vae = make("AutoencoderKL", in_channels=3, out_channels=3, sample_size=8, **sizes)
    made = diffusers.DiTPipeline(dit(), vae, diffusers.DDIMScheduler())
    made.set_progress_bar_config(disable=True)
    return made


def call(seed, steps=4):
    generator = torch.Generator().manual_seed(seed)
    return {"class_labels": [1, 2], "num_inference_steps": steps, "generator": generator, "output_type": "np"}


def test_denoising_steps_are_what_it_is_fitted_to(pipeline, tmp_path):
    batches = hf_blr.denoising_batches(pipeline, [call(0, 2), call(1, 2)])
    # one a step; guidance doubles the two pictures
    assert len(batches) == 4 and batches[0]["hidden_states"].shape == (4, 4, 8, 8)
    assert {int(batch["timestep"][0]) for batch in batches} == {int(t) for t in pipeline.scheduler.timesteps}

    def error(fitted_to):
        model = dit()
        config = BLRConfig("low_rank", ratio=0.4)
        hf_blr.compress(model, config, calibration=fitted_to, progress=False)
        apart = hf_blr.denoising_batches(pipeline, [call(5, 2)])
        with torch.no_grad():
            pairs = [(model(**batch).sample, pipeline.transformer(**batch).sample) for batch in apart]
        return sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)

    assert error(batches) < 0.7 * error(None)
    pipeline.transformer = compressed(pipeline.transformer)
    pipeline.save_pretrained(tmp_path)
    loaded = diffusers.DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert blr_modules(loaded.transformer)
    assert (loaded(**call(3, 2)).images == pipeline(**call(3, 2)).images).all()


def test_a_pipeline_without_that_part_is_refused(pipeline):
    with pytest.raises(ValueError, match="DiTPipeline has no module 'unet'"):
        hf_blr.denoising_batches(pipeline, [call(0)], component="unet")
    with pytest.raises(ValueError, match="no call ran transformer"):
        hf_blr.denoising_batches(pipeline, [])
