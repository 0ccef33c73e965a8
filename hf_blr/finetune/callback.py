"""`BLRCallback`: what turns a stock `Trainer` into a fine-tuning of the factors."""

from __future__ import annotations

import os
from typing import Any, TypedDict

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import ParallelMode
from transformers.utils import logging

from hf_blr.calibration.training_form import SCALES, check_what, close_bits, open_bits, trained_bits
from hf_blr.finetune.distill import Distiller
from hf_blr.finetune.float8 import close_float8, open_float8
from hf_blr.finetune.language import is_causal_lm, perplexities
from hf_blr.finetune.masters import Masters
from hf_blr.finetune.said import warn_of_decay, warn_of_rounding, what_trains
from hf_blr.finetune.teacher import load_teacher
from hf_blr.finetune.trainable import (
    frozen_parts,
    has_adapters,
    let_gradients_in,
    mark_only_factors_trainable,
)
from hf_blr.formats import FactorInTraining

logger = logging.get_logger(__name__)

#: of a distillation, unless it says otherwise
DISTILL_WEIGHT, TEMPERATURE = 0.5, 1.0


class Selection(TypedDict):
    """What to train besides the factors, as `mark_only_factors_trainable` takes it."""

    norms: bool
    biases: bool
    also: list[str] | tuple[str, ...]
    bits: str


