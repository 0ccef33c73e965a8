"""The same model in another basis of its residual stream, whose weights lie on no grid of the file that they come from.

With an orthogonal Q, a stream x Q in place of x gives the same outputs where what reads the stream is W Q and what
writes to it Q^T W: a norm's root of a mean of squares does not see Q. Its weights do, and go into the layers that read
it. As in QuaRot (arXiv 2404.00456), where that spreads outliers before rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

#: models whose stream is read through RMS norms alone
KNOWN = ("llama", "mistral", "qwen2", "qwen3")


@torch.no_grad()
def turned(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """The model, changed in place: weights of norms are one, and the head has a matrix of its own.

    seed: of Q, which is drawn on the CPU.

    Raises:
        ValueError: for an architecture other than those of `KNOWN`.
    """
    if model.config.model_type not in KNOWN:
        raise ValueError(f"only the streams of {', '.join(KNOWN)} can be turned, got {model.config.model_type!r}")
    untie_head(model)
    body, embedding = model.model, model.get_input_embeddings()
    size = embedding.weight.shape[1]
    generator = torch.Generator().manual_seed(seed)
    # QR of a Gaussian matrix, with signs that make Q uniform
    basis, triangle = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    basis = (basis * triangle.diagonal().sign()).to(embedding.weight.device)
    embedding.weight.copy_(embedding.weight.double() @ basis)
    for block in body.layers:
        attention, mlp = block.self_attn, block.mlp
        read_turned(block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj], basis)
        write_turned(attention.o_proj, basis)
        read_turned(block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj], basis)
        write_turned(mlp.down_proj, basis)
    read_turned(body.norm, [model.get_output_embeddings()], basis)
    return model


def untie_head(model: PreTrainedModel) -> None:
    """The weight of the last norm goes into the head and not into the embedding."""
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), head.weight.requires_grad)
    model.config.tie_word_embeddings = False
    # what transformers found when it built the model
    model.all_tied_weights_keys = {}


def read_turned(norm: nn.Module, layers: list[nn.Linear], basis: Tensor) -> None:
    for layer in layers:
        layer.weight.copy_((layer.weight.double() * norm.weight.double()) @ basis)
    norm.weight.fill_(1)


def write_turned(layer: nn.Linear, basis: Tensor) -> None:
    layer.weight.copy_(basis.T @ layer.weight.double())
    if layer.bias is not None:
        layer.bias.copy_(layer.bias.double() @ basis)
