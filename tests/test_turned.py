"""Turning the residual stream of a model, and compressing what was turned."""

import copy
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from tiny import (
    VOCAB_SIZE,
    batches_for,
    build,
    divergence,
    tiny_bert,
    tiny_gpt2,
    tiny_inputs,
    tiny_llama,
    tiny_llava,
    tiny_logits,
    tiny_mixtral,
    tiny_qwen3,
    tiny_t5,
    tiny_tokenizer,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_blr import BLRConfig, collect_statistics, compress, from_config, to_dense, turn_stream
from hf_blr.cli import main
from hf_blr.compression import turning
from hf_blr.targets import find_targets

INT4 = {"structure": "dense", "dense_format": "int4", "group_size": 16}


def uneven(model):
    """The model with weights of norms that differ and biases that are not zero, as trained models have them."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.copy_(1 + torch.rand(parameter.shape, generator=generator))
        elif name.endswith("bias"):
            parameter.data.normal_(generator=generator)
    return model


def outlying():
    """A Llama that computes as any, with a feature in each group of 16 that norms shrink and layers multiply."""
    model = uneven(tiny_llama())
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        read = {block.input_layernorm: [attention.q_proj, attention.k_proj, attention.v_proj]}
        read[block.post_attention_layernorm] = [mlp.gate_proj, mlp.up_proj]
        for norm, layers in read.items():
            norm.weight.data[3::16] /= 50
            for layer in layers:
                layer.weight.data[:, 3::16] *= 50
    return model


def family(name, **settings):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": VOCAB_SIZE}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, initializer_range=0.1, **settings)
    kind = "ForSequenceClassification" if settings.get("num_labels") else "ForCausalLM"
    return uneven(build(getattr(transformers, name + kind), config))


TURNABLE = {
    "tied": lambda: uneven(tiny_llama(tie_word_embeddings=True)),
    "biases": lambda: uneven(tiny_llama(attention_bias=True, mlp_bias=True)),
    "norms in heads": lambda: uneven(tiny_qwen3()),
    "float64": lambda: uneven(tiny_llama()).double(),
    "outliers": outlying,
    "classifier": lambda: family("Llama", num_labels=3),
    "fused": lambda: family("Phi3"),
    "biases of readers": lambda: family("Qwen2"),
    "multipliers": lambda: family("Granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
}


@pytest.mark.parametrize("case", TURNABLE)
def test_a_turned_model_computes_the_same(case):
    model = TURNABLE[case]()
    before, logits = copy.deepcopy(model), tiny_logits(model)
    turn_stream(model)
    assert (tiny_logits(model) - logits).norm() < 1e-5 * logits.norm()
    # no weight is where it was
    for name in find_targets(before):
        old, new = before.get_submodule(name).weight, model.get_submodule(name).weight
        assert (old - new).norm() > 0.5 * old.norm()
    assert find_targets(model) == find_targets(before)
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight") and len(p) == 64]
    assert len(norms) == 5 and all((weight == 1).all() for weight in norms)
    assert not any(parameter.grad_fn or not parameter.requires_grad for parameter in model.parameters())


REFUSED = {
    "positions": (tiny_gpt2, "transformer.wpe .Embedding. is neither a norm nor a linear layer"),
    "encoder": (tiny_bert, "position_embeddings .Embedding. is neither"),
    "two streams": (tiny_t5, "did not run in a forward on token ids alone|is neither a norm nor a linear layer"),
    "experts": (tiny_mixtral, "mlp.gate .* is neither a norm nor a linear layer"),
    "images": (tiny_llava, "vision_tower.* did not run in a forward on token ids alone"),
    "no head": (lambda: tiny_llama().model, "norm .LlamaRMSNorm. is read by no linear layer"),
    "one plus w": (lambda: family("Gemma", head_dim=16), r"input_layernorm .GemmaRMSNorm. is no RMS norm of 64"),
    "layer norm": (lambda: family("StableLm"), r"input_layernorm .LayerNorm. is no RMS norm of 64 features, w \* x"),
    "norms behind": (lambda: family("Olmo2"), "layers.0.self_attn.q_proj .Linear. reads the stream without a norm"),
    "norms before and behind": (
        lambda: family("Glm4", head_dim=16),
        r"outputs on random ids would change by \d.* of their norm.*look at model.layers.0.post_\w+_layernorm",
    ),
    "no weights": (lambda: family("Olmo"), "outputs on random ids would change by"),
    "no ids": (
        lambda: torch.nn.Sequential(torch.nn.Linear(64, 64)),
        "expected a transformers model that reads token ids",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stream_that_is_read_otherwise_is_refused_before_anything_is_changed(case):
    make, message = REFUSED[case]
    model = uneven(make())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=f"cannot be turned: .*({message}).*leave turned out"):
        compress(model, BLRConfig("low_rank", ratio=0.5, turned=True), progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert hooks == sum(len(module._forward_pre_hooks) for module in model.modules())


def test_a_compressed_or_offloaded_model_is_refused(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path)
    compress(model, BLRConfig("low_rank", ratio=0.5), progress=False)
    with pytest.raises(ValueError, match="layers are compressed already.*load the dense model"):
        turn_stream(model)
    away = LlamaForCausalLM.from_pretrained(
        tmp_path,
        device_map={
            "model.embed_tokens": "cpu",
            "model.layers": "disk",
            "model.norm": "cpu",
            "model.rotary_emb": "cpu",
            "lm_head": "cpu",
        },
        offload_folder=tmp_path / "offload",
    )
    with pytest.raises(ValueError, match=r"model.layers.0.* is offloaded \(18 parameters are\).*without offloading"):
        turn_stream(away)


def test_a_model_on_several_devices_is_refused():
    model = tiny_llama()
    with FakeTensorMode():
        model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, 64, device="cuda"))
    with pytest.raises(ValueError, match="lies on cpu, cuda:0, .* load the model on the CPU"):
        turn_stream(model)


def test_it_is_another_basis_for_each_seed_and_survives_a_copy():
    models = [uneven(tiny_llama(tie_word_embeddings=True)) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        turn_stream(model, seed)
    first, again, other = models
    name = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(first.state_dict()[name], again.state_dict()[name])
    assert not torch.allclose(first.state_dict()[name], other.state_dict()[name])
    assert torch.equal(tiny_logits(copy.deepcopy(first)), tiny_logits(first))


def test_the_basis_is_orthogonal_and_the_same_on_every_machine():
    basis = turning.random_basis(48, 0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(48, dtype=torch.float64))
    # of a Gaussian matrix's first column, whose sign QR alone would lose
    column = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:, 0]
    torch.testing.assert_close(basis[:, 0], column / column.norm())


def test_weights_in_bfloat16_are_turned_in_float64():
    model = uneven(tiny_llama()).bfloat16()
    wide = copy.deepcopy(model).double()
    turn_stream(model)
    turn_stream(wide)
    assert all(torch.equal(p, q.bfloat16()) for p, q in zip(model.parameters(), wide.parameters(), strict=True))


def test_int4_loses_less_where_some_weights_stand_out():
    batches, lost, reports = batches_for(tiny_llama()), [], []
    for dense, turned in ((outlying(), False), (outlying(), True), (uneven(tiny_llama()), False)):
        model = copy.deepcopy(dense)
        reports.append(compress(model, BLRConfig(**INT4, turned=turned), calibration=batches, progress=False))
        lost.append(divergence(dense, model, batches))
    assert lost[1] < 0.1 * lost[0]
    # as much as where none stand out, of a model that computes the same
    assert lost[1] == pytest.approx(lost[2], rel=0.1)
    # the head had a matrix of its own, and a basis takes none
    assert reports[0].bytes_after == reports[1].bytes_after and reports[1].untied_bytes == 0


@pytest.mark.parametrize("text", [False, True])
def test_a_turned_model_is_saved_and_loaded_with_a_head_of_its_own(text, tmp_path, caplog):
    model = uneven(tiny_llama(tie_word_embeddings=True))
    dense, batches = copy.deepcopy(model), batches_for(model) if text else None
    config = BLRConfig("low_rank", ratio=0.6, allocation="uniform", turned=True, seed=3)
    report = compress(model, config, calibration=batches, progress=False)
    head = model.lm_head.weight
    assert report.untied_bytes == head.nbytes == dense.lm_head.weight.nbytes
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    assert "lm_head shares its matrix with the embedding; turned it has its own" in caplog.text
    assert "of them a head of its own" in str(report) and report.to_dict()["untied_bytes"] == head.nbytes
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert not loaded.config.tie_word_embeddings
    stored = loaded.config.quantization_config
    assert (stored.turned, stored.seed) == (True, 3)
    # a plan that is there already is not turned again
    assert torch.equal(tiny_logits(LlamaForCausalLM.from_pretrained(tmp_path, blr_config=stored)), tiny_logits(model))


def test_the_result_is_that_of_turning_first():
    model, by_hand = uneven(tiny_llama()), uneven(tiny_llama())
    batches = batches_for(model)
    turn_stream(by_hand, 2)
    compress(model, BLRConfig(**INT4, turned=True, seed=2), calibration=batches, progress=False)
    compress(by_hand, BLRConfig(**INT4, seed=2), calibration=batches, progress=False)
    assert torch.equal(tiny_logits(model), tiny_logits(by_hand))


def test_a_turned_dense_model_needs_nothing_of_ours(tmp_path):
    model = uneven(tiny_llama(tie_word_embeddings=True))
    turn_stream(model)
    model.save_pretrained(tmp_path)
    torch.save((tiny_inputs(model), tiny_logits(model)), tmp_path / "wanted")
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "inputs, wanted = torch.load(sys.argv[1] + '/wanted'); "
        "assert torch.equal(model(**inputs).logits, wanted) and 'hf_blr' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)


def test_to_dense_keeps_the_turn_and_the_head(tmp_path):
    model = uneven(tiny_llama(tie_word_embeddings=True))
    logits = tiny_logits(model)
    compress(model, BLRConfig("dense", dense_format="int8", turned=True), progress=False)
    to_dense(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(loaded.config, "quantization_config")
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    assert (tiny_logits(loaded) - logits).norm() < 0.1 * logits.norm()


def test_a_load_turns_the_dense_model_and_a_stream_of_weights_is_refused(tmp_path):
    model = uneven(tiny_llama())
    model.save_pretrained(tmp_path)
    config = BLRConfig("low_rank", ratio=0.6, turned=True)
    compress(model, config, progress=False)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, blr_config=config)
    assert torch.equal(tiny_logits(loaded), tiny_logits(model))
    from hf_blr.integration.quantizer import BLRHfQuantizer

    with pytest.raises(ValueError, match="turned turns the whole model.*load the dense model and call"):
        BLRHfQuantizer(config, pre_quantized=False).validate_environment()
    with pytest.raises(ValueError, match="turned=True turns weights that a model has"):
        from_config(model.config.__class__(**tiny_llama().config.to_dict()), LlamaForCausalLM, blr_config=config)


def test_statistics_of_the_model_as_it_was_are_refused():
    model = tiny_llama()
    config, batches = BLRConfig(**INT4, turned=True), batches_for(model)
    with pytest.raises(ValueError, match=r"turn it with hf_blr.turn_stream\(model\), collect from it"):
        collect_statistics(model, config, calibration=batches)
    statistics = collect_statistics(model, BLRConfig(**INT4), calibration=batches)
    before = tiny_logits(model)
    with pytest.raises(ValueError, match="turned=True turns the model before its statistics are collected"):
        compress(model, config, statistics=statistics, progress=False)
    assert torch.equal(tiny_logits(model), before)


def test_ctrl_c_leaves_no_model_that_is_half_turned(monkeypatch):
    model = uneven(tiny_llama(tie_word_embeddings=True))
    logits, tensors = tiny_logits(model), turning.Turn.tensors
    pressed = []

    def press(self, name, module, dtype, kept):
        if dtype == torch.float64 and not pressed:
            pressed.append(name)
            signal.raise_signal(signal.SIGINT)
        return tensors(self, name, module, dtype, kept)

    monkeypatch.setattr(turning.Turn, "tensors", press)
    # jobs in the background of a shell are begun without it
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            compress(model, BLRConfig("low_rank", ratio=0.6, turned=True), progress=False)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert pressed and (tiny_logits(model) - logits).norm() < 1e-5 * logits.norm()
    assert (model.model.norm.weight == 1).all()


def test_the_command_line_turns(tmp_path, capsys):
    outlying().save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    small = ["--dataset", "builtin", "--num-samples", "4", "--seqlen", "64", "--device", "cpu", "--turned"]
    folder, plan, out = (str(tmp_path / name) for name in ("dense", "plan.json", "out"))
    assert main(["plan", folder, plan, "--structure", "low_rank", "--ratio", "0.8", *small]) == 0
    assert f"hf-blr compress {folder} OUT --plan {plan} --turned" in capsys.readouterr().out
    assert main(["compress", folder, out, "--plan", plan, *small]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.config.quantization_config.turned and (loaded.model.norm.weight == 1).all()
    away = ["--structure", "low_rank", "--ratio", "0.5", "--offload-weights", "--offload-folder", out + "-files"]
    assert main(["compress", folder, out + "-2", *small, *away]) == 2
    assert "without offloading (--offload-weights" in capsys.readouterr().err
