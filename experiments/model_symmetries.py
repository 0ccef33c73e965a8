"""Changes of a Llama's weights that leave what it computes as it is: order of heads, rotation of values, of the stream.

A change is {leaf: (left, right)}: the weight of that projection becomes left W right^T, and its inputs x right x; None
stands for the identity. All matrices are orthogonal, so that errors of outputs keep their size.
"""

import torch

READERS, WRITERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def changed(weight, gram, sides):
    """(weight `[N, K]`, Gram `[K, K]`) after one projection's (left, right)."""
    left, right = sides
    if left is not None:
        weight = left @ weight
    if right is not None:
        weight, gram = weight @ right.T, None if gram is None else right @ gram @ right.T
    return weight, gram


def head_order(kv_order, query_orders, head_dim):
    """Key-value heads in the order kv_order `[G]`, and the query heads of each in its row of query_orders `[G, M]`."""
    kv_heads, group = query_orders.shape
    queries = torch.cat([kv_order[i] * group + query_orders[i] for i in range(kv_heads)])
    q, kv = (torch.kron(torch.eye(len(order))[order], torch.eye(head_dim)) for order in (queries, kv_order))
    return {"q_proj": (q, None), "k_proj": (kv, None), "v_proj": (kv, None), "o_proj": (None, q)}


def value_rotation(rotations, group):
    """One rotation for the values of each key-value head, `[G, D, D]`, undone for each of its `group` query heads.

    The attention weights mix values of different tokens, not of different dimensions, so they commute with it.
    """
    return {
        "v_proj": (torch.block_diag(*rotations), None),
        "o_proj": (None, torch.block_diag(*rotations.repeat_interleave(group, 0))),
    }


def stream_rotation(rotation):
    """The residual stream x as rotation x `[K, K]`; the norms' weights must be folded, or rotation be a permutation."""
    return {leaf: (None, rotation) for leaf in READERS} | {leaf: (rotation, None) for leaf in WRITERS}


@torch.no_grad()
def change_layer(layer, change):
    """Applies a change to one decoder layer in place."""
    for leaf, sides in change.items():
        module = getattr(layer.self_attn if hasattr(layer.self_attn, leaf) else layer.mlp, leaf)
        module.weight.copy_(changed(module.weight, None, sides)[0])


@torch.no_grad()
def permute_stream(model, order):
    """The channels of the residual stream in another order `[K]`, in place; a tied embedding stays tied."""
    for layer in model.model.layers:
        change_layer(layer, stream_rotation(torch.eye(len(order))[order]))
    for norm in norms(model):
        norm.weight.copy_(norm.weight[order])
    embedding, head = model.model.embed_tokens, model.lm_head
    for module in {id(m.weight): m for m in (embedding, head)}.values():
        module.weight.copy_(module.weight[:, order])


@torch.no_grad()
def rotate_stream(model, rotation):
    """The residual stream rotated by `[K, K]`, in place, the norms' weights folded into the layers that read them.

    The head takes the last norm's weight and the embedding does not, so that they cannot stay tied.
    """
    for layer in model.model.layers:
        for leaf in READERS:
            of_mlp = hasattr(layer.mlp, leaf)
            norm = layer.post_attention_layernorm if of_mlp else layer.input_layernorm
            weight = getattr(layer.mlp if of_mlp else layer.self_attn, leaf).weight
            weight.copy_(weight * norm.weight)
        change_layer(layer, stream_rotation(rotation))
    embedding, head = model.model.embed_tokens, model.lm_head
    head.weight = torch.nn.Parameter(head.weight * model.model.norm.weight @ rotation.T)
    embedding.weight = torch.nn.Parameter(embedding.weight @ rotation.T)
    model.config.tie_word_embeddings = False
    for norm in norms(model):
        norm.weight.fill_(1)


def norms(model):
    of_layers = [(layer.input_layernorm, layer.post_attention_layernorm) for layer in model.model.layers]
    return [norm for pair in of_layers for norm in pair] + [model.model.norm]
