"""`compress`: plan, calibrate, fit and swap, on a model in memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from hf_blr.calibration.batches import calibration_batches, device_of
from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics
from hf_blr.calibration.given_statistics import check_statistics
from hf_blr.calibration.held_out import HeldOut
from hf_blr.calibration.padding import token_count
from hf_blr.calibration.store import Store
from hf_blr.checkpoint.origin import base_name, record_origin
from hf_blr.compression.fits import fit_layers
from hf_blr.compression.journal import Journal, Unkept
from hf_blr.compression.passes import start_of_passes
from hf_blr.compression.report import CompressionReport
from hf_blr.compression.shards import Shards
from hf_blr.compression.sharing import check_shared, shared_text
from hf_blr.compression.turning import Turn
from hf_blr.config import BLRConfig
from hf_blr.config.checks import check_unturned
from hf_blr.config.texts import DEFAULT, describe
from hf_blr.experts import dense_layers
from hf_blr.linear import blr_modules
from hf_blr.plan import check_kinds, check_plan, plan_from_layers, resolve_plan
from hf_blr.processes import Processes
from hf_blr.targets import find_targets, refuse_adapters, unwrapped
from hf_blr.text import Tokenizer, resolve_dataset


def compress(
    model: nn.Module,
    config: BLRConfig,
    *,
    tokenizer: Tokenizer | None = None,
    calibration: Iterable[Batch | Tensor] | str | Path | None = None,
    statistics: Statistics | None = None,
    resume: str | Path | Journal | None = None,
    max_memory: int | str | None = None,
    offload_folder: str | Path | None = None,
    shards: Shards | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> CompressionReport:
    """Replaces the config's target layers by block low-rank ones, in place.

    Stopped half-way by Ctrl-C or an error, it leaves a model that works: some layers are replaced, the config names
    them, and a warning says how many.

    Where fits are sequential, targets that stay dense because the budget is better spent elsewhere, or because a plan
    leaves them out, get other weights: those that make up for the layers compressed before them.

    Args:
        model: any module tree with `nn.Linear` or `Conv1D` layers. The plan is also written to the config of the
            transformers model that it is, wraps or is a part of, so that `save_pretrained` and `from_pretrained` work.
        config: what becomes what. With `config.layers` set, that plan is taken as it is.
        tokenizer: turns `config.dataset` into tokens; needed if there is one and none of the next two arguments. Also
            the model's processor, which turns images or sounds of `calibration` into batches.
        calibration: batches to fit to instead: dicts of the model's keyword arguments, or token ids `[B, T]`, one after
            the other, as a list, a loader or a generator, which is read once. Or a data set of `datasets` with a column
            of images or sounds, or a folder of images, of which `config.num_samples` are drawn.
        statistics: of the dense model, from `collect_statistics`, to fit several configs to one such run. Without
            `calibration` beside them, layers are fitted to them alone, whatever `config.sequential` says.
        resume: a folder of this compression alone. What is finished is kept there as it comes, and where a run was
            stopped, even killed, one with the same arguments goes on, with a dense model; the result is the same to the
            last bit. The folder is removed at the end; a `Journal` of it stays for the caller to remove, once the model
            is saved.
        max_memory: what statistics and hidden states of the text may take in memory, beside the model and the block at
            work: bytes, or "6GB". The rest lies in files, the statistics are gathered in as many passes as that takes,
            and the activations of blocks are computed again in the backward. The result is the same.
        offload_folder: where these files are, for as long as the call; None: where the system keeps temporary ones.
        shards: where finished layers are written as they come, instead of being kept in memory; the model is then to be
            saved by it. Experts, which are fitted one by one, stay in memory.
        distributed: share the work with the other processes of torch.distributed, which all make this call with the
            same model, config and text, each on its own device. Each runs its part of the text and fits its part of
            the layers, and all end with the same model, which is that of one process up to rounding.
        progress: show progress bars.

    Returns:
        The report; its layers are in the model's order.

    Raises:
        TypeError: before anything is changed, if an argument is of another kind, such as a model's name, batches that
            are no tensors, or what are no statistics or shards.
        ValueError: likewise, if the config does not fit the model, a weight is not finite, the model is partly
            offloaded or carries PEFT adapters, there is too little calibration text, or a model whose outputs depend on
            none of the layers meets a config that weighs them (`allocation="loss"`, `structure="auto"`), the model
            cannot be turned (see `turn_stream`) or its statistics are given where it is still to be, the folder of
            `resume` is about another model, config or text, or several processes are given different text, a journal or
            `block_steps`.
        OSError: if the journal or a shard cannot be written; what the journal holds stays.
    """
    started = time.perf_counter()
    check_kinds(model, config)
    # a limit that nobody can read is told before a model has written text for minutes
    store = Store(max_memory, offload_folder)
    processes = Processes(distributed)
    check_shared(processes, config, resume is not None)
    model = unwrapped(model)
    refuse_adapters(model)
    plan = plan_from_layers(config.layers) if config.layers else resolve_plan(model, config)
    check_plan(model, plan)
    if statistics is not None:
        check_statistics(statistics, plan)
        check_unturned(config)
    if shards is not None and not isinstance(shards, Shards):
        raise TypeError(f"shards must be a hf_blr.compression.Shards, got {type(shards).__name__}")
    turn = Turn.of(model, config.seed) if config.turned else None
    before = parameter_sizes(model)
    use_text = calibration is not None or statistics is None
    reads_dataset = calibration is None and statistics is None
    if config.dataset == DEFAULT:
        # the checkpoint says what was used, not what was the default at that time
        config = copy.copy(config)
        config.dataset = resolve_dataset(DEFAULT, model) if reads_dataset else None
    draw = partial(calibration_batches, model, config, tokenizer, calibration, progress)
    journal = resume if isinstance(resume, Journal) else Unkept() if resume is None else Journal(resume)
    if reads_dataset:
        journal.begin(model, config)
        batches, apart = journal.text(draw, device_of(model))
    else:
        batches, apart = draw() if use_text else ([], [])
        journal.begin(model, config, batches, statistics)
    batches = shared_text(processes, batches, given=calibration is not None)
    targets = {name: layer.matrices * layer.spec.dense_parameters for name, layer in plan.items()}
    names = list(plan)
    if config.layers:
        # what a given plan leaves out of the targets stays dense, like what a budget leaves out
        chosen = {*plan, *find_targets(model, config.target_modules, config.modules_to_not_convert)}
        names = [name for name in dense_layers(model) if name in chosen]
    with store:
        held_out = HeldOut(model, apart, store)
        # behind what the model as it was has to say, as it is rounded anew
        untied = 0 if turn is None else turn.apply()
        start = journal.start(
            partial(start_of_passes, model, plan, names, batches, statistics, config, store, processes, progress)
        )
        layers, blocks, held = fit_layers(
            model, names, start, batches, config, journal, store, shards, processes, progress
        )
        divergence = held_out.divergence(model)
    after = parameter_sizes(model)
    report = CompressionReport(
        parameters_before=before[0],
        parameters_after=after[0],
        bytes_before=before[1],
        bytes_after=after[1],
        fitted_to="activations" if batches or start.statistics is not None else "weights",
        calibration_tokens=token_count(batches),
        dataset=describe(config.dataset) if batches and reads_dataset else None,
        seconds=time.perf_counter() - started,
        layers=layers,
        blocks=blocks,
        predicted_loss=start.predicted_loss,
        divergence=divergence,
        held_out_tokens=held_out.tokens,
        untied_bytes=untied,
        left_dense={name: size for name, size in targets.items() if name not in start.plan},
    )
    record_origin(
        held,
        base_model=base_name(model),
        fitted_to=report.fitted_to,
        calibration_tokens=report.calibration_tokens,
        divergence=report.divergence,
        held_out_tokens=report.held_out_tokens,
    )
    if not isinstance(resume, Journal):
        journal.remove()
    return report


def parameter_sizes(model: nn.Module) -> tuple[int, int]:
    """(numbers, bytes) of the model's parameters and its factors' indices, shared ones counted once.

    A factor in bits counts as the numbers that it stands for, and with the bytes that it takes.
    """
    layers = blr_modules(model).values()
    held = {id(parameter) for layer in layers for parameter in layer.parameters()}
    others = [parameter for parameter in model.parameters() if id(parameter) not in held]
    numbers = sum(p.numel() for p in others) + sum(layer.num_parameters for layer in layers)
    stored = [*model.parameters(), *(index for layer in layers for index in layer.indices().values())]
    return numbers, sum(t.numel() * t.element_size() for t in stored)
