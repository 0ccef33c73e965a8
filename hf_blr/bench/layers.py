"""Time of one layer, dense and compressed, with its error against float64 beside each time.

All of a layer's rows come from one process. A time is the median over replays of a CUDA graph. Up to 32 tokens the
graph runs the layer once with each of several weight copies, more than the L2 cache holds, and the time is per copy;
above, the graph runs it once and L2 is overwritten before each replay. On a CPU the calls are timed one by one.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_blr import ops
from hf_blr.bench.cases import FORWARD, IMPLS, Case, wanted_impls
from hf_blr.bench.in_bits import float8_dense, has_float8, in_format
from hf_blr.bench.rivals import rivals_of
from hf_blr.bench.shapes import BASELINE, typical_indices
from hf_blr.bench.timing import Timer, cold_caches, seconds_of
from hf_blr.formats import FORMATS, PLAIN
from hf_blr.ops.rules.few_tokens import FEW_TOKENS
from hf_blr.ops.table import implementation_of
from hf_blr.structures import FACTOR, BLRSpec

logger = logging.getLogger(__name__)

PROTOCOL = (
    "median of CUDA-graph replays; up to 32 tokens weights rotate through more than L2, "
    "above, L2 is flushed before each replay"
)

#: {(spec, implementation, format): seconds}
FirstCalls = dict[tuple[BLRSpec, str, str], float]


def bench_case(
    case: Case,
    timer: Timer,
    dtype: torch.dtype,
    impls: Sequence[str] = IMPLS,
    first_calls: FirstCalls | None = None,
    formats: Sequence[str] = (PLAIN.name,),
) -> list[dict]:
    """The rows of one case: dense, then each spec in each implementation and format.

    Args:
        first_calls: {(spec, impl, format): seconds} from `first_call_seconds`; rows without an entry say None.
        formats: names of `FORMATS`; with those in bits the forward alone is timed, by the package's ops.

    Returns:
        Rows with `us` (microseconds), `dense_us` in dtype, `dense_fp8_us` and `dense_int4_us` (the fastest of PyTorch's
        and of `rivals`; None where none was timed), `lowrank_us` (two plain products), `speedup_vs_dense`, `rel_error`
        (of the forward's output, in norm, against float64 with the same weights, those in bits as numbers) and
        `first_call_s`.
    """
    k, n = case.layer.in_features, case.layer.out_features
    x, grad = inputs(case, timer.device, dtype)
    measure = Measurement(case, timer, x, grad)
    weight = torch.randn(n, k, device=timer.device, dtype=dtype) * k**-0.5
    library = "cublas" if timer.on_gpu else "eager"
    rows = [measure.row("dense", (1, 1), min(k, n), library, F.linear, [weight], F.linear)]
    in_bits = [name for name in formats if name != PLAIN.name and case.direction == FORWARD]
    if in_bits and has_float8(timer.device):
        function, weights, exact = float8_dense(weight)
        rows.append(measure.row("dense", (1, 1), min(k, n), library, function, weights, exact, 0, "fp8"))
    for name in in_bits:
        for impl, make in rivals_of(name, case.tokens, dtype).items():
            try:
                rows.append(measure.row("dense", (1, 1), min(k, n), impl, *make(weight), 0, name))
            except Exception as error:
                # another library's, which must not cost our own rows
                logger.warning("%s in %s is left out: %s", impl, name, error)
    for spec in case.specs:
        weights = random_factors(spec, timer.device, dtype)
        exact, count = implementation_of(spec.structure).linear, len(spec.names(FACTOR))
        for impl in wanted_impls(case, spec, impls) if PLAIN.name in formats else ():
            function = implementation(spec.structure, impl)
            row = measure.row(spec.structure, spec.num_blocks, spec.rank, impl, function, weights, exact, count)
            rows.append(row | {"first_call_s": (first_calls or {}).get((spec, impl, PLAIN.name))})
        for name in in_bits if "hf_blr" in impls else ():
            function, stored, exact = in_format(spec, FORMATS[name], weights)
            row = measure.row(spec.structure, spec.num_blocks, spec.rank, "hf_blr", function, stored, exact, 0, name)
            rows.append(row | {"first_call_s": (first_calls or {}).get((spec, "hf_blr", name))})
    dense_us = rows[0]["us"]
    dense = {name: [r["us"] for r in rows if (r["structure"], r["format"]) == ("dense", name)] for name in FORMATS}
    baseline = [r["us"] for r in rows if (r["structure"], r["impl"]) == (BASELINE, "eager")]
    compared = {
        "dense_us": dense_us,
        "dense_fp8_us": min(dense["fp8"], default=None),
        "dense_int4_us": min(dense["int4"], default=None),
        "lowrank_us": baseline[0] if baseline else None,
    }
    return [row | compared | {"speedup_vs_dense": dense_us / row["us"]} for row in rows]


@dataclass(frozen=True)
class Measurement:
    """What the rows of one case share."""

    case: Case
    timer: Timer
    x: Tensor
    grad: Tensor

    def row(
        self,
        structure: str,
        blocks: tuple[int, int],
        rank: int,
        impl: str,
        function: Callable[..., Tensor],
        weights: list[Tensor],
        exact: Callable[..., Tensor],
        factors: int = 1,
        storage: str = PLAIN.name,
    ) -> dict[str, Any]:
        """factors: how many of the weights `exact` gets in float64; those that follow it gets as they are."""
        case, few = self.case, self.case.tokens <= FEW_TOKENS
        call = prepared_call(function, self.x, self.grad, case.direction, factors)
        wide = [t.double() for t in (self.x, *weights[:factors])]
        microseconds = self.timer(call, self.timer.copies(weights, case.tokens), flush=not few)
        with torch.no_grad():
            error = relative_error(function(self.x, *weights), exact(*wide, *weights[factors:]))
        return {
            "model": case.model,
            "layer": case.layer.name,
            "in_features": case.layer.in_features,
            "out_features": case.layer.out_features,
            "tokens": case.tokens,
            "direction": case.direction,
            "structure": structure,
            "blocks": list(blocks),
            "rank": rank,
            "format": storage,
            "impl": impl,
            "us": microseconds,
            "rel_error": error,
            "first_call_s": None,
        }


def implementation(structure: str, impl: str) -> Callable[..., Tensor]:
    """The function `(x, *factors)` of a structure in one of `IMPLS`."""
    if impl == "hf_blr":
        return ops.linear_of(structure)
    function = implementation_of(structure).linear
    if impl == "eager":
        return function
    # torch.compile gives up, in silence, after eight shapes of one function
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def first_call_seconds(
    case: Case,
    device: torch.device | str,
    dtype: torch.dtype,
    keep: Path | None = None,
    formats: Sequence[str] = (PLAIN.name,),
) -> FirstCalls:
    """{(spec, "hf_blr", format): seconds of a first call, nothing compiled before}; the device has been used.

    Args:
        keep: a Triton cache folder that receives the compiled kernels.
        formats: names of `FORMATS`.
    """
    device = torch.device(device)
    x, grad = inputs(case, device, dtype)
    # so that the libraries' own start is not counted
    weight = torch.ones(case.layer.out_features, case.layer.in_features, device=device, dtype=dtype)
    prepared_call(F.linear, x, grad, case.direction)([weight])
    seconds: FirstCalls = {}
    for spec, name in itertools.product(case.specs, formats):
        function, count = implementation(spec.structure, "hf_blr"), len(spec.names(FACTOR))
        weights = random_factors(spec, device, dtype)
        if name != PLAIN.name:
            if case.direction != FORWARD:
                continue
            function, weights, _ = in_format(spec, FORMATS[name], weights)
        call = prepared_call(function, x, grad, case.direction, count)
        with cold_caches(keep):
            seconds[spec, "hf_blr", name] = seconds_of(lambda c=call, w=weights: c(w), device)
    return seconds


def prepared_call(
    function: Callable[..., Tensor], x: Tensor, grad: Tensor, direction: str, factors: int = 1
) -> Callable[[list[Tensor]], Any]:
    """`call(weights)`: the layer forward without autograd, or forward and backward to x and the first `factors`."""
    if direction == FORWARD:

        def call(weights: list[Tensor]) -> Tensor:
            with torch.no_grad():
                return function(x, *weights)

        return call
    x = x.detach().requires_grad_()

    def step(weights: list[Tensor]) -> None:
        leaves = [w.detach().requires_grad_() for w in weights[:factors]]
        torch.autograd.grad(function(x, *leaves, *weights[factors:]), [x, *leaves], grad)

    return step


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x `[T, K]` and the gradient of the output `[T, N]`, the same for every call with the same case."""
    torch.manual_seed(0)
    sizes = (case.layer.in_features, case.layer.out_features)
    x, grad = (torch.randn(case.tokens, size, device=device, dtype=dtype) for size in sizes)
    return x, grad


def random_factors(spec: BLRSpec, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Factors and indices in the order in which the ops take them, scaled so that outputs stay near one."""
    shapes = spec.shapes(FACTOR).values()
    factors = [torch.randn(s, device=device, dtype=dtype) * max(1, s[-1]) ** -0.5 for s in shapes]
    return [*factors, *typical_indices(spec, device).values()]


def relative_error(out: Tensor, exact: Tensor) -> float:
    return ((out.double() - exact).norm() / exact.norm()).item()
