"""Rotations and orders to try: random ones, principal axes, clusters, and rotations fitted to a structure."""

import math

import torch
from model_symmetries import changed
from symmetries import balanced_kmeans

from hf_blr.factorize import FitOptions, factorize
from hf_blr.ops.table import implementation_of
from hf_blr.structures import make_spec


def random_rotation(*shape):
    return torch.linalg.qr(torch.randn(*shape, generator=torch.Generator().manual_seed(1)))[0]


def principal(gram):
    """Rotation(s) to the principal axes of `[..., n, n]`, largest first."""
    return torch.linalg.eigh(gram)[1].flip(-1).mT


def dealt(size, hands):
    """An order that gives each of `hands` contiguous blocks every hands-th index."""
    return torch.arange(size).view(-1, hands).T.reshape(-1)


def value_choices(data, group, head_dim):
    """{name: rotations `[G, D, D]`} that depend on weights and inputs alone."""
    (value, gram), (output, _) = data["v_proj"], data["o_proj"]
    heads = value.view(-1, head_dim, value.shape[1])
    covariance = heads @ gram @ heads.mT
    columns = output.view(len(output), len(heads), group, head_dim).permute(1, 2, 0, 3)
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(head_dim, generator=generator) for _ in heads])
    return {
        "random order of dimensions": torch.eye(head_dim)[orders],
        "random": random_rotation(len(heads), head_dim, head_dim),
        "principal axes of values": principal(covariance),
        "principal axes of values, dealt out": principal(covariance)[:, dealt(head_dim, 4)],
        "principal axes of o's columns": principal((columns.mT @ columns).sum(1)),
    }


def fitted_rotation(layers, change_of, shape, structure, blocks, steps, rate, rounds):
    """A rotation of this shape that lowers the errors of a change's projections, as they are at half: Adam on the
    generator of the rotation, along the gradient of the sum of log errors, the factors fitted anew at every step.

    layers: one or more {leaf: (weight, Gram)} that share the rotation. change_of: rotation -> change. The best kept.
    """
    angles = torch.zeros(shape, requires_grad=True)
    optimizer = torch.optim.Adam([angles], rate)
    best, kept = math.inf, None
    for _ in range(steps):
        rotation = torch.linalg.matrix_exp(angles - angles.mT)
        # a copy gathers the gradients of all projections, so that only one at a time needs its graph
        copy, total = rotation.detach().requires_grad_(), 0
        for data in layers:
            for leaf in change_of(copy):
                loss = log_error(*changed(*data[leaf], change_of(copy)[leaf]), structure, blocks, rounds)
                loss.backward()
                total += loss.item()
        if total < best:
            best, kept = total, rotation.detach()
        optimizer.zero_grad()
        rotation.backward(copy.grad)
        optimizer.step()
    return kept


def log_error(weight, gram, structure, blocks, rounds):
    """Log of the squared error at half of the numbers; its gradient takes the factors as fixed, being at their best."""
    with torch.no_grad():
        spec = make_spec(structure, *reversed(weight.shape), ratio=0.5, num_blocks=blocks)
        fitted = factorize(weight.contiguous(), spec, gram, options=FitOptions(rounds=rounds, tolerance=0))
        near = implementation_of(structure).dense(**fitted.tensors)
    rest = weight - near
    return torch.log((rest @ gram * rest).sum())


def stream_choices(covariance):
    """{name: rotation `[K, K]`} for a stream with this covariance; the permutations come as matrices."""
    size = len(covariance)
    correlation = covariance / covariance.diagonal().sqrt() / covariance.diagonal().sqrt()[:, None]
    values, vectors = torch.linalg.eigh(correlation.square())
    embedding = vectors[:, -16:] * values[-16:].sqrt()
    embedding /= embedding.norm(dim=1, keepdim=True)
    order = balanced_kmeans(embedding, 16).argsort(stable=True)
    identity = torch.eye(size)
    permutations = {
        "random order": identity[torch.randperm(size, generator=torch.Generator().manual_seed(1))],
        "clustered by correlation": identity[order],
    }
    axes = principal(covariance)
    rotations = {
        "norms folded alone": identity,
        "random": random_rotation(size, size),
        "principal axes": axes,
        "principal axes, dealt out": axes[dealt(size, 16)],
    }
    return permutations, rotations
