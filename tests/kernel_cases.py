"""Inputs and the error budget shared by the kernel tests, on the CPU under the interpreter and on a GPU."""

import torch

from hf_blr import ops
from hf_blr.formats import format_named
from hf_blr.inference.fusion import pack
from hf_blr.ops.activations import activated
from hf_blr.ops.rules.bits import PACKED
from hf_blr.structures import FACTOR, INDEX, structure_named, structures

#: {structure: (its op, its plain form)}
FUNCTIONS = {name: (ops.linear_of(name), ops.implementation_of(name).linear) for name in structures()}
NAMES = {name: ("x", *record.spec.names(), "bias") for name, record in structures().items()}
#: those that can share an input
GROUPED = tuple(name for name, record in structures().items() if record.grouped)


def factor_shapes(structure, b1, b2, p, q, r):
    if structure == "low_rank":
        return [(b2 * q, r), (r, b1 * p)]
    if structure == "pivoted":
        return [(b2 * q, r), (r, b1 * p - r)]
    if structure == "monarch":
        return [(b2, q, b1 * r), (b1, b2 * r, p)]
    return [(b2, q, r), (b2, b1, r), (b1, r, p)]


def make_inputs(structure, tokens, b1, b2, p, q, r, dtype, device="cpu", bias=True, seed=0):
    """[x, *factors, bias], scaled so that outputs are of order one; indices are in any order."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(shape, scale=1.0):
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    shapes = factor_shapes(structure, b1, b2, p, q, r)
    factors = [randn(s, max(1, s[-1]) ** -0.5) for s in shapes]
    if structure == "blast":
        factors[1] = randn(shapes[1], b1**-0.5)
    if structure == "pivoted":
        factors.append(torch.randperm(b1 * p, generator=generator, device=device).int())
    tensors = [randn((tokens, b1 * p)), *factors, *([randn((b2 * q,))] if bias else [])]
    return [t.requires_grad_(t.is_floating_point()) for t in tensors]


def attention_inputs(batch, heads, groups, length, d, dtype=torch.float32, device="cpu", seen=None):
    """q, k, v and a mask that shows `seen` keys, or a random choice of them, the newest among them."""
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(batch, h, t, d, generator=generator, device=device).to(dtype)
        for h, t in ((heads * groups, 1), (heads, length), (heads, length))
    )
    mask = torch.rand(batch, 1, 1, length, generator=generator, device=device) < 0.7
    mask[..., -1] = True
    if seen is not None:
        mask = (torch.arange(length, device=device) < seen).expand(batch, 1, 1, length).contiguous()
    return q, k, v, mask


def recorded_grids(monkeypatch, module, name):
    """The grids in which that kernel of a module is launched from now on."""
    grids, kernel = [], getattr(module, name)

    class Recorded:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, name, Recorded())
    return grids


def leaves(tensors):
    """Those with a gradient: all but indices."""
    return [t for t in tensors if t.is_floating_point()]


def wide(tensors):
    """In float64, detached; indices as they are."""
    return [t.detach().double() if t.is_floating_point() else t for t in tensors]


def run(function, tensors, grad=None, **kwargs):
    """[output, *gradients]"""
    out = function(*tensors, **kwargs)
    grad = torch.ones_like(out) if grad is None else grad.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves(tensors), grad)]


def assert_within_budget(structure, tensors, gradients=True, **kwargs):
    """Against float64, the kernel errs at most twice as much as eager PyTorch, plus a rounding."""
    kernel, eager = FUNCTIONS[structure]
    generator = torch.Generator(tensors[0].device).manual_seed(1)
    shape = (
        tensors[0].shape[0],
        tensors[1].shape[:-1].numel(),
    )
    grad = torch.randn(shape, generator=generator, device=tensors[0].device).to(tensors[0].dtype)
    exact = run(eager, [t.requires_grad_(t.is_floating_point()) for t in wide(tensors)], grad)
    low = run(eager, tensors, grad)
    ours = run(kernel, tensors, grad, impl="triton", **kwargs)
    names = ("out", *("d" + name for name in NAMES[structure] if name != "order"))
    rounding = torch.finfo(tensors[0].dtype).eps
    for name, got, cheap, truth in list(zip(names, ours, low, exact, strict=False))[: None if gradients else 1]:
        assert got.shape == truth.shape, name
        size = truth.norm() + 1e-30
        error, allowed = (got - truth).norm() / size, (cheap - truth).norm() / size
        assert error <= 2 * allowed + rounding, f"{name}: error {error:.2e}, eager errs {allowed:.2e}"


def make_layers(structure, sizes, b1=2, b2=3, p=8, dtype=torch.float32, bias=True, packed=True, device="cpu"):
    """[factors], [bias] of layers with these (Q, R) on one input, scaled so that outputs are of order one."""
    generator = torch.Generator(device).manual_seed(0)
    layers = []
    for q, r in sizes:
        shapes = [*factor_shapes(structure, b1, b2, p, q, r), (b2 * q,)]
        tensors = [torch.randn(s, generator=generator, device=device) * s[-1] ** -0.5 for s in shapes]
        layers.append(dict(zip(NAMES[structure][1:], (t.to(dtype) for t in tensors), strict=True)))
    if packed:
        pack(layers)
    biases = [layer.pop("bias") for layer in layers]
    return [tuple(layer.values()) for layer in layers], biases if bias else [None] * len(layers)


def assert_grouped_within_budget(structure, tokens, sizes, b1=2, p=8, device="cpu", **kwargs):
    """As `assert_within_budget`, for each of several layers on one input."""
    factors, biases = make_layers(structure, sizes, b1=b1, p=p, device=device, **kwargs)
    x = torch.randn(tokens, b1 * p, generator=torch.Generator(device).manual_seed(1), device=device).to(factors[0][0])
    eager = FUNCTIONS[structure][1]
    outs = ops.grouped_linear(structure, x, factors, biases, impl="triton")
    for out, f, b in zip(outs, factors, biases, strict=True):
        exact = eager(x.double(), *(t.double() for t in f), None if b is None else b.double())
        allowed = 2 * (eager(x, *f, b) - exact).norm() + torch.finfo(x.dtype).eps * exact.norm()
        assert out.shape == exact.shape and (out - exact).norm() <= allowed


def assert_gated_within_budget(structure, tokens, sizes, b1=2, p=8, device="cpu", **kwargs):
    """As `assert_grouped_within_budget`, of two layers, the first of which gates the second."""
    factors, biases = make_layers(structure, sizes, b1=b1, p=p, device=device, **kwargs)
    x = torch.randn(tokens, b1 * p, generator=torch.Generator(device).manual_seed(1), device=device).to(factors[0][0])

    def eager(x, factors, biases):
        gate, up = (FUNCTIONS[structure][1](x, *f, b) for f, b in zip(factors, biases, strict=True))
        return activated(up, "silu", gate)

    exact = eager(x.double(), [wide(f) for f in factors], [None if b is None else b.double() for b in biases])
    out = ops.gated_linear(structure, x, factors, biases, "silu", impl="triton")
    allowed = 2 * (eager(x, factors, biases) - exact).norm() + torch.finfo(x.dtype).eps * exact.norm()
    assert out.shape == exact.shape and (out - exact).norm() <= allowed


def layer_in_bits(structure, form, group, sizes, dtype, device="cpu"):
    """Tensors of a layer whose factors are in that format, as `ops.linear_in_bits` takes them, and as numbers."""
    storage = format_named(form, group)
    b1, b2, p, q, _ = sizes
    spec = structure_named(structure).spec
    shapes = [(b2 * q, b1 * p)] if structure == "dense" else factor_shapes(structure, *sizes)
    generator = torch.Generator(device).manual_seed(0)
    held, numbers = [], []
    for name, shape in zip(spec.names(FACTOR), shapes, strict=True):
        scale = b1**-0.5 if name == "s" else max(1, shape[-1]) ** -0.5
        factor = torch.randn(shape, generator=generator, device=device) * scale
        if name in spec.elementwise or 0 in shape:
            held.append(factor.to(dtype))
            numbers.append(held[-1].double())
            continue
        codes = storage.nearest(factor)
        held.append(ops.InBits(storage.laid_out(codes)[storage.code_part], codes.scale, storage.bits, shape[-1]))
        numbers.append(codes.numbers(torch.float64))
    for _ in spec.names(INDEX):
        held.append(torch.randperm(b1 * p, generator=generator, device=device).int())
        numbers.append(held[-1])
    return held, numbers


def assert_packed_within_budget(structure, form, group, tokens, sizes, dtype, device="cpu", bias=True, activation=""):
    """As `assert_within_budget`, of kernels that read codes and scales; eager multiplies the same numbers in dtype."""
    held, numbers = layer_in_bits(structure, form, group, sizes, dtype, device)
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(tokens, sizes[0] * sizes[2], generator=generator, device=device).to(dtype)
    b = torch.randn(sizes[1] * sizes[3], generator=generator, device=device).to(dtype) if bias else None
    eager = ops.implementation_of(structure).linear
    exact = activated(eager(x.double(), *numbers, None if b is None else b.double()), activation)
    cheap = activated(eager(x, *(t.to(dtype) if t.is_floating_point() else t for t in numbers), b), activation)
    out = ops.linear_in_bits(PACKED, structure, x, held, b, activation)
    error, allowed = (out - exact).norm(), 2 * (cheap - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    assert out.shape == exact.shape and error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    return float(error / exact.norm()), float((cheap - exact).norm() / exact.norm())
