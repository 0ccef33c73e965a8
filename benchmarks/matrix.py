"""Every architecture of the zoo through every tool: `python benchmarks/matrix.py`.

Small random models, low-rank at half of the weights; some minutes on one core. A cell is "yes" if the tool gives what
the same model gives without it, up to rounding, "-" if the model has nothing of the kind, "dense neither" if the model
made dense fails too, and else what went wrong.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from conditions import RESULTS
from torch import Tensor, nn
from zoo_inputs import Sample, padded_batches, samples
from zoo_models import KINDS, LEFT_OUT, build

import hf_blr
from hf_blr import BLRConfig
from hf_blr.bench.environment import environment
from hf_blr.bench.report.commits import rows_of
from hf_blr.calibration.losses import predicted
from hf_blr.finetune import mark_only_factors_trainable
from hf_blr.linear import blr_modules

CONFIG = {"structure": "low_rank", "ratio": 0.5}
#: up to this relative difference numbers are the same
EQUAL = 1e-4
YES, NOTHING, NEITHER = "yes", "-", "dense neither"


class NotApplicable(Exception):
    """The model has nothing that the tool could do."""


class Case:
    """One architecture: a dense model, what `compress` makes of it, and inputs."""

    def __init__(self, name: str):
        self.name = name
        self.dense = build(name)
        self.batch = samples(name, 1)[0]
        self.made: nn.Module | None = None

    def compressed(self) -> nn.Module:
        """A copy, since tools change models."""
        if self.made is None:
            self.made = copy.deepcopy(self.dense)
            hf_blr.compress(self.made, BLRConfig(**CONFIG), progress=False)
        return copy.deepcopy(self.made)

    def twin(self) -> nn.Module:
        """The same model without factors."""
        return hf_blr.to_dense(self.compressed())

    def inputs(self) -> Sample:
        """What `generate` takes."""
        return {key: value for key, value in self.batch.items() if key != "labels"}


def outputs(model: nn.Module, batch: Sample) -> Tensor:
    """What the model's users read, in one row."""
    return torch.cat([value.flatten().float() for value in predicted(model, model(**batch)).values()])


def check_equal(found: Tensor, right: Tensor, what: str) -> None:
    """Raises AssertionError that says by how much they differ."""
    error = ((found - right).norm() / right.norm()).item()
    assert error < EQUAL, f"{what} differ by {error:.1e}"


@torch.no_grad()
def compress(case: Case) -> None:
    check_equal(outputs(case.compressed(), case.batch), outputs(case.twin(), case.batch), "outputs")


@torch.no_grad()
def save_and_load(case: Case) -> None:
    model = case.compressed()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    assert blr_modules(loaded).keys() == blr_modules(model).keys(), "other layers after the load"
    assert torch.equal(outputs(loaded, case.batch), outputs(model, case.batch)), "outputs differ"


def calibrate(case: Case) -> None:
    model, parts = copy.deepcopy(case.dense), samples(case.name)
    report = hf_blr.compress(
        model, BLRConfig(**CONFIG), calibration=padded_batches(case.name, parts, (3, 2, 1)), progress=False
    )
    assert report.fitted_to == "activations" and blr_modules(model), "nothing was fitted to activations"


def gradients(model: nn.Module, batch: Sample) -> Tensor:
    """Of the factors, in one row, with dropout as in evaluation."""
    mark_only_factors_trainable(model)
    loss = outputs(model, batch).square().sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return torch.cat([grad.flatten() for grad in found if grad is not None])


def train(case: Case) -> None:
    """A step against the gradient brings the outputs nearer to random ones; some are vectors of length one."""
    model = case.compressed()
    mark_only_factors_trainable(model)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1.0)
    target = torch.randn(outputs(model, case.batch).shape, generator=torch.Generator().manual_seed(0))
    loss = (outputs(model, case.batch) - target).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    after = (outputs(model, case.batch) - target).square().mean()
    assert after < loss, f"a step raises the loss from {loss:.4f} to {after:.4f}"


#: the method of newer transformers, of older ones, and of diffusers
ENABLE = ("activation_checkpointing_enable", "gradient_checkpointing_enable", "enable_gradient_checkpointing")


