"""`compress`: plan, calibrate, fit and swap, on a model in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_blr.config import BLRConfig
from hf_blr.dense import dense_weight, feature_sizes, is_dense_linear
from hf_blr.factorize import factorize
from hf_blr.factorize.blockwise import Batch, iterate_grams, whole_model_grams
from hf_blr.integration.record import record_plan
from hf_blr.linear import LINEARS
from hf_blr.plan import Plan, plan_from_layers, resolve_plan
from hf_blr.report import CompressionReport, LayerReport
from hf_blr.text import load_text, sample_windows, tokenize

logger = logging.getLogger(__name__)

#: tokens of one calibration forward: enough to fill a GPU, and a small part of the model's own memory
TOKENS_PER_FORWARD = 16384


def compress(
    model: nn.Module,
    config: BLRConfig,
    *,
    tokenizer=None,
    calibration: Iterable[Batch | Tensor] | None = None,
    grams: dict[str, Tensor] | None = None,
    progress: bool = True,
) -> CompressionReport:
    """Replaces the config's target layers by block low-rank ones, in place.

    Args:
        model: any module tree with `nn.Linear` or `Conv1D` layers; for a transformers model the plan is also written
            to its config, so that `save_pretrained` and `from_pretrained` work.
        config: what becomes what. With `config.layers` set, that plan is taken as it is.
        tokenizer: turns `config.dataset` into tokens; needed if there is one and none of the next two arguments.
        calibration: batches to fit to instead: dicts of the model's keyword arguments, or token ids `[B, T]`.
        grams: {layer: X X^T `[K, K]`} from `collect_grams`, to fit several configs to one calibration run.
        progress: show progress bars.

    Returns:
        The report; its layers are in the model's order.

    Raises:
        ValueError: before anything is changed, if the config does not fit the model, a weight is not finite, the model
            is partly offloaded, or there is too little calibration text.
    """
    started = time.perf_counter()
    plan = plan_from_layers(config.layers) if config.layers else resolve_plan(model, config)
    check_plan(model, plan)
    before = parameter_sizes(model)
    batches = [] if grams is not None else calibration_batches(model, config, tokenizer, calibration)
    layers = []
    bar = tqdm(total=len(plan), desc="fitting", unit="layer", disable=not progress)
    for group in gram_groups(model, plan, batches, grams):
        for name, gram in group.items():
            layers.append(replace_layer(model, name, plan, gram, config))
            bar.set_postfix_str(f"{name} error {layers[-1].rel_error:.3f}", refresh=False)
            bar.update()
    bar.close()
    record_plan(model, config, plan)
    order = {name: i for i, name in enumerate(plan)}
    layers.sort(key=lambda layer: order[layer.name])
    after = parameter_sizes(model)
    return CompressionReport(
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        fitted_to="weights" if grams is None and not batches else "activations",
        calibration_tokens=sum(batch["input_ids"].numel() for batch in batches if "input_ids" in batch),
        seconds=time.perf_counter() - started,
        layers=layers,
    )


def collect_grams(model: nn.Module, config: BLRConfig, *, tokenizer=None, calibration=None) -> dict[str, Tensor]:
    """{target layer: X X^T `[K, K]`, float32} of the dense model on the calibration text, all layers in memory at once.

    Arguments and errors as for `compress`.
    """
    plan = resolve_plan(model, config)
    check_plan(model, plan)
    batches = calibration_batches(model, config, tokenizer, calibration)
    if not batches:
        raise ValueError("Grams need text: set BLRConfig(dataset=...) or pass calibration=")
    was_training = model.training
    model.eval()
    try:
        return whole_model_grams(model, list(plan), batches)
    finally:
        model.train(was_training)


def check_plan(model: nn.Module, plan: Plan):
    """Raises ValueError if a planned layer is not a dense layer of the planned size, or cannot be fitted."""
    placed = getattr(model, "hf_device_map", None) or {}
    if {"cpu", "disk"} & {str(device) for device in placed.values()} and len(set(placed.values())) > 1:
        raise ValueError(
            "the model is partly offloaded to the CPU or disk, where its layers cannot be replaced; load it on one "
            "device, or without device_map"
        )
    for name, layer in plan.items():
        module = model.get_submodule(name)
        if not is_dense_linear(module):
            raise ValueError(f"{name}: expected an nn.Linear or Conv1D to replace, got {type(module).__name__}")
        sizes = layer.spec.in_features, layer.spec.out_features
        if feature_sizes(module) != sizes:
            raise ValueError(f"{name}: the plan says {sizes} (in, out) features, the layer has {feature_sizes(module)}")
        if module.weight.is_meta:
            raise ValueError(f"{name}: the weight is on the meta device; load the model's weights first")
        if not torch.isfinite(module.weight).all():
            raise ValueError(f"{name}.weight holds NaN or infinity; the checkpoint is damaged or overflowed its dtype")


def gram_groups(model, plan, batches, grams) -> Iterator[dict[str, Tensor | None]]:
    """The layers to fit next, with their Grams, in the order in which they become ready."""
    if grams is not None:
        missing = [name for name in plan if name not in grams]
        if missing:
            raise ValueError(f"grams holds no matrix for {missing[0]} ({len(missing)} of {len(plan)} are missing)")
        yield {name: grams[name] for name in plan}
    elif not batches:
        yield dict.fromkeys(plan)
    else:
        waiting = dict.fromkeys(plan)
        for group in iterate_grams(model, list(plan), batches):
            waiting = {name: None for name in waiting if name not in group}
            yield group
        if waiting:
            logger.warning("no calibration input reached %s; fitted to the weights alone", ", ".join(waiting))
            yield waiting


def replace_layer(model: nn.Module, name: str, plan: Plan, gram: Tensor | None, config: BLRConfig) -> LayerReport:
    """Fits one layer and puts the result in its place."""
    started = time.perf_counter()
    module, spec = model.get_submodule(name), plan[name].spec
    device = config.device_for(module.weight)
    try:
        factors = factorize(
            dense_weight(module).to(device),
            spec,
            None if gram is None else gram.to(device),
            **config.fit_options,
        )
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    tensors = {key: value.to(module.weight) for key, value in factors.tensors.items()}
    fitted = LINEARS[type(spec)].from_factors(spec, tensors, module.bias, plan[name].transposed)
    model.set_submodule(name, fitted.train(module.training))
    return LayerReport(name, spec, factors.rel_error, factors.rounds, time.perf_counter() - started)


def calibration_batches(model, config: BLRConfig, tokenizer, calibration) -> list[Batch]:
    """The batches to fit to, on the model's device; empty for a fit to the weights alone."""
    device = next(model.parameters()).device
    if calibration is not None:
        batches = [{"input_ids": b} if torch.is_tensor(b) else dict(b) for b in calibration]
        if not batches:
            raise ValueError("calibration= holds no batch; give at least one, or leave it out to fit the weights alone")
    elif not config.calibrated:
        return []
    else:
        if tokenizer is None:
            raise ValueError(
                f"fitting to dataset={config.to_dict()['dataset']!r} needs a tokenizer: pass tokenizer=, or set "
                "dataset=None to fit the weights alone"
            )
        seqlen = min(config.seqlen, getattr(model.config, "max_position_embeddings", config.seqlen))
        tokens = tokenize(tokenizer, load_text(config.dataset, "train"))
        windows = sample_windows(tokens, seqlen, config.num_samples, config.seed)
        batches = [{"input_ids": part} for part in windows.split(batch_size(len(windows), seqlen))]
    return [{key: value.to(device) for key, value in batch.items()} for batch in batches]


def batch_size(windows: int, seqlen: int) -> int:
    """The largest divisor of `windows` within the token budget: batches of one shape can be replayed block by block."""
    limit = max(1, TOKENS_PER_FORWARD // seqlen)
    return max(size for size in range(1, limit + 1) if windows % size == 0)


def parameter_sizes(model: nn.Module) -> tuple[int, int]:
    """(numbers, bytes) in the model's parameters, shared ones counted once."""
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
