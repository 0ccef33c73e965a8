"""What a structure consists of: one record that names, by import path, everything in which structures differ.

What needs torch is named by its path and imported when it is first asked for, so that sizes can be planned without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from hf_blr.structures.spec import BLRSpec


@dataclass(frozen=True)
class Structure:
    """One structure. Paths are `package.module:name`; "" stands for none.

    Args:
        spec: its sizes; the structure's name is the spec's.
        summary: what it is, in one line.
        linear: (x, *tensors, bias=None) -> out, in plain PyTorch: the oracle of the kernels.
        dense: (**tensors) -> the matrix `[N, K]`.
        experts: (`ops.experts.Routed`, x, *tensors) -> out, of rows that each meet the tensors of their own expert.
            "": experts of this structure run one after the other.
        fits: (in features, *tensors) -> whether these tensors are one layer's for inputs of that size.
        module: the subclass of `BLRLinear`.
        fit: (W, spec, gram or None, `FitOptions`) -> (factors, squared error after each round).
        finish: (spec, factors) -> the tensors as they are stored, of the same matrix.
        rounding: (spec, finished tensors, `factorize.bits.ToRound`) -> the tensors, with `formats.Codes` for factors.
            "": every number goes to its nearest code.
        scaled: the factors that carry the matrix's scale between them: c^(1/n) times each of these n is c times W.
        stages: (spec, tokens, form, adds, layers, chip) -> the `roofline.stages.Stage`s of a forward, in numbers.
        backward_stages: (spec, tokens, chip) -> those of a backward.
        colour: in plots, as `#rrggbb`.
        closed_form: its fit has no rounds, and `allocation.loss_curve` predicts its loss without a trial.
        weighed: the factor that takes back what `OutputMetric` took out of W: its rows are the outputs, block by block.
            "": errors are not weighed by outputs.
        auto_blocks: the block counts that `structure="auto"` tries; none: it never takes this structure.
        rank_multiple: ranks of this multiple are those that the kernels load in wide pieces.
        kernels: module with `forward` and `backward` for a GPU.
        kernels_pay: (tokens) -> whether the kernels beat PyTorch's products; "": always.
        grouped: module with `forward` and `gated`, kernels that run several such layers on one input.
        float8: module with `forward`, kernels that multiply factors in float8; the op of
            `ops.bits_library.define_float8`.
        float8_grouped: function that runs several such layers on one input in float8, with one first stage; the op of
            `ops.grouped_bits.define_grouped_float8`.
        packed: function that runs kernels which read codes and scales at few tokens; the op of
            `ops.bits_library.define_packed`.
        stand_in: module with `opened` and `closed`: the form in which such a layer trains, if not as it is stored.
        pair: (**tensors) -> (u `[N, R]`, v `[R, K]`) whose product is the matrix, for two plain linear layers. "": no
            such pair is as small, and `linear` stands for the layer where no op of ours may.
        whole: it stores the whole matrix: it takes no ratio, rank or blocks, and a format alone makes it smaller.
        typical_indices: (spec, device) -> {index: tensor} of the kind that fits give, for measuring.
    """

    spec: type[BLRSpec]
    summary: str
    linear: str
    dense: str
    fits: str
    module: str
    fit: str
    finish: str
    stages: str
    backward_stages: str
    colour: str
    closed_form: bool = False
    experts: str = ""
    weighed: str = "u"
    rounding: str = ""
    scaled: tuple[str, ...] = ("u", "v")
    auto_blocks: tuple[tuple[int, int], ...] = ()
    rank_multiple: int = 16
    kernels: str = ""
    kernels_pay: str = ""
    grouped: str = ""
    float8: str = ""
    float8_grouped: str = ""
    packed: str = ""
    stand_in: str = ""
    pair: str = ""
    whole: bool = False
    typical_indices: str = ""

    @property
    def name(self) -> str:
        return self.spec.structure

    def load(self, part: str) -> Any:
        """What the path in this field names; None where it is ""."""
        path = getattr(self, part)
        return resolved(path) if path else None


@cache
def resolved(path: str) -> Any:
    """The object behind `package.module:name`, or the module behind a path without a name.

    Raises:
        ImportError: if there is no such module, or nothing of that name in it.
    """
    module, _, name = path.partition(":")
    found = import_module(module)
    if name and not hasattr(found, name):
        raise ImportError(f"{module} has no {name!r}, which a structure's record names as {path!r}")
    return getattr(found, name) if name else found
