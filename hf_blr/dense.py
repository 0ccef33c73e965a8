"""The dense layers that can be replaced: reading their weight as `[N, K]`, and building them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D


def conv1d_class() -> type[Conv1D]:
    """GPT-2's linear layer, whose weight is stored `[K, N]`."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D


def is_dense_linear(module: nn.Module) -> bool:
    """Whether this is an `nn.Linear`, a `Conv1D`, or of a subclass of `nn.Linear` that computes the same."""
    return type(module) in (nn.Linear, conv1d_class()) or (isinstance(module, nn.Linear) and acts_as_linear(module))


def acts_as_linear(module: nn.Linear) -> bool:
    """Whether a subclass of `nn.Linear` computes x W^T + b, and nothing else: asked of it with a small weight.

    Some add a name only, others a constant, a packed weight or a second output. PyTorch's own do not count: those in
    `nn.MultiheadAttention` are read and never called.
    """
    holds = dict(module.named_parameters())
    own = all(type(p) is nn.Parameter and p.is_floating_point() for p in holds.values())
    if type(module).__module__.startswith("torch.") or "weight" not in holds or not own:
        return False
    if holds.keys() - {"weight", "bias"} or any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return False
    if module.weight.shape != (module.out_features, module.in_features):
        return False
    numbers = torch.arange(6.0, device="cpu", dtype=torch.float64)
    weight, x = numbers.view(3, 2).sin(), numbers.view(3, 2).cos()
    bias = None if module.bias is None else numbers[:3] + 1
    # without the hooks, the mode and the memory of the module itself
    twin = type(module).__new__(type(module))
    twin.__dict__.update(vars(module), in_features=2, out_features=3)
    given = {"weight": weight, "bias": bias}
    twin._parameters = {key: None if value is None else nn.Parameter(value, False) for key, value in given.items()}
    try:
        out = type(module).forward(twin, x)
    except Exception:
        return False
    wanted = nn.functional.linear(x, weight, bias)
    return isinstance(out, torch.Tensor) and out.shape == wanted.shape and torch.allclose(out, wanted)


def is_transposed(module: nn.Module) -> bool:
    return type(module) is conv1d_class()


def stored_weight(module: nn.Module) -> Tensor:
    """The weight as the layer holds it."""
    # to torch's stubs an attribute of an unknown module is a tensor or a module
    weight: Any = module.weight
    return weight


def stored_bias(module: nn.Module) -> Tensor | None:
    """The bias that the layer holds, if any."""
    bias: Any = module.bias
    return bias


@contextmanager
def at_hand(module: nn.Module) -> Iterator[None]:
    """Inside, the layer's own tensors are in memory, also where accelerate has offloaded them."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def bring_in(module: nn.Module) -> None:
    """Keeps an offloaded layer's tensors in memory from now on, where they can be written to."""
    from accelerate.hooks import remove_hook_from_module
    from accelerate.utils import has_offloaded_params

    if has_offloaded_params(module):
        with at_hand(module):
            held = dict(module.named_parameters(recurse=False))
        remove_hook_from_module(module)
        for name, parameter in held.items():
            module.register_parameter(name, parameter)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight as `[N, K]`, a view without a copy."""
    weight = stored_weight(module).detach()
    return weight.T if is_transposed(module) else weight


def set_dense_weight(module: nn.Module, weight: torch.Tensor) -> None:
    """Overwrites the weight, in place, by `[N, K]` in any float dtype."""
    dense_weight(module).copy_(weight)


def feature_sizes(module: nn.Module) -> tuple[int, int]:
    """(K, N); of a tensor of experts, those of each."""
    n, k = dense_weight(module).shape[-2:]
    return k, n


def build_dense(weight: torch.Tensor, bias: torch.Tensor | None, transposed: bool) -> nn.Module:
    """An `nn.Linear`, or a `Conv1D` if `transposed`, holding weight `[N, K]` and bias `[N]`."""
    n, k = weight.shape
    module: nn.Linear | Conv1D
    if transposed:
        module = conv1d_class()(n, k).to(device=weight.device, dtype=weight.dtype)
        # Conv1D has a bias whether one is wanted or not
        values = {"weight": weight.T.contiguous(), "bias": torch.zeros_like(weight[:, 0]) if bias is None else bias}
    else:
        module = nn.Linear(k, n, bias=bias is not None, device="meta")
        values = {"weight": weight.contiguous()} | ({} if bias is None else {"bias": bias})
    for name, value in values.items():
        setattr(module, name, nn.Parameter(value.detach()))
    return module
