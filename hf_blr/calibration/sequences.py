"""The sequences of a batch, for passes that take fewer at once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_blr.calibration.calls import Batch

#: models of fewer parameters than this take so many sequences at once on a GPU; 2048 tokens of one with 135 M and 49152
#: words need 5 GB in float32
SMALL_MODEL, SEQUENCES_OF_SMALL_MODELS = 500e6, 4


def sequences_at_once(model: nn.Module) -> int:
    """How many go through one backward, which keeps every layer's activations: one, and more where they are small.

    A GPU idles while one short sequence after the other is launched; a CPU does not.
    """
    parameters = list(model.parameters())
    small = sum(p.numel() for p in parameters) < SMALL_MODEL
    return SEQUENCES_OF_SMALL_MODELS if small and parameters[0].is_cuda else 1


def parts_of(batches: list[Batch], count: int) -> Iterator[Batch]:
    """The batches in parts of at most `count` sequences; whole where they hold something else than a row for each."""
    for batch in batches:
        size = sequences_in(batch)
        if any(value.dim() and len(value) not in (1, size) for value in batch.values()) or size <= count:
            yield batch
            continue
        for i in range(0, size, count):
            yield {
                key: value[i : i + count] if value.dim() and len(value) == size else value
                for key, value in batch.items()
            }


def sequences_in(batch: Batch) -> int:
    """How many sequences, or images, a batch holds."""
    named = [batch[key] for key in ("input_ids", "inputs_embeds") if key in batch]
    return len((named or [value for value in batch.values() if value.dim()])[0])
