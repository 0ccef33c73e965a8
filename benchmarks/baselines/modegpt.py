"""MoDeGPT: the two or three matrices around a hidden dimension are reduced together, and the dimension shrinks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from hf_blr.calibration.fisher import Statistics
from hf_blr.dense import dense_weight, set_dense_weight, stored_bias
from hf_blr.factorize.gram import damped, solve_psd
from hf_blr.modes import evaluating

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
#: a block keeps something, however little it does
MOST_REMOVED = 0.95
DAMPING = 1e-6


def modegpt(
    dense: nn.Module, ratio: float, statistics: Statistics, batches: list[Tensor], epsilon: float
) -> tuple[nn.Module, int]:
    """MoDeGPT (arXiv 2408.09632) of a Llama-like model with rotary embeddings, in a copy.

    What is gone is zero in the copy, whose perplexity is that of the smaller model: hidden units of an MLP, dimensions
    of a head. Heads with common keys and values choose together.

    Args:
        dense: its blocks hold `self_attn.{q,k,v,o}_proj` and `mlp.{gate,up,down}_proj`, without biases.
        ratio: of the parameters of these projections to keep.
        statistics: with the Gram matrices of the inputs of `q_proj` and `down_proj`.
        batches: token ids `[B, T]`, for the blocks' influence.
        epsilon: temperature of the allocation; the larger, the more alike are the shares of all blocks.

    Returns:
        The copy, and how many numbers its projections need.

    Raises:
        ValueError: if the model's blocks are of another form.
    """
    model = copy.deepcopy(dense)
    blocks = blocks_of(model)
    sizes = model.config.num_key_value_heads, model.config.num_attention_heads // model.config.num_key_value_heads
    removed = shares_removed(block_influences(model, list(blocks.values()), batches), 1 - ratio, epsilon)
    kept = 0
    for (name, block), share in zip(blocks.items(), (1 - removed).tolist(), strict=True):
        weights = {key: dense_weight(module).double() for key, module in projections(block).items()}
        budget = int(share * sum(w.numel() for w in weights.values()))
        inputs = statistics.grams[f"{name}.self_attn.q_proj"].double()
        new = queries_and_keys(weights["q_proj"], weights["k_proj"], inputs, sizes, share)
        new += values_and_outputs(weights["v_proj"], weights["o_proj"], inputs, sizes, share)
        used = sum(nonzero_part(weight) for weight in new)
        # heads lose whole dimensions: what rounding leaves goes to the MLP, whose units are many
        units = min(max((budget - used) // (3 * weights["up_proj"].shape[1]), 1), weights["up_proj"].shape[0])
        hidden = statistics.grams[f"{name}.mlp.down_proj"].double()
        chosen, down = hidden_units(weights["down_proj"], hidden, units)
        mask = torch.zeros_like(hidden[0]).index_fill(0, chosen, 1.0)[:, None]
        new += weights["gate_proj"] * mask, weights["up_proj"] * mask, down
        kept += used + 3 * units * weights["up_proj"].shape[1]
        for module, weight in zip(projections(block).values(), new, strict=True):
            set_dense_weight(module, weight)
    return model, kept


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """{name: decoder block}.

    Raises:
        ValueError: if there is none of the form that the method is written for.
    """
    blocks = {
        name.removesuffix(".self_attn"): model.get_submodule(name.removesuffix(".self_attn"))
        for name, _ in model.named_modules()
        if name.endswith(".self_attn")
    }
    for name, block in blocks.items():
        attention, mlp = block.self_attn, getattr(block, "mlp", None)
        whole = all(hasattr(attention, key) for key in ATTENTION) and all(hasattr(mlp, key) for key in MLP)
        if not whole or hasattr(attention, "q_norm"):
            raise ValueError(f"{name} must hold {(*ATTENTION, *MLP)} and no norm of queries: a block as a Llama's")
        if any(stored_bias(module) is not None for module in projections(block).values()):
            raise ValueError(f"{name} has biases, and its keys and queries are chosen here without any")
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no blocks with self_attn and mlp, as a Llama has them")
    return blocks


def projections(block: nn.Module) -> dict[str, nn.Module]:
    """In the order in which the new weights come."""
    return {key: getattr(block.self_attn if key in ATTENTION else block.mlp, key) for key in (*ATTENTION, *MLP)}


@torch.no_grad()
def block_influences(model: nn.Module, blocks: list[nn.Module], batches: list[Tensor]) -> Tensor:
    """One minus the mean cosine between what enters a block and what leaves it, over tokens: `[blocks]`."""
    sums = torch.zeros(len(blocks), dtype=torch.float64)
    tokens = sum(batch.numel() for batch in batches)

    def watch(i: int):
        def hook(module, args, kwargs, output):
            entered = args[0] if args else kwargs["hidden_states"]
            left = output[0] if isinstance(output, tuple) else output
            sums[i] += nn.functional.cosine_similarity(entered.float(), left.float(), dim=-1).sum().item()

        return hook

    handles = [block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        with evaluating(model):
            for batch in batches:
                model(input_ids=batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return 1 - sums / tokens


def shares_removed(influences: Tensor, removed: float, epsilon: float) -> Tensor:
    """The shares phi `[blocks]` that maximise sum s (1 - phi) + epsilon sum H(phi), with H(phi) = -phi log phi.

    Their mean is `removed`, and none is above `MOST_REMOVED`. Without that bound phi is a softmax of -s / epsilon.
    """
    shares = torch.zeros_like(influences)
    free = torch.ones_like(influences, dtype=torch.bool)
    left = removed * len(influences)
    while True:
        shares[free] = left * torch.softmax(-influences[free] / epsilon, 0)
        over = free & (shares > MOST_REMOVED)
        if not over.any():
            return shares
        shares[over], free = MOST_REMOVED, free & ~over
        left -= MOST_REMOVED * int(over.sum())


def queries_and_keys(q: Tensor, k: Tensor, gram: Tensor, heads: tuple[int, int], share: float) -> tuple[Tensor, Tensor]:
    """A CR decomposition of each group's product of queries and keys: the heaviest dimensions stay as they are.

    A dimension's weight is the squared size of its queries, over the heads of the group, times that of its keys. A
    rotary embedding turns dimensions i and i + half of a head together, so they stay or go together.

    Args:
        q, k: `[groups * heads of a group * d, K]`, `[groups * d, K]`.
        gram: of their inputs `[K, K]`.
        heads: groups, and heads of a group.
        share: of the pairs of dimensions to keep, rounded down, one at least.
    """
    groups, each = heads
    size = len(k) // groups
    of_q = energies(q, gram).view(groups, each, size).sum(1)
    pairs = (of_q * energies(k, gram).view(groups, size)).view(groups, 2, size // 2).sum(1)
    chosen = pairs.topk(max(1, int(share * (size // 2))), dim=1).indices
    mask = torch.zeros_like(pairs).scatter(1, chosen, 1.0).repeat(1, 2)
    return q * mask.repeat_interleave(each, 0).view(-1, 1), k * mask.view(-1, 1)


def energies(weight: Tensor, gram: Tensor) -> Tensor:
    """The squared size of each output over the inputs, `[N]`: the squared columns of the root of the outputs' Gram."""
    return ((weight @ gram) * weight).sum(1)


