"""Orthogonal steps: those of `torch.optim.Muon`, of many matrices at once, and Adam's for the rest."""

import pytest
import torch
from torch import nn

from hf_blr.calibration.muon import Muon, orthogonal

SHAPES = [(40, 24), (24, 130), (70, 70), (7, 3)]


def parameters(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def take(optimizer, given, steps=4):
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for p in given:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def test_steps_are_those_of_torch():
    ours, theirs = parameters(SHAPES), parameters(SHAPES)
    take(Muon([{"params": ours, "lr": 0.1}]), ours)
    take(torch.optim.Muon(theirs, lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"), theirs)
    for a, b, start in zip(ours, theirs, parameters(SHAPES), strict=True):
        # they round to bfloat16 in each product
        assert (a - b).norm() < 0.02 * (a - start).norm()


def test_more_dimensions_are_batches_of_matrices():
    (batch,) = parameters([(3, 20, 30)])
    alone = [nn.Parameter(matrix.detach().clone()) for matrix in batch]
    one, many = Muon([{"params": [batch], "lr": 0.1}]), Muon([{"params": alone, "lr": 0.1}])
    for step in range(3):
        batch.grad = torch.randn(batch.shape, generator=torch.Generator().manual_seed(step))
        for p, gradient in zip(alone, batch.grad, strict=True):
            p.grad = gradient.clone()
        one.step(), many.step()
    assert torch.allclose(batch, torch.stack([*alone]), atol=1e-5)


def test_each_group_has_its_own_rate_and_a_schedule_reaches_all():
    near, far, other = parameters([(8, 8), (8, 8), (5,)])
    start = [p.detach().clone() for p in (near, far, other)]
    optimizer = Muon([{"params": [near], "lr": 0.01}, {"params": [far], "lr": 0.1}], [{"params": [other], "lr": 0.3}])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: float(i == 0))
    for p in (near, far, other):
        p.grad = torch.ones_like(p)
    near.grad = far.grad = torch.eye(8)
    optimizer.step()
    moved = [(p - q).square().mean().sqrt().item() for p, q in zip((near, far, other), start, strict=True)]
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)
    # singular values end between 0.7 and 1.2
    assert 0.6 * 0.02 < moved[1] < 1.3 * 0.02 and moved[2] == pytest.approx(0.3, rel=1e-3)
    schedule.step()
    after = [p.detach().clone() for p in (near, far, other)]
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip((near, far, other), after, strict=True))


def test_what_got_no_gradient_stays():
    stays, moves = parameters([(6, 4), (6, 4)])
    before = stays.detach().clone()
    moves.grad = torch.randn(6, 4)
    Muon([{"params": [stays, moves], "lr": 0.1}]).step()
    assert torch.equal(stays, before) and not torch.equal(moves, before)


def test_directions_come_out_alike():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(48, 16, generator=generator))[0]
    x = u @ torch.diag(torch.logspace(0, -2, 16)) @ v.T
    found = orthogonal(x[None])[0]
    values = (u.T @ found @ v).diagonal()
    assert values.min() > 0.3 and values.max() < 1.3
    assert torch.linalg.svdvals(found).allclose(values.sort(descending=True)[0], atol=1e-3)
    assert torch.equal(orthogonal(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))
