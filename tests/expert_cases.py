"""Random experts, and small models with experts."""

import torch
from tiny import build
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_blr.experts import Experts, ExpertsLinear, put_layer
from hf_blr.formats import PLAIN
from hf_blr.structures import make_spec, structure_named

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 257}
SIZES["initializer_range"] = 0.1
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}

#: {structure: blocks}
STRUCTURES = {"low_rank": None, "pivoted": None, "monarch": (2, 4), "blast": (2, 4)}


class Dense(nn.Module):
    """E gated MLPs in 3-D parameters, with the attributes that Transformers' experts have."""

    def __init__(self, num_experts, hidden, inner, device="cpu", dtype=torch.float32):
        super().__init__()
        self.num_experts, self.act_fn = num_experts, nn.functional.silu
        # of each module, as Transformers sets them, and not of the class
        self.has_bias, self.is_transposed, self.has_gate = False, False, True
        for key, shape in (("gate_up_proj", (2 * inner, hidden)), ("down_proj", (hidden, inner))):
            weight = torch.randn(num_experts, *shape, device=device) * shape[1] ** -0.5
            self.register_parameter(key, nn.Parameter(weight.to(dtype)))

    def _apply_gate(self, inner):
        gate, up = inner.chunk(2, dim=-1)
        return self.act_fn(gate) * up


def make_experts(
    structure, num_experts=5, hidden=32, inner=48, rank=8, device="cpu", dtype=torch.float32, storage=PLAIN
):
    """An `Experts` of random factors of one structure."""
    model = nn.Module()
    model.experts = Dense(num_experts, hidden, inner, device, dtype)
    for key, sizes in (("gate_up_proj", (hidden, 2 * inner)), ("down_proj", (inner, hidden))):
        blocks = STRUCTURES[structure]
        # of Monarch the rank of a pair of blocks
        spec = make_spec(structure, *sizes, rank=rank // 4 if structure == "monarch" else rank, num_blocks=blocks)
        layer = ExpertsLinear(spec, num_experts, device=device, dtype=dtype, storage=storage)
        record = structure_named(structure)
        for expert in range(num_experts if record.typical_indices else 0):
            for name, index in record.load("typical_indices")(spec, device).items():
                getattr(layer, name)[expert] = index
        put_layer(model, f"experts.{key}", layer)
    assert isinstance(model.experts, Experts)
    return model.experts


def make_tokens(experts, tokens, each=2, last=0):
    """(hidden states, experts, weights) of a forward; the last so many experts get no token."""
    weight = experts.down_proj
    device, dtype, hidden = weight.device, weight.dtype, weight.out_features
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    choice = torch.rand(tokens, experts.num_experts - last, device=device).argsort(1)[:, :each]
    return x, choice, torch.rand(tokens, each, device=device).to(dtype)


def olmoe():
    many = {"num_experts": 6, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    return build(OlmoeForCausalLM, OlmoeConfig(**SIZES | {"intermediate_size": 48}, **many, pad_token_id=0))


def qwen2_moe():
    many = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "shared_expert_intermediate_size": 48}
    return build(Qwen2MoeForCausalLM, Qwen2MoeConfig(**SIZES, **heads, **many))


def qwen3_moe():
    many = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
    return build(Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, **HEADS, **many))


def deepseek_v3():
    many = {"n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
    heads = {"num_attention_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    more = {"qk_nope_head_dim": 16, "v_head_dim": 16, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4}
    return build(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, **many, **heads, **more))


def gpt_oss():
    many = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
    return build(GptOssForCausalLM, GptOssConfig(**SIZES, **HEADS, **many, layer_types=["full_attention"] * 2))


def llama4():
    """Its experts are handed every token, and those of others are zeros."""
    many = {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 96,
    }
    return build(Llama4ForCausalLM, Llama4TextConfig(**SIZES, **HEADS, **many, attention_chunk_size=16))
