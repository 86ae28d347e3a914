"""What a suite returns, and what table, JSON and picture are made of."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's result in one case: a time, or a peak of memory."""

    case: str  # rows of one case are compared with each other
    name: str
    milliseconds: float | None = None  # median
    peak_bytes: int | None = None  # median
    spread: float | None = None  # quartile distance over median
    bytes_moved: int | None = None  # at least, between processor and memory
    floor: bool = False  # what the others of the case are compared with
    note: str | None = None  # why nothing was measured

    @property
    def value(self) -> float | None:
        """The time or the peak."""
        return self.peak_bytes if self.milliseconds is None else self.milliseconds

    @property
    def bytes_per_second(self) -> float | None:
        """The rate at which what has to be moved was."""
        if self.bytes_moved is None or self.milliseconds is None:
            return None
        return 1e3 * self.bytes_moved / self.milliseconds


@dataclasses.dataclass(frozen=True)
class Result:
    """All rows of a suite."""

    title: str
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = ()
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bandwidth: float | None = None  # of the memory, in bytes per second

    def cases(self) -> dict[str, list[Row]]:
        """The rows by case, in their order."""
        cases: dict[str, list[Row]] = {}
        for row in self.rows:
            cases.setdefault(row.case, []).append(row)
        return cases

    def ratio(self, row: Row) -> float | None:
        """The row's value over that of its case's floor, or None where there is no such thing."""
        floor = next((each.value for each in self.rows if each.case == row.case and each.floor), None)
        return None if row.value is None or not floor else row.value / floor

    def share(self, row: Row) -> float | None:
        """The share of the memory's bandwidth that the row reaches, or None where that is not known."""
        if row.bytes_per_second is None or self.bandwidth is None:
            return None
        return row.bytes_per_second / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        """Everything, with what is derived from it."""
        rows = [
            {**dataclasses.asdict(row), "bytes_per_second": row.bytes_per_second, "ratio": self.ratio(row)}
            for row in self.rows
        ]
        return {
            "title": self.title,
            **self.settings,
            "bandwidth": self.bandwidth,
            "footnotes": list(self.footnotes),
            "rows": rows,
        }
