"""What a model is fitted to: windows of tokens, drawn from named parts by a mixture and a seed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property

import protocol
import torch
from protocol import sha256_of
from rates import Judge
from torch import Tensor, nn

from hf_blr.calibration import collect_statistics
from hf_blr.calibration.fisher import Statistics
from hf_blr.config import BLRConfig


@dataclass(frozen=True)
class Mixture:
    """Shares of the calibration windows by part; they add up to one."""

    shares: tuple[tuple[str, float], ...]

    @classmethod
    def parse(cls, items: list[str]) -> Mixture:
        """Of NAME=SHARE each, or of one NAME.

        Raises:
            ValueError: if a share is no number above 0, or they do not add up to one.
        """
        pairs = [item.partition("=") for item in items]
        try:
            shares = tuple((name, float(share) if given else 1.0) for name, given, share in pairs)
        except ValueError:
            raise ValueError(f"a calibration set is NAME=SHARE ..., such as web=0.5 own=0.5, got {items}") from None
        total = sum(share for _, share in shares)
        if any(share <= 0 for _, share in shares) or abs(total - 1) > 1e-6:
            raise ValueError(f"the shares of a calibration set are above 0 and add up to 1, got {items}")
        return cls(shares)

    @property
    def label(self) -> str:
        """`web`, or `50 % own, 50 % web`."""
        if len(self.shares) == 1:
            return self.shares[0][0]
        return ", ".join(f"{100 * share:.3g} % {name}" for name, share in sorted(self.shares))


@dataclass
class Calibration:
    """Windows of a mixture that a seed has drawn, and what the dense model does on them.

    windows: token ids `[n, seqlen]`, in random order.
    training: likewise, for what is trained: more of the same mixture or of another; a part with fewer than its share
        comes again.
    counts: {part: its windows}.
    held_out: likewise, of the parts that are trained on; neither in `windows` nor in `training`.
    trained_on: the mixture of `training`.
    """

    dense: nn.Module
    mixture: Mixture
    seed: int
    windows: Tensor
    training: Tensor
    counts: dict[str, int]
    held_out: Tensor
    trained_on: Mixture

    @classmethod
    def draw(
        cls,
        dense: nn.Module,
        parts: dict[str, Tensor],
        mixture: Mixture,
        seed: int,
        limit: int,
        seqlen: int,
        training: int = 0,
        trained_on: Mixture | None = None,
        again: bool = False,
        held_out: int = 0,
    ) -> Calibration:
        """Draws windows; a part with fewer than its share gives all that it has, or comes again.

        Args:
            dense: the model that will be compressed.
            parts: {name: windows `[n, seqlen]`, or a text's ids `[tokens]`, which are cut into windows}.
            mixture: of the parts.
            seed: of the choice and of the order.
            limit: windows at most, of all parts.
            seqlen: tokens in a window.
            training: windows to train on; 0 takes those of the fit.
            trained_on: the mixture of these; None: that of the fit.
            again: whether parts come again in the fit too, so that the shares hold.
            held_out: windows at most that neither the fit nor the training sees.

        Raises:
            ValueError: if a part is missing or cut otherwise, or what is drawn does not fill a batch.
        """
        windows, counts = drawn(parts, mixture, seed, limit, seqlen, again)
        trained_on = trained_on or mixture
        parts, left_out = reserved(parts, trained_on, windows, held_out, seqlen)
        more = drawn(parts, trained_on, seed, training, seqlen, again=True)[0] if training else windows
        return cls(dense, mixture, seed, windows, more, counts, left_out, trained_on)

    @cached_property
    def batches(self) -> list[Tensor]:
        """The windows on the model's device."""
        device = next(self.dense.parameters()).device
        return [batch.to(device) for batch in self.windows.split(protocol.BATCH)]

    @cached_property
    def statistics(self) -> Statistics:
        """What all fits share, collected when it is first asked for."""
        started = time.perf_counter()
        found = collect_statistics(self.dense, BLRConfig(ratio=0.5, seed=self.seed), calibration=self.batches)
        print(f"statistics on {self.mixture.label} took {time.perf_counter() - started:.0f} s", flush=True)
        return found

    @cached_property
    def judge(self) -> Judge:
        """How far models are from the dense one on the held-out windows."""
        return Judge(self.dense, self.held_out)

    def facts(self) -> dict:
        """What a row says of it; tokens that come a second time or more often are "repeated"."""
        return {
            "calibration": self.mixture.label,
            "calibration_tokens": self.windows.numel(),
            "calibration_windows": self.counts,
            "calibration_repeated": self.windows.numel() - self.windows.unique(dim=0).numel(),
            "calibration_sha256": sha256_of(self.windows),
            "seed": self.seed,
        }


def drawn(
    parts: dict[str, Tensor], mixture: Mixture, seed: int, limit: int, seqlen: int, again: bool = False
) -> tuple[Tensor, dict[str, int]]:
    """The windows of a mixture, in whole batches, and how many come from each part; see `Calibration.draw`.

    again: whether a part with fewer than its share comes as often as that takes, whole before any of it comes again.
    """
    generator = torch.Generator().manual_seed(seed)
    found, sources = [], []
    for name, share in mixture.shares:
        if name not in parts:
            raise ValueError(f"there is no calibration part {name!r}; there are {sorted(parts)}")
        windows = windows_of(name, parts[name], seqlen)
        count = round(share * limit) if again else min(round(share * limit), len(windows))
        rounds = max(1, -(-count // max(1, len(windows))))
        order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(rounds)])[:count]
        found.append(windows[order])
        sources += [name] * len(order)
    whole = len(sources) // protocol.BATCH * protocol.BATCH
    if not whole:
        raise ValueError(
            f"the calibration set {mixture.label!r} needs {protocol.BATCH} windows of {seqlen} tokens at "
            f"least, got {len(sources)}"
        )
    order = torch.randperm(len(sources), generator=generator)[:whole]
    chosen = [sources[i] for i in order.tolist()]
    return torch.cat(found)[order].long(), {name: chosen.count(name) for name, _ in mixture.shares}


def reserved(
    parts: dict[str, Tensor], mixture: Mixture, fitted: Tensor, count: int, seqlen: int
) -> tuple[dict[str, Tensor], Tensor]:
    """The parts without some windows that are not in `fitted`, and these: `count` at most, by the mixture's shares."""
    parts, found = dict(parts), [fitted[:0]]
    # a number for each window: comparing tokens takes seconds
    weights = torch.randint(1 << 40, (seqlen,), generator=torch.Generator().manual_seed(0))
    seen = (fitted * weights).sum(1)
    for name, share in mixture.shares if count else ():
        windows = windows_of(name, parts[name], seqlen)
        free = torch.isin((windows.long() * weights).sum(1), seen, invert=True).nonzero().flatten()
        # the last ones, which lie together: those between windows of the fit resemble them
        taken = free[len(free) - min(round(share * count), len(free)) :]
        found.append(windows[taken].long())
        rest = torch.ones(len(windows), dtype=torch.bool)
        rest[taken] = False
        parts[name] = windows[rest]
    return parts, torch.cat(found)


def windows_of(name: str, ids: Tensor, seqlen: int) -> Tensor:
    """A part's windows `[n, seqlen]`."""
    if ids.dim() == 1:
        ids = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)
    if ids.dim() != 2 or ids.shape[1] != seqlen:
        raise ValueError(
            f"the calibration part {name!r} must be windows [n, {seqlen}] or ids [tokens], got shape {list(ids.shape)}"
        )
    return ids
