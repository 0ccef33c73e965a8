"""The sequences of a batch, for passes that take fewer at once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from hf_blr.calibration.calls import Batch

#: what goes through one backward, which keeps every layer's activations: sequences of other things than tokens, and
#: tokens. A GPU idles while one short sequence after the other is launched
SEQUENCES, TOKENS = 1, 1024
#: of models of fewer parameters on a GPU; 2048 tokens of one with 135 M and 49152 words need 5 GB in float32
SMALL_MODEL, SEQUENCES_OF_SMALL_MODELS, TOKENS_OF_SMALL_MODELS = 500e6, 4, 8192


def parts_of(batches: list[Batch], model: nn.Module) -> Iterator[Batch]:
    """The batches in parts that go through one backward of the model; one sequence at least.

    Whole where they hold something else than a row for each.
    """
    parameters = list(model.parameters())
    small = parameters[0].is_cuda and sum(p.numel() for p in parameters) < SMALL_MODEL
    sequences, tokens = (SEQUENCES_OF_SMALL_MODELS, TOKENS_OF_SMALL_MODELS) if small else (SEQUENCES, TOKENS)
    for batch in batches:
        ids = batch.get("input_ids")
        count = sequences if ids is None else max(1, tokens // ids.shape[-1])
        yield from rows_of(batch, count)


def rows_of(batch: Batch, count: int) -> Iterator[Batch]:
    """The batch in parts of at most `count` sequences; whole where it holds something else than a row for each."""
    size = sequences_in(batch)
    if any(value.dim() and len(value) not in (1, size) for value in batch.values()) or size <= count:
        yield batch
        return
    for i in range(0, size, count):
        yield {
            key: value[i : i + count] if value.dim() and len(value) == size else value for key, value in batch.items()
        }


def sequences_in(batch: Batch) -> int:
    """How many sequences, or images, a batch holds."""
    named = [batch[key] for key in ("input_ids", "inputs_embeds") if key in batch]
    return len((named or [value for value in batch.values() if value.dim()])[0])
