"""One matrix of a layer that is served: what this process holds of it, and how that is loaded."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_blr.formats import Bits, Format
from hf_blr.formats.pieces import tensors_of
from hf_blr.formats.values import fault
from hf_blr.integration.vllm import op
from hf_blr.linear import BLRLinear
from hf_blr.structures import BLRSpec, Dense, structure_named
from hf_blr.structures.pieces import Piece


class Shard(nn.Module):
    """The layer of a piece, loaded from a checkpoint's tensors of the whole matrix.

    Args:
        name: of the whole layer in the checkpoint, for messages.
        spec, storage: of the whole layer.
        piece: what of it is held here.
        dtype: of factors that are not kept in bits, and of those that bits stand for.
        keys: {key in the checkpoint: state-dict key} where these differ.

    Raises:
        ValueError: if the format cannot store the piece.
    """

    def __init__(
        self,
        name: str,
        spec: BLRSpec,
        storage: Format,
        piece: Piece,
        dtype: torch.dtype,
        keys: dict[str, str] | None = None,
    ):
        super().__init__()
        problem = storage.misfit(piece.spec)
        if problem is not None:
            raise ValueError(f"{name}: a device's part of it cannot be stored: {problem}")
        self.name, self.whole, self.storage, self.piece = name, spec, storage, piece
        self.described = op.described(piece.spec, storage)
        stored = storage.stored(spec)
        own_keys = keys or {key: key for key in stored}
        #: {key in the checkpoint: (state-dict key, its shape and kind in the whole layer)}
        self.stored = {key: (own, stored[own]) for key, own in own_keys.items()}
        self.missing = set(self.stored)
        #: what of a factor has come, while the rest of it has not: codes without their scales
        self.waiting: dict[str, Tensor] = {}
        layer = BLRLinear.from_spec(piece.spec, bias=False, device="meta", dtype=dtype, storage=storage)
        self.layer = layer.to_empty(device=torch.get_default_device()).requires_grad_(False)
        for index in self.layer.indices().values():
            # of a server without weights, which measures speed
            index.copy_(torch.arange(len(index)))

    def load(self, key: str, tensor: Tensor) -> None:
        """Take a tensor of the whole layer from the checkpoint.

        Raises:
            ValueError: for an unknown key, a wrong shape, or numbers that no layer may hold.
        """
        if key not in self.stored:
            raise ValueError(f"{self.name}: the plan has no tensor {key!r}, only {sorted(self.stored)}")
        own, (shape, kind) = self.stored[key]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{self.name}.{key} must have the shape {shape}, got {tuple(tensor.shape)}")
        problem = fault(kind, tensor)
        if problem is not None:
            raise ValueError(f"{self.name}.{key}: {problem}")
        self.missing.discard(key)
        self.waiting[own] = tensor
        factor = own.partition(".")[0]
        parts = {other: part for other, part in self.waiting.items() if other.partition(".")[0] == factor}
        if len(parts) == sum(other.partition(".")[0] == factor for other, _ in self.stored.values()):
            self.put(factor, parts)

    def put(self, factor: str, parts: dict[str, Tensor]) -> None:
        """Hold this process's part of a factor or index of which all has come."""
        shapes = self.storage.in_bits(self.whole)
        if isinstance(self.storage, Bits) and factor in shapes:
            problem = self.storage.fault({key.partition(".")[2]: part for key, part in parts.items()}, shapes[factor])
            if problem is not None:
                raise ValueError(f"{self.name}.{factor}: {problem}")
        try:
            cut = tensors_of(self.storage, self.whole, self.piece, factor, parts)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        held = self.layer.stored()
        for key, tensor in cut.items():
            # in place: graphs that were captured know the memory
            held[key].data.copy_(tensor)
            del self.waiting[key]

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., K]` -> `[..., N]` of the piece."""
        stored = list(self.layer.stored().values())
        return op.served_linear(self.described, x, stored, bias, self.piece.spec.out_features)

    @property
    def keeps_a_pair(self) -> bool:
        """Whether the matrix is u v, of the two factors that are stored."""
        spec = self.piece.spec
        return structure_named(spec.structure).pair != "" and set(spec.names()) == {"u", "v"}

    def times(self, factor: str, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x `[..., K]` by one factor `[N, K]` alone, read as a whole matrix in the same format."""
        n, k = self.piece.spec.shapes()[factor]
        stored = [tensor for key, tensor in self.layer.stored().items() if key.partition(".")[0] == factor]
        return op.served_linear(op.described(Dense.whole(k, n), self.storage), x, stored, bias, n)
