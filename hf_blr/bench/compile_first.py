"""Compiling what a measurement of whole models will run: beforehand, in several processes, on models of two blocks.

Compiled code of a block does not depend on how many there are. Torch and Triton keep it on disk, where the measuring
process finds it.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial

from hf_blr.bench.models import SHAPES, Shape
from hf_blr.bench.rows import Request, model_rows
from hf_blr.bench.timing import Timer
from hf_blr.bench.variants import Variant


def compile_first(todo: list[tuple[str, Variant]], request: Request, device: str, jobs: int):
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
            pool.submit(run_once, name, variant, replace(request, measurements=(measurement,)), device)
            for name, variant in todo
            for measurement in request.measurements
            if measurement != "storage"
        ]
        for job in running:
            job.result()


def run_once(name: str, variant: Variant, request: Request, device: str):
    """What fails here fails again when it is measured, and is said then."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    request = replace(request, profile=False, stop_at_errors=False)
    list(model_rows(name, shallow(SHAPES[name]), [variant], request, Timer(device, 0.0)))


def shallow(shape: Shape) -> Shape:
    """The same model with two blocks."""
    blocks = "num_layers" if shape.kind == "diffusion" else "num_hidden_layers"
    return replace(shape, build=partial(shape.build, **{blocks: 2}))