class BLRCallback(TrainerCallback):
    """Trains the factors of a compressed model, and nothing else, with the stock `Trainer`.

    Pass it to the Trainer's constructor, so that the optimizer is made for the factors alone. It also works
    when added before `train()`; the optimizer then lists the frozen parameters without ever touching them,
    and its checkpoints resume only into a Trainer set up in the same way.

    What it adds to the log history, for a causal language model: `perplexity` beside `loss`,
    `eval_perplexity` beside `eval_loss` (both may serve as `metric_for_best_model`), the Trainer's own
    `train_tokens_per_second`, and with a teacher `lm_loss` and `distill_loss`, of which `loss` is the
    weighted sum.

    Of factors that are kept in bits it trains the scales, and where `train_bits` says so the codes too. From the
    callback's start to the end of `train()` they are in a form for that; checkpoints in between hold codes and scales
    as ever.

    The parameters that it froze stay frozen after training, as PEFT leaves them: training goes on where it
    stopped, and nothing of it is saved with the model. `model.requires_grad_(True)` thaws them.

    Args:
        train_norms, train_biases, train_also: what to train besides the factors; `norms`, `biases` and `also`
            of `mark_only_factors_trainable`, which also says what happens to a model with PEFT adapters.
        train_bits: what trains of factors in bits; its `bits`. One learning rate suits scales and codes badly: for
            codes give the Trainer an optimizer of `factor_parameter_groups`.
        teacher: a model to distil from, usually the dense one, or the name or path of a causal language
            model, loaded when training starts. It is moved to the model's device, put in evaluation mode, and
            gets no gradients.
        distill_weight: share of the distillation loss in the loss, in (0, 1].
        temperature: softens both distributions; the loss is scaled by its square.
        float32_factors: train factors that are stored in 16 bits as float32 numbers; at the end of the training they
            are rounded back. Checkpoints in between hold the float32 numbers, so that a training resumes from them.
        train_float8: multiply in float8, forward and backward, in the low-rank and pivoted layers whose factors are
            numbers (`ops.linear_in_float8`); all others, and all evaluations, stay in the dtype of the model. What is
            stored does not change. On a device that does not multiply float8 the same float8 numbers are multiplied in
            float32, with a warning.

    Raises:
        ValueError: for values out of range, or about a teacher where there is none; at the start, for a model without
            BLR modules, or with `train_float8` for one of which no layer can train so.
        RuntimeError: with `train_float8`, where `use_impl("triton")` asks for float8 products that the device lacks.
        TypeError: if the teacher is neither a model nor a name.
    """

    def __init__(
        self,
        train_norms: bool = False,
        train_biases: bool = False,
        train_also: list[str] | tuple[str, ...] = (),
        teacher: nn.Module | str | os.PathLike[str] | None = None,
        distill_weight: float = DISTILL_WEIGHT,
        temperature: float = TEMPERATURE,
        train_bits: str = SCALES,
        float32_factors: bool = True,
        train_float8: bool = False,
    ):
        check_what("train_bits", train_bits)
        if not 0 < distill_weight <= 1:
            raise ValueError(f"distill_weight must be in (0, 1], got {distill_weight}")
        if temperature <= 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if teacher is None and (distill_weight, temperature) != (DISTILL_WEIGHT, TEMPERATURE):
            raise ValueError(
                f"distill_weight={distill_weight} and temperature={temperature} are of the divergence from a teacher, "
                "and there is none: give teacher=, or leave them out"
            )
        if teacher is not None and not isinstance(teacher, (nn.Module, str, os.PathLike)):
            raise TypeError(f"teacher must be a model, or the name or path of one, got {type(teacher).__name__}")
        self.selection: Selection = {
            "norms": train_norms,
            "biases": train_biases,
            "also": train_also,
            "bits": train_bits,
        }
        self.forms: dict[str, FactorInTraining] = {}
        self.opens_bits = False
        self.teacher = teacher
        self.distill_weight = distill_weight
        self.temperature = temperature
        self.masters = Masters() if float32_factors else None
        self.train_float8 = train_float8
        self.float8_layers: list[str] = []
        self.distiller: Distiller | None = None
        self.reported = self.warned = False
        self.counted_tokens: Any = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.opens_bits = not trained_bits(kwargs["model"])
        mark_only_factors_trainable(kwargs["model"], **self.selection)
        # before the model is wrapped for several processes, and before a checkpoint is read
        if self.masters is not None:
            self.masters.widen(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.freeze(args, model, optimizer)
        # a callback that came late, or a second training; moments in 16 bits would not fit
        if self.masters is not None and not optimizer.state and args.parallel_mode != ParallelMode.DISTRIBUTED:
            self.masters.widen(model)
        if self.train_float8:
            self.float8_layers, said = open_float8(model)
            if said and not self.warned:
                logger.warning(said)
        self.report(state, model)
        if not (self.warned or has_adapters(model)) and (frozen := frozen_parts(model)):
            logger.warning(f"frozen stay {'; '.join(frozen)}")
        self.warned = True
        warn_of_decay(model, optimizer)
        warn_of_rounding(model)
        let_gradients_in(model)
        if is_causal_lm(model):
            # the Trainer counts tokens only when asked to
            self.counted_tokens = args.include_num_input_tokens_seen
            args.include_num_input_tokens_seen = "all" if self.counted_tokens == "no" else self.counted_tokens
        if self.teacher is not None:
            if args.n_gpu > 1:
                raise NotImplementedError(
                    f"no distillation under nn.DataParallel ({args.n_gpu} GPUs in one process): start one "
                    "process per GPU with torchrun or accelerate launch, or show this process one GPU"
                )
            self.close()
            self.teacher = load_teacher(self.teacher, model)
            autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            self.distiller = Distiller(
                self.teacher, self.distill_weight, self.temperature, is_causal_lm(model), autocast
            )

    def freeze(self, args: TrainingArguments, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Freezes (again, or now), and refuses where that is too late for the optimizer or the wrappers."""
        if not trained_bits(model) and not has_adapters(model):
            # with the parameters that the optimizer knows, if this is another training by the same one
            self.opens_bits = True
            open_bits(model, self.selection["bits"], self.forms)
        before = {id(p) for p in model.parameters() if p.requires_grad}
        self.trainable, self.total = mark_only_factors_trainable(model, **self.selection)
        after = {id(p) for p in model.parameters() if p.requires_grad}
        if before == after:
            return
        remedy = "pass the callback to the Trainer's constructor"
        if args.parallel_mode == ParallelMode.DISTRIBUTED:
            raise RuntimeError(f"the model was wrapped for distributed training before it was frozen: {remedy}")
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not after <= optimized:
            raise RuntimeError(f"the optimizer was made without {len(after - optimized)} of the factors: {remedy}")

    def report(self, state: TrainerState, model: nn.Module) -> None:
        if self.reported or not state.is_world_process_zero:
            return
        self.reported = True
        extra = [name for name in ("norms", "biases") if self.selection[name]] + list(self.selection["also"])
        what = what_trains(model, extra, self.selection["bits"], self.float8_layers)
        share = self.trainable / self.total
        print(f"BLRCallback trains {self.trainable:,} of {self.total:,} parameters ({share:.1%}): {what}")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.distiller is not None:
            self.distiller.attach(kwargs["model"])

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model, logs = kwargs["model"], kwargs["logs"]
        metrics: dict[str, float] = (
            self.distiller.pop_metrics() if self.distiller is not None and "loss" in logs else {}
        )
        if is_causal_lm(model):
            metrics |= perplexities(logs, metrics.get("lm_loss"))
        # `logs` is what later callbacks show and the best model is chosen by; the history holds a copy of it
        logs.update(metrics)
        state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()
        self.distiller = None
        if self.opens_bits:
            self.forms = close_bits(kwargs["model"])
        if self.train_float8:
            close_float8(kwargs["model"])
        if self.masters is not None:
            self.masters.narrow()
        if self.counted_tokens is not None:
            args.include_num_input_tokens_seen = self.counted_tokens

    def close(self) -> None:
        """Takes the distillation hook off the model.

        It is on the model only between the start of a step and the optimizer's update, and goes when the
        forward pass raises; only an exception in the backward pass leaves it there, until the next `train()`
        or this call.
        """
        if self.distiller is not None:
            self.distiller.detach()
