"""Dense layers in few bits by other libraries' kernels, which ours are timed beside: PyTorch's, gemlite's, torchao's.

Each function takes a weight `[N, K]` in bfloat16 on a GPU and returns (forward (x, *stored), stored, the same on
dequantised numbers in x's dtype), as `in_bits.float8_dense` does. gemlite and torchao are imported when asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr.ops.rules.few_tokens import FEW_TOKENS

#: numbers of a row that share a scale and a zero in int4
GROUP = 64
#: of which GPU gemlite's own settings are taken where it has none for the one at hand: of the same architecture
GEMLITE_SETTINGS = "h100.json"

Rival = tuple[Callable[..., Tensor], list[Tensor], Callable[..., Tensor]]


def quantised(weight: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor, Tensor]:
    """Levels 0 to 15 `[N, K/group, group]`, and scale and lowest value `[N, K/group, 1]` of each group, in float32."""
    groups = weight.float().unflatten(1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8)
    return ((groups - low) / scale).round().clamp(0, 15), scale, low


def int4_by_pytorch(weight: Tensor, group: int = GROUP) -> Rival:
    """PyTorch's own kernel, which torchao's int4 of weights alone runs on GPUs too."""
    levels, scale, low = quantised(weight, group)
    packed = levels.flatten(1).to(torch.uint8)
    packed = packed[:, ::2] << 4 | packed[:, 1::2]
    # the kernel's zero is what the level 8 stands for
    scales = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).to(torch.bfloat16).contiguous()
    return pytorch_int4, [torch.ops.aten._convert_weight_to_int4pack(packed, 8), scales, packed], pytorch_int4_exact


def pytorch_int4(x: Tensor, tiles: Tensor, scales: Tensor, packed: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x, tiles, x.shape[-1] // scales.shape[0], scales)


def pytorch_int4_exact(x: Tensor, tiles: Tensor, scales: Tensor, packed: Tensor) -> Tensor:
    levels = torch.stack([packed >> 4, packed & 15], -1).flatten(1).unflatten(1, (scales.shape[0], -1)).to(x.dtype)
    scale, zero = scales.to(x.dtype).transpose(0, 1).split(1, dim=-1)
    return F.linear(x, ((levels - 8) * scale + zero).flatten(1))


def int4_by_gemlite(weight: Tensor) -> Rival:
    """gemlite's layer of 16-bit inputs and 4-bit weights."""
    levels, scale, low = quantised(weight)
    maker = gemlite().helper.A16W4_HQQ_INT(device=str(weight.device), dtype=weight.dtype)
    layer = maker.from_weights(levels.flatten(1).to(torch.uint8), scale.squeeze(-1), (-low / scale).squeeze(-1))
    return gemlite_forward(tuple(layer.get_meta_args())), tensors_of(layer), gemlite_int4_exact


def gemlite_int4_exact(x: Tensor, words: Tensor, scales: Tensor, zeros: Tensor, _: Tensor) -> Tensor:
    # 32-bit words and groups lie along K; what is added to a group is minus its zero times its scale
    levels = torch.stack([words >> 4 * j & 15 for j in range(8)], 1).flatten(0, 1).unflatten(0, (-1, GROUP))
    return x @ (levels.to(x.dtype) * scales.to(x.dtype)[:, None] + zeros.to(x.dtype)[:, None]).flatten(0, 1)


def float8_by_gemlite(weight: Tensor) -> Rival:
    """gemlite's layer in float8, which casts its inputs token by token."""
    layer = gemlite().helper.A8W8_fp8_dynamic(device=str(weight.device), dtype=weight.dtype).from_weights(weight)
    return gemlite_forward(tuple(layer.get_meta_args())), tensors_of(layer), gemlite_float8_exact


def gemlite_float8_exact(x: Tensor, codes: Tensor, scales: Tensor, *_: Tensor) -> Tensor:
    return x @ (codes.to(x.dtype) * scales.to(x.dtype).view(1, -1))


def tensors_of(layer: Any) -> list[Tensor]:
    return [t.detach() for t in layer.get_tensor_args()]


@functools.cache
def gemlite_forward(settings: tuple[int, ...]) -> Callable[..., Tensor]:
    """The op that a layer with these settings calls, on tensors like its own."""

    def forward(x: Tensor, *tensors: Tensor) -> Tensor:
        found: Tensor = torch.ops.gemlite.forward_functional(x, None, list(tensors), settings, -1)
        return found

    return forward


def float8_by_torchao(weight: Tensor) -> Rival:
    """torchao's float8, whose inputs compiled code casts token by token."""
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    quantise_by_torchao(linear, [""])
    return torch.compile(F.linear, dynamic=False), [linear.weight.detach()], torchao_exact


def torchao_exact(x: Tensor, held: Any) -> Tensor:
    return F.linear(x, held.dequantize().to(x.dtype))


def quantise_by_torchao(model: torch.nn.Module, names: Collection[str]) -> None:
    """The linear layers of these names in float8, in place; torch.compile's own settings stay as they are."""
    quantization = needed("torchao.quantization")
    settings = {"granularity": quantization.PerRow(), "set_inductor_config": False}
    config = quantization.Float8DynamicActivationFloat8WeightConfig(**settings)
    quantization.quantize_(model, config, filter_fn=lambda _, name: name in names)


def train_by_torchao(model: torch.nn.Module, names: Collection[str]) -> None:
    """Lets the linear layers of these names multiply in float8 while they train, in place: a scale a row, dynamic."""
    float8 = needed("torchao.float8")
    config = float8.Float8LinearConfig.from_recipe_name("rowwise")
    float8.convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in names)


#: {format: {implementation: what makes a layer}}
RIVALS: dict[str, dict[str, Callable[[Tensor], Rival]]] = {
    "int4": {"PyTorch": int4_by_pytorch, "gemlite": int4_by_gemlite},
    "fp8": {"torchao": float8_by_torchao, "gemlite": float8_by_gemlite},
}


def rivals_of(form: str, tokens: int, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Rival]]:
    """Those of a format that can be timed here: of bfloat16, torchao's for any number of tokens, others for few."""
    found = RIVALS.get(form, {}).items() if dtype == torch.bfloat16 else ()
    return {name: make for name, make in found if not missing(name) and (name == "torchao" or tokens <= FEW_TOKENS)}


def missing(implementation: str) -> str | None:
    """Why this one cannot be timed here; None if it can."""
    if implementation != "PyTorch" and importlib.util.find_spec(implementation) is None:
        return f"{implementation} is not installed"
    return None if torch.cuda.is_available() else f"{implementation}'s kernels need a GPU"


def gemlite() -> Any:
    """The module, with settings of its kernels for this card."""
    module = needed("gemlite")
    core = needed("gemlite.core")
    if core.selected_tag is None:
        module.load_config(str(Path(module.__file__).parent / "configs" / GEMLITE_SETTINGS))
    return module


def needed(name: str) -> Any:
    """The module. Raises ImportError with the remedy where its package is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(f"timing layers of {package} needs it: pip install {package} ({error})") from error