def checkpointing(case: Case) -> None:
    """Gradient checkpointing gives the same gradients."""
    model = case.compressed()
    # diffusers' name has an underscore
    if not any(getattr(model, f"{prefix}supports_gradient_checkpointing", False) for prefix in ("", "_")):
        raise NotApplicable
    right = gradients(case.compressed(), case.batch)
    next(filter(None, (getattr(model, name, None) for name in ENABLE)))()
    # blocks take checkpoints in training mode alone; nothing shall be dropped out in it
    for block in [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]:
        block.training = True
        for share in [key for key, value in vars(block).items() if "drop" in key and isinstance(value, float)]:
            setattr(block, share, 0.0)
    check_equal(gradients(model, case.batch), right, "gradients")


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generated(model: nn.Module, case: Case, **settings: object) -> Tensor:
    if not getattr(model, "can_generate", bool)():
        raise NotApplicable
    return model.generate(**case.inputs(), **GREEDY, **settings)


@torch.no_grad()
def generate(case: Case) -> None:
    assert torch.equal(generated(case.compressed(), case), generated(case.twin(), case)), "other tokens"


@torch.no_grad()
def static_cache(case: Case) -> None:
    right = generated(case.compressed(), case)
    static = generated(case.compressed(), case, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, right), "other tokens"


@torch.no_grad()
def compiled(case: Case, model: nn.Module) -> None:
    torch._dynamo.reset()
    right = outputs(model, case.batch)
    check_equal(outputs(torch.compile(model, fullgraph=True, backend="eager"), case.batch), right, "outputs")


@torch.no_grad()
def fuse(case: Case) -> None:
    model = case.compressed()
    right = outputs(model, case.batch)
    if not hf_blr.fuse(model):
        raise NotApplicable
    check_equal(outputs(model, case.batch), right, "outputs")


@torch.no_grad()
def export(case: Case, model: nn.Module) -> None:
    right = outputs(model, case.batch)
    # caches are classes that a graph does not put out
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    exported = torch.export.export(model, (), {**case.batch, **options}, strict=False).module()
    found = predicted(model, exported(**case.batch, **options)).values()
    check_equal(torch.cat([value.flatten() for value in found]), right, "outputs")


def on(check: Callable[[Case, nn.Module], None], convert: Callable[[nn.Module], nn.Module]) -> Callable[[Case], str]:
    """A check of one model, which is tried on the dense twin where it fails."""

    def run(case: Case) -> str:
        try:
            check(case, convert(case.compressed()))
        except Exception:
            try:
                check(case, case.twin())
            except Exception:
                return NEITHER
            raise
        return YES

    return run


def as_it_is(model: nn.Module) -> nn.Module:
    return model


def whole(check: Callable[[Case], None]) -> Callable[[Case], str]:
    """A check that compares with the twin itself."""

    def run(case: Case) -> str:
        check(case)
        return YES

    return run


CHECKS: dict[str, Callable[[Case], str]] = {
    "compress": whole(compress),
    "save and load": whole(save_and_load),
    "calibrate": whole(calibrate),
    "train": whole(train),
    "checkpointing": whole(checkpointing),
    "generate": whole(generate),
    "static cache": whole(static_cache),
    "compile": on(compiled, as_it_is),
    "fuse": whole(fuse),
    "export": on(export, hf_blr.to_linears),
}


def cell(case: Case, check: Callable[[Case], str]) -> str:
    """What the check says, or its error in one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return check(case)
    except NotApplicable:
        return NOTHING
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error).strip() else ''}"


def row(name: str, columns: list[str] | None = None) -> dict[str, object]:
    """One architecture through the checks."""
    if name in LEFT_OUT:
        return {"kind": KINDS[name], "model": name, "left_out": LEFT_OUT[name]}
    started, case = time.perf_counter(), Case(name)
    found = {column: cell(case, CHECKS[column]) for column in columns or CHECKS}
    return {"kind": KINDS[name], "model": name, **found, "seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(KINDS), help="architectures; all by default")
    parser.add_argument("--out", type=Path, default=RESULTS / "matrix.json")
    args = parser.parse_args()
    # rows of other names stay, so that a run can be made in pieces
    known = {each["model"]: each for each in rows_of(json.loads(args.out.read_text()))} if args.out.exists() else {}
    where = environment()
    for name in args.names:
        known[name] = row(name) | {"commit": where["commit"]}
        print(known[name], flush=True)
        rows = [known[each] for each in KINDS if each in known]
        args.out.write_text(json.dumps({**CONFIG, "rows": rows, "environment": where}, indent=1) + "\n")


if __name__ == "__main__":
    main()
