"""The lower convex hull of options, of which a plan takes those on it, but for the last rest of the budget."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

#: (cost, loss)
Point = tuple[float, float]


@dataclass(frozen=True)
class Hull:
    """The lower convex hull of options, by rising cost and falling loss."""

    points: list[Point]

    @classmethod
    def of(cls, points: Iterable[Point]) -> Hull:
        found: list[Point] = []
        for cost, loss in sorted(points):
            if found and loss >= found[-1][1]:
                continue
            while len(found) > 1 and loss <= line(found[-2], found[-1], cost):
                found.pop()
            found.append((cost, loss))
        return cls(found)

    def above(self, point: Point) -> bool:
        """Whether no price of a cost makes the point better than each of the hull's."""
        cost, loss = point
        if not self.points or cost < self.points[0][0]:
            return False
        for left, right in zip(self.points, self.points[1:], strict=False):
            if cost < right[0]:
                return loss >= line(left, right, cost)
        return loss >= self.points[-1][1]


def line(left: Point, right: Point, cost: float) -> float:
    """The loss at this cost on the line through two points."""
    return left[1] + (right[1] - left[1]) * (cost - left[0]) / (right[0] - left[0])
