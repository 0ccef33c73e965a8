"""The rows of `bench model`: every variant of a model through every measurement asked for."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_blr.bench import generation, measure
from hf_blr.bench.forms import forget_compiled
from hf_blr.bench.inputs import longest_text
from hf_blr.bench.models import Shape
from hf_blr.bench.rival_layers import RivalLinear, bytes_of
from hf_blr.bench.timing import Timer, allocated
from hf_blr.bench.variants import Variant, build_model
from hf_blr.linear import BLRLinear
from hf_blr.structures import FACTOR
from hf_blr.targets import find_targets


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        measurements: of `measure.MEASUREMENTS`.
        tokens: of a forward over text, or of the sizes of pictures that a model has; None takes the model's own list.
        batches: of a forward.
        forms: of `forms.FORMS`, for forwards and generation; those in `measure.TRAINING_FORMS` for training, beside
            eager.
        mode: of torch.compile, of `forms.MODES`.
        decode_batches, prompt, new_tokens: of generation.
        training_batch, training_tokens: of a training step; no more tokens than the model has positions.
        activation_budget: of a training step, `measure.training`'s.
        ratio: kept / dense parameters of a layer where the paper's ranks are not asked for.
        dtype: of all parameters.
        blocks: repeated blocks to build in place of all that the model has; its name in the rows then says so.
        profile: add what each kernel of a forward or a decoding step takes.
        stop_at_errors: raise instead of writing the error into the row.
    """

    measurements: tuple[str, ...] = measure.MEASUREMENTS
    tokens: tuple[int, ...] | None = None
    batches: tuple[int, ...] = (1, 8)
    forms: tuple[str, ...] = ("compiled",)
    mode: str = "max-autotune"
    decode_batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 128
    new_tokens: int = 64
    training_batch: int = 1
    training_tokens: int = 2048
    activation_budget: float = 1.0
    ratio: float = 0.5
    dtype: torch.dtype = torch.bfloat16
    blocks: int | None = None
    profile: bool = False
    stop_at_errors: bool = False


def model_rows(name: str, shape: Shape, variants: list[Variant], request: Request, timer: Timer) -> Iterator[dict]:
    """One row for each variant, measurement, form, batch and number of tokens, as soon as it is measured.

    A measurement that fails gives a row with `error`, and the others go on.
    """
    if request.blocks is not None:
        name, shape = f"{name}, {request.blocks} blocks", shape.of_blocks(request.blocks)
    tokens = tokens_of(shape, request)
    groups = [(t,) for t in tokens] if shape.options else [tokens]
    try:
        names = trained_names(shape)
    except ImportError as error:
        if request.stop_at_errors:
            raise
        yield {"model": name, "variant": "", "measurement": "build", "error": in_one_line(error)}
        return
    model: nn.Module | None = None
    run: Callable[[], dict[str, Any]] | None = None
    for variant in variants:
        for group in groups:
            # what the model before left behind is not this one's
            forget_compiled()
            gc.collect()
            before = allocated(timer.device)
            try:
                options = shape.options_for(group[0])
                model = build_model(shape, variant, request.ratio, str(timer.device), request.dtype, **options)
            except Exception as error:
                if request.stop_at_errors:
                    raise
                yield {"model": name, "variant": str(variant), "measurement": "build", "error": in_one_line(error)}
                continue
            sizes = {"model": name, "variant": str(variant), **model_sizes(model, names)}
            if variant.by:
                sizes["rival"] = True
            if variant.structure != "dense" and not variant.paper:
                sizes["ratio"] = request.ratio
            for settings, run in measurements(model, shape, names, group, request, timer):
                row = {**sizes, **settings}
                try:
                    row |= run()
                    if row.get("peak_bytes"):
                        row["peak_bytes"] -= before
                except Exception as error:
                    if request.stop_at_errors:
                        raise
                    row["error"] = in_one_line(error)
                yield row
            # the last function holds the model too
            model = run = None


