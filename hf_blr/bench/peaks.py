"""The peaks of the device at hand: a copy and a product reach them. And how far predictions from them are off."""

from __future__ import annotations

import statistics
from functools import partial

import torch

from hf_blr import ops
from hf_blr.bench.in_bits import has_float8
from hf_blr.bench.shapes import LAYERS
from hf_blr.bench.timing import Timer
from hf_blr.formats import FORMATS, PLAIN
from hf_blr.ops.rules.device import H100, device_of
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.roofline.devices import Peaks
from hf_blr.roofline.stages import bound_of, stages, stored_stages
from hf_blr.roofline.training import training_stages
from hf_blr.structures import BLRSpec, Dense, LowRank, structure_named


def measure_peaks(device: str = "cuda", size: int = 8192, copied_bytes: int = 1 << 30) -> Peaks:
    """The peaks of the device at hand.

    Args:
        device: "cuda", or "cpu" for a try.
        size: of the large square product.
        copied_bytes: of the large copy.
    """
    timer = Timer(device)
    dtype = torch.bfloat16 if timer.on_gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * size**3 / timer.median(timer.captured(lambda: a @ b))
    source = torch.randn(copied_bytes // 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * copied_bytes / timer.median(timer.captured(lambda: target.copy_(source)))
    # what is left of a middling product when its arithmetic is taken away, and one of many tiny kernels in a row
    side, groups = min(1024, size // 8), 4
    x, y = (torch.randn(groups, side, side, device=device, dtype=dtype) for _ in range(2))
    product = timer.median(timer.captured(lambda: x @ y)) - 2 * groups * side**3 / flops
    tiny = torch.zeros(1024, device=device)

    def tiny_kernels() -> None:
        for _ in range(100):
            tiny.add_(1)

    kernel = timer.median(timer.captured(tiny_kernels)) / 100
    few = few_bandwidth(timer, size, dtype, kernel)
    float8 = None
    if has_float8(timer.device):
        ones, (rows, columns) = torch.ones(size, 1, device=device), (t.to(torch.float8_e4m3fn) for t in (a, b))
        multiply = partial(torch._scaled_mm, rows, columns.T, ones, ones.T, out_dtype=dtype, use_fast_accum=True)
        float8 = 2 * size**3 / timer.median(timer.captured(multiply))
    name = torch.cuda.get_device_name() if timer.on_gpu else "cpu"
    return Peaks(
        name,
        flops,
        bandwidth,
        timer.l2,
        few_bandwidth=few,
        scores=attention_scores(timer, size // 4, dtype),
        product_seconds=max(product, 0.0),
        kernel_seconds=kernel,
        float8_flops=float8,
        chip=device_of(x) if timer.on_gpu else H100,
    )


def attention_scores(timer: Timer, tokens: int, dtype: torch.dtype) -> float:
    """Scores a second of causal attention with heads of 64, which are so narrow that not the products are its limit."""
    q, k, v = (torch.randn(4, 16, tokens, 64, device=timer.device, dtype=dtype) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    return 4 * 16 * tokens**2 / 2 / timer.median(timer.captured(lambda: attend(q, k, v, is_causal=True)))


def few_bandwidth(timer: Timer, size: int, dtype: torch.dtype, kernel_seconds: float) -> float:
    """Bytes a second at which a low-rank layer of 16 tokens reads its factors, starts of its two kernels apart."""
    rank = size // 2
    u, v, x = (torch.randn(s, device=timer.device, dtype=dtype) for s in ((size, rank), (rank, size), (16, size)))
    seconds = timer.median(timer.captured(lambda: ops.low_rank_linear(x, u, v)), flush=True)
    return 2 * u.numel() * u.element_size() / max(seconds - 2 * kernel_seconds, seconds / 2)


def spec_of(row: dict) -> BLRSpec:
    """The sizes behind a row of `bench layers`. A dense row gives a spec of its features, for `form="dense"`."""
    layers = {(model, layer.name): layer for model, layers in LAYERS.items() for layer in layers}
    if "in_features" in row:
        k, n = row["in_features"], row["out_features"]
    else:
        layer = layers[row["model"], row["layer"]]
        k, n = layer.in_features, layer.out_features
    if row["structure"] == "dense":
        # dense in float8 counts its own stages
        return LowRank(k, n, 1) if row.get("format", PLAIN.name) == PLAIN.name else Dense(k, n, min(k, n))
    return structure_named(row["structure"]).spec(k, n, row["rank"], tuple(row["blocks"]))


def predictions(rows: list[dict], device: Peaks) -> list[dict]:
    """The rows of `bench layers` that ran dense or in the package's own form, with what was predicted.

    Of formats in bits fp8 alone, at more than 32 tokens and on a device that multiplies float8.

    Returns:
        Those rows with `predicted_us`, `deviation` (predicted / measured - 1), `bound`, `flops` and `bytes`.
    """
    found = []
    for row in rows:
        storage = row.get("format", PLAIN.name)
        if row["impl"] not in ("cublas", "hf_blr") or not (storage == PLAIN.name or is_float8(row, device)):
            continue
        spec, tokens = spec_of(row), row["tokens"]
        if storage != PLAIN.name:
            kernels = stored_stages(spec, FORMATS[storage], tokens, device)
        else:
            count = stages if row["direction"] == "forward" else training_stages
            kernels = count(spec, tokens, "dense" if row["structure"] == "dense" else "hf_blr", chip=device.chip)
        predicted = sum(stage.seconds(device) for stage in kernels) * 1e6
        more = {"predicted_us": predicted, "deviation": predicted / row["us"] - 1, "bound": bound_of(kernels, device)}
        sums = {"flops": sum(s.flops for s in kernels), "bytes": sum(s.bytes for s in kernels)}
        found.append({**row, **more, **sums})
    return found


def is_float8(row: dict, device: Peaks) -> bool:
    """Whether a row was, or would be, of products of float8 there."""
    return row["format"] == "fp8" and row["tokens"] > FEW_TOKENS and device.float8_flops is not None


def deviations(predicted: list[dict]) -> list[dict]:
    """How far off, by direction, tokens and structure: median and worst of |deviation|, and the share within 25 %."""
    groups: dict[tuple, list[float]] = {}
    for row in predicted:
        for structure in (row["structure"], "all"):
            key = row["direction"], row["tokens"], structure
            groups.setdefault(key, []).append(row["deviation"])
    return [
        {
            "direction": direction,
            "tokens": tokens,
            "structure": structure,
            "rows": len(values),
            "median |off| %": 100 * statistics.median(map(abs, values)),
            "worst %": 100 * max(values, key=abs),
            "within 25 %": f"{100 * sum(abs(v) <= 0.25 for v in values) / len(values):.0f} %",
        }
        for (direction, tokens, structure), values in sorted(groups.items())
    ]
