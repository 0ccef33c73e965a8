"""Compiling what a measurement of whole models will run: beforehand, in several processes, on models of two blocks.

Compiled code of a block does not depend on how many there are. Torch and Triton keep it on disk, where the measuring
process finds it.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from hf_blr.bench.models import SHAPES, Shape
from hf_blr.bench.rows import Request, measured_of, model_rows, tokens_of
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant


def compile_first(todo: list[tuple[str, Variant]], request: Request, device: str, jobs: int) -> None:
    """Run every measurement of these (model, variant) once on two blocks.

    Args:
        request: in mode "default": autotuning measures, for which it needs the device alone.
        jobs: processes.

    Raises:
        ValueError: for another mode.
    """
    if request.mode != "default":
        raise ValueError(f'compiling in several processes needs the mode "default", got {request.mode!r}')
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [
            pool.submit(run_once, name, variant, part, device)
            for name, variant in todo
            for part in parts(request, SHAPES[name])
        ]
        for job in running:
            job.result()


def parts(request: Request, shape: Shape) -> Iterator[Request]:
    """The request cut by what is compiled apart: each measurement, and each size of a forward or of a generation."""
    for measurement in measured_of(shape, request):
        part = replace(request, measurements=(measurement,))
        if measurement == "prefill":
            sizes = itertools.product(request.batches, tokens_of(shape, request))
            yield from (replace(part, batches=(batch,), tokens=(tokens,)) for batch, tokens in sizes)
        elif measurement == "decode":
            yield from (replace(part, decode_batches=(batch,)) for batch in request.decode_batches)
        elif measurement == "training":
            yield part


def run_once(name: str, variant: Variant, request: Request, device: str) -> None:
    """What fails here fails again when it is measured, and is said then."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    request = replace(request, blocks=2, profile=False, stop_at_errors=False)
    list(model_rows(name, SHAPES[name], [variant], request, Timer(device, 0.0)))