def values_and_outputs(
    v: Tensor, o: Tensor, gram: Tensor, heads: tuple[int, int], share: float
) -> tuple[Tensor, Tensor]:
    """The best approximation, on the inputs, of each group's products of values and outputs by fewer dimensions.

    With values V `[d, K]`, their Gram C = V H V^T = L L^T and the outputs O of a group's heads side by side, it is the
    SVD of L^T O: the leading U give V' = U^T L^-1 V and O' = O L U.

    Args:
        v, o: `[groups * d, K]`, `[N, groups * heads of a group * d]`.
        gram, heads, share: as for `queries_and_keys`, of single dimensions.
    """
    groups, each = heads
    size = len(v) // groups
    rank = max(1, int(share * size))
    new_v, new_o = torch.zeros_like(v), torch.zeros_like(o)
    for group in range(groups):
        rows = slice(group * size, (group + 1) * size)
        root = torch.linalg.cholesky(damped(v[rows] @ gram @ v[rows].mT, DAMPING))
        outputs = o.view(len(o), groups, each, size)[:, group]
        product = torch.einsum("nhd,nhe->de", outputs, outputs)
        leading = torch.linalg.eigh(root.mT @ product @ root)[1][:, -rank:]
        whitened = torch.linalg.solve_triangular(root, v[rows], upper=False)
        new_v[group * size : group * size + rank] = leading.mT @ whitened
        new_o.view(len(o), groups, each, size)[:, group, :, :rank] = outputs @ root @ leading
    return new_v, new_o


def hidden_units(down: Tensor, gram: Tensor, units: int) -> tuple[Tensor, Tensor]:
    """A Nystrom approximation of the MLP: its most telling hidden units, and the down projection that suits them best.

    Units are chosen by their ridge leverage scores, with the mean of the eigenvalues that are cut off as the ridge
    (arXiv 1803.06010). The new W' = W C S (S^T C S)^-1 is least squares on their activations.

    Args:
        down: W `[N, M]`.
        gram: C `[M, M]`, of its inputs.
        units: how many of the M to keep.

    Returns:
        Their numbers `[units]`, and W' `[N, M]` with zeros at the others.
    """
    gram = damped(gram, DAMPING)
    tail = torch.linalg.eigvalsh(gram)[: len(gram) - units].sum() / units
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    scores = solve_psd(gram + tail * eye, gram).diagonal()
    chosen = scores.topk(units).indices.sort().values
    new = torch.zeros_like(down)
    new[:, chosen] = solve_psd(gram[chosen][:, chosen], gram[chosen] @ down.mT).mT
    return chosen, new


def nonzero_part(weight: Tensor) -> int:
    """The numbers in the rows and columns that are not zero throughout."""
    return int(weight.any(1).sum()) * int(weight.any(0).sum())
