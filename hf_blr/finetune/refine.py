"""Training all factors together, towards the dense model."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.fisher import Statistics, fisher_statistics
from hf_blr.calibration.stand_ins import stood_in, with_stand_ins
from hf_blr.calibration.training_form import FACTOR_CODES, training_form
from hf_blr.config import BLRConfig
from hf_blr.finetune.best import KeepBest
from hf_blr.finetune.callback import BLRCallback
from hf_blr.finetune.loop import train
from hf_blr.finetune.matrices import on_matrices
from hf_blr.finetune.trainable import factor_parameter_groups, mark_only_factors_trainable
from hf_blr.modes import without_dropout
from hf_blr.ops import current_impl, use_impl
from hf_blr.targets import remaining_targets

#: from this many tokens a step training runs on matrices that are made once a step (`matrices`)
DENSE_STEP_TOKENS = 8192

#: what decides in which form a layer trains needs less text than a fit
STATISTICS_TOKENS = 32768


def refine(
    model: nn.Module,
    teacher: nn.Module,
    windows: Tensor | Sequence[Batch],
    *,
    epochs: int = 8,
    batch_size: int = 8,
    learning_rate: float = 3e-4,
    distill_weight: float = 0.9,
    dense_rate: float = 0.0,
    bits: str = FACTOR_CODES,
    held_out: Tensor | None = None,
    compiled: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Refines all factors together, in place, on the text that they were fitted to; returns the log history.

    The loss is the language model's own and the divergence from the dense model, mixed by `distill_weight`. On a GPU
    it computes in bfloat16 around float32 factors; give the model in float32. Pivoted layers are
    trained as plain pairs of factors and get their pivots anew at the end, unless they are kept in bits. The loss of a
    model without logits, such as a sentence encoder, is the squared error of its features over the dense model's sum of
    squares. Dropout is off: the dense model's outputs know nothing of what it drops.

    A dense model is one whose targets were all left dense: with a `dense_rate` it trains them, which says what the text
    alone does for a model.

    Args:
        model: compressed, a causal language model or one without logits; it comes back in evaluation mode.
        teacher: the dense model.
        windows: token ids `[n, seqlen]`, of which `batch_size` make a step; or batches of one step each, as the model
            reads them: dicts of its keyword arguments, with labels where it has a loss of its own.
        epochs, batch_size, learning_rate, seed: of AdamW with a cosine schedule and no weight decay.
        distill_weight: share of the divergence in the loss.
        dense_rate: the learning rate of the targets that a budget left dense, as a share of the factors'. They cost no
            parameter; with little text training them fits that text.
        bits: what trains of layers that are kept in bits: "scales"; "factor_codes", scales and the codes of factors,
            straight-through; "codes", those of whole matrices too. With little text those fit that text.
        held_out: token ids `[n, seqlen]` of other text, of which 8192 tokens are read. Ten times the divergence from
            the dense model is measured there; the training stops when it has not fallen three times in a row, and the
            factors of the least one are kept, be it those of the start. The history has it as "held_out_divergence".
        compiled: run the blocks of both models by `torch.compile`, from 8192 tokens a step on. Blocks of a kind share
            their code, whatever their ranks. It costs some 20 seconds at first.

    Raises:
        ValueError: if `held_out` holds no window.
        TypeError: if `windows` are text, or lists of ids.
    """
    on_gpu = next(model.parameters()).is_cuda
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    tokens, steps = step_size(windows, batch_size)
    dense = tokens >= DENSE_STEP_TOKENS
    impl = use_impl("dense" if dense else current_impl())
    best = KeepBest(teacher, held_out) if held_out is not None else None
    forms = with_stand_ins(model, statistics_for(model, windows)), training_form(model, bits)
    with (
        tempfile.TemporaryDirectory() as folder,
        forms[0],
        forms[1],
        impl,
        without_dropout(model),
        ExitStack() as stack,
    ):
        if dense:
            stack.enter_context(on_matrices(model, teacher, torch.bfloat16 if bf16 else torch.float32, compiled))
        left = targets_left_dense(model) if dense_rate else []
        mark_only_factors_trainable(model, also=left, bits=bits)
        groups = factor_parameter_groups(model, learning_rate, other_lr=dense_rate * learning_rate)
        callback = BLRCallback(train_also=left, teacher=teacher, distill_weight=distill_weight, train_bits=bits)
        history = train(
            model,
            windows,
            [callback, *([best] if best else [])],
            torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=on_gpu),
            output_dir=folder,
            max_steps=epochs * steps,
            per_device_train_batch_size=batch_size,
            max_grad_norm=1.0,
            bf16=bf16,
            use_cpu=not on_gpu,
            seed=seed,
            disable_tqdm=True,
        )
    model.eval()
    return history + (best.log if best else [])


def targets_left_dense(model: nn.Module) -> list[str]:
    """The layers that the model's config targets and that are dense all the same; of a dense model all by default."""
    model_config: Any = model.config
    config = getattr(model_config, "quantization_config", None)
    # of what was dequantised while it was loaded, the config can be another format's
    if not isinstance(config, BLRConfig):
        return remaining_targets(model)
    return remaining_targets(model, config.target_modules, config.modules_to_not_convert)


def step_size(windows: Tensor | Sequence[Batch], batch_size: int) -> tuple[int, int]:
    """(tokens of a step at most, steps of an epoch). Raises TypeError for what are neither windows nor batches."""
    if torch.is_tensor(windows):
        return batch_size * windows.shape[1], -(-len(windows) // batch_size)
    for batch in windows:
        if not isinstance(batch, Mapping):
            raise TypeError(
                "windows must be token ids [n, seqlen], or batches, each a dict of the model's arguments; got a "
                f"{type(batch).__name__}: hf_blr.text.load_windows makes windows of text"
            )
    return max((tokens_in(batch) for batch in windows), default=0), len(windows)


def tokens_in(batch: Batch) -> int:
    return next(iter(batch.values())).numel()


def statistics_for(model: nn.Module, windows: Tensor | Sequence[Batch]) -> Statistics | None:
    """Of the inputs and outputs of layers that train in another form, on some of the windows; None without any."""
    names = list(stood_in(model))
    if not names:
        return None
    device = next(model.parameters()).device
    if torch.is_tensor(windows):
        windows = [{"input_ids": windows[: max(1, STATISTICS_TOKENS // windows.shape[1])]}]
    some: list[Batch] = []
    for batch in windows:
        some.append({key: value.to(device) for key, value in batch.items()})
        if sum(map(tokens_in, some)) >= STATISTICS_TOKENS:
            break
    return fisher_statistics(model, names, some)
