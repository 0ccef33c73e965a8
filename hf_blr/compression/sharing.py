"""What several processes that compress one model together must agree on."""

from __future__ import annotations

from hf_blr.calibration.calls import Batch
from hf_blr.calibration.sequences import rows_of
from hf_blr.compression.journal.fingerprints import of_batches
from hf_blr.config import BLRConfig
from hf_blr.processes import Processes


def check_shared(processes: Processes, config: BLRConfig, resumes: bool) -> None:
    """Raises ValueError if what is asked for cannot be shared."""
    alone = {"resume": resumes, "block_steps": bool(config.block_steps), "passes": config.passes > 1}
    if processes.count > 1 and any(alone.values()):
        what = " and ".join(name for name, asked in alone.items() if asked)
        raise ValueError(
            f"{what} works in one process alone, got {processes.count}; leave it out, or start one process"
        )


def shared_text(processes: Processes, batches: list[Batch], given: bool) -> list[Batch]:
    """The text that all processes have parts of: the first one's, in batches of which each gets some.

    Args:
        given: by the caller, and then it must be the same everywhere; a model's own text may differ by rounding.

    Raises:
        ValueError: if it is not, or there is not a sequence for each process.
    """
    if processes.count == 1 or not batches:
        return batches
    if given and len(set(processes.gathered(of_batches(batches)))) > 1:
        raise ValueError("calibration= must be the same text in each process, all of it; a process takes its own part")
    if not given:
        on_cpu = [{key: value.cpu() for key, value in batch.items()} for batch in batches]
        device = next(iter(batches[0].values())).device
        batches = [{key: value.to(device) for key, value in batch.items()} for batch in processes.gathered(on_cpu)[0]]
    if len(batches) < processes.count:
        batches = [part for batch in batches for part in rows_of(batch, 1)]
    if len(batches) < processes.count:
        raise ValueError(
            f"{processes.count} processes share {len(batches)} sequences; give more text, or fewer processes"
        )
    return batches