def tokens_of(shape: Shape, request: Request) -> tuple[int, ...]:
    """Of the forwards: those asked for. The size of a picture is the model's: it can be chosen among those it has."""
    tokens = request.tokens or shape.prefill
    if shape.kind == "text":
        return tokens
    return tuple(t for t in shape.prefill if t in tokens) or shape.prefill


def measured_of(shape: Shape, request: Request) -> tuple[str, ...]:
    """Those asked for that this kind of model has: pictures are not decoded, diffusers' models are no Trainer's."""
    missing = {"text": (), "image": ("decode",), "diffusion": ("decode", "training", "storage")}[shape.kind]
    return tuple(measurement for measurement in request.measurements if measurement not in missing)


def measurements(
    model: nn.Module, shape: Shape, names: list[str], tokens: tuple[int, ...], request: Request, timer: Timer
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """(settings, function) of each measurement, in an order in which none disturbs the next."""
    wanted, mode = measured_of(shape, request), request.mode
    for form in request.forms if "prefill" in wanted else ():
        for batch in request.batches:
            for t in tokens:
                settings = {"measurement": "prefill", "batch": batch, "tokens": t, "form": form}
                yield (
                    settings | mode_of(form, mode),
                    partial(measure.prefill, model, shape.kind, batch, t, form, mode, timer, request.profile),
                )
    if "decode" in wanted:
        for form in request.forms:
            for batch in request.decode_batches:
                settings = {"measurement": "decode", "batch": batch, "tokens": 1, "form": form}
                lengths = {"prompt": request.prompt, "new_tokens": request.new_tokens}
                yield (
                    settings | lengths | mode_of(form, mode),
                    partial(
                        generation.decode,
                        model,
                        batch,
                        request.prompt,
                        request.new_tokens,
                        form,
                        mode,
                        timer.device,
                        request.profile,
                    ),
                )
    if "training" in wanted:
        batch, t = request.training_batch, tokens[0]
        if shape.kind == "text":
            t = min(request.training_tokens, longest_text(model))
        for form in (f for f in measure.TRAINING_FORMS if f in ("eager", *request.forms)):
            settings = {"measurement": "training", "batch": batch, "tokens": t, "form": form}
            if form == "compiled" and request.activation_budget != 1.0:
                settings["activation_budget"] = request.activation_budget
            yield (
                settings | mode_of(form, mode),
                partial(
                    measure.training,
                    model,
                    shape.kind,
                    names,
                    batch,
                    t,
                    form,
                    mode,
                    timer,
                    request.activation_budget,
                ),
            )
    if "storage" in wanted:
        yield {"measurement": "storage", "form": "eager"}, lambda: measure.storage(model, timer.device)


def mode_of(form: str, mode: str) -> dict:
    return {"mode": mode} if form in ("compiled", "whole") else {}


def trained_names(shape: Shape) -> list[str]:
    """The modules that a compression replaces by default, and that a training step trains in every variant."""
    with torch.device("meta"):
        return find_targets(shape.build())


def model_sizes(model: nn.Module, names: list[str]) -> dict:
    """Parameters and bytes of the model, and the numbers that its projections hold; of codes, what they stand for."""
    parameters = list(model.parameters())
    rivals = [module for module in model.modules() if isinstance(module, RivalLinear)]
    return {
        "parameters": sum(p.numel() for p in parameters) + sum(map(numbers_of, rivals)),
        "weight_bytes": sum(map(bytes_of, parameters)) + sum(layer.bytes_read() for layer in rivals),
        "projection_parameters": sum(numbers_of(model.get_submodule(name)) for name in names),
    }


def numbers_of(layer: nn.Module) -> int:
    """The numbers that a projection holds, its bias among them."""
    if isinstance(layer, RivalLinear):
        return layer.in_features * layer.out_features
    if not isinstance(layer, BLRLinear):
        return sum(p.numel() for p in layer.parameters())
    factors = sum(map(math.prod, layer.spec.shapes(FACTOR).values()))
    return factors + (0 if layer.bias is None else layer.bias.numel())


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
