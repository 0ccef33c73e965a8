"""How the matrices of one of vLLM's layers are divided over devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from hf_blr.formats import PLAIN
from hf_blr.integration.vllm.shard import Shard
from hf_blr.plan import LayerPlan
from hf_blr.structures import BLRSpec, Dense
from hf_blr.structures.pieces import Piece


@dataclass(frozen=True)
class Division:
    """Sizes that vLLM hands to a layer's method.

    Args:
        rank: of this device.
        inputs: (K, what of it a device gets).
        outputs: (sum of all N, counted as often as devices hold them; what a device computes of each matrix).
        replicas: devices that hold the same heads of k and v.
    """

    rank: int
    inputs: tuple[int, int]
    outputs: tuple[int, tuple[int, ...]]
    replicas: int = 1

    @property
    def splits_inputs(self) -> bool:
        return self.inputs[0] != self.inputs[1]

    @property
    def splits_outputs(self) -> bool:
        return self.outputs[0] != sum(self.outputs[1])

    def replicas_of(self, index: int) -> int:
        """Devices that hold the same rows of a matrix; of q there are never any."""
        return self.replicas if index else 1

    def out_features(self, index: int) -> int:
        """N of a matrix in the checkpoint."""
        total, widths = self.outputs
        return widths[index] * (total // sum(widths)) // self.replicas_of(index)

    def piece(self, spec: BLRSpec, index: int) -> Piece:
        """What this device holds of a matrix. Raises ValueError where its structure cannot be split so."""
        if self.splits_inputs:
            width = self.inputs[1]
            return spec.inputs(self.rank * width, (self.rank + 1) * width)
        if self.splits_outputs:
            width, place = self.outputs[1][index], self.rank // self.replicas_of(index)
            return spec.outputs(place * width, (place + 1) * width)
        return Piece(spec, {})


def shards_of(plans: Mapping[str, LayerPlan | None], division: Division, dtype: torch.dtype) -> list[Shard]:
    """What this device holds of each matrix of a layer.

    Args:
        plans: {name in the checkpoint: plan}, None for a matrix that is dense.
        division: of the layer.
        dtype: of the layer.

    Raises:
        ValueError: if a plan has other sizes than the layer, or a matrix cannot be split so.
        NotImplementedError: if vLLM holds another number of matrices than the checkpoint has, and splits them.
    """
    widths = division.outputs[1]
    if len(plans) != len(widths):
        if len(plans) > 1 or division.splits_outputs:
            raise NotImplementedError(
                f"{', '.join(plans)}: {len(plans)} in the checkpoint are {len(widths)} matrices in vLLM, which "
                "compressed layers cannot be split into; use --tensor-parallel-size 1 or transformers"
            )
        # q, k and v that the file has in one matrix
        division = Division(division.rank, division.inputs, (division.outputs[0], (sum(widths),)))
    return [shard_of(name, plan, division, index, dtype) for index, (name, plan) in enumerate(plans.items())]


def shard_of(name: str, plan: LayerPlan | None, division: Division, index: int, dtype: torch.dtype) -> Shard:
    """What this device holds of one matrix."""
    wanted = division.inputs[0], division.out_features(index)
    spec: BLRSpec = Dense.whole(*wanted) if plan is None else plan.spec
    storage = PLAIN if plan is None else plan.storage
    if (spec.in_features, spec.out_features) != wanted:
        raise ValueError(
            f"{name}: the plan says {spec.out_features}x{spec.in_features}, vLLM's model has {wanted[1]}x{wanted[0]}; "
            "serve the checkpoint with the config that was saved with it"
        )
    try:
        piece = division.piece(spec, index)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; --tensor-parallel-size 1 always works") from None
    return Shard(name, spec, storage, piece, dtype, {"weight": "w"} if plan is None else None)
