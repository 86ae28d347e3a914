"""The result of a suite, from which table, JSON and picture are made."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One contender's result in one case: a time, or a peak of memory."""

    case: str  # the rows of one case are compared with each other
    name: str  # the contender
    milliseconds: float | None = None  # median
    peak_bytes: int | None = None  # median
    spread: float | None = None  # distance between the quartiles, divided by the median
    bytes_moved: int | None = None  # the least that has to move between processor and memory
    floor: bool = False  # whether the other rows of the case are compared with this one
    note: str | None = None  # why nothing was measured

    @property
    def value(self) -> float | None:
        """The time in milliseconds, or the peak in bytes."""
        return self.peak_bytes if self.milliseconds is None else self.milliseconds

    @property
    def bytes_per_second(self) -> float | None:
        """`bytes_moved` divided by the time."""
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
        """Returns the rows of each case, in their order."""
        cases: dict[str, list[Row]] = {}
        for row in self.rows:
            cases.setdefault(row.case, []).append(row)
        return cases

    def ratio(self, row: Row) -> float | None:
        """Returns the row's value divided by that of its case's floor, or None if one of them is missing."""
        floor = next((each.value for each in self.rows if each.case == row.case and each.floor), None)
        return None if row.value is None or not floor else row.value / floor

    def share(self, row: Row) -> float | None:
        """Returns the share of the memory's bandwidth that the row reaches, or None if it is not known."""
        if row.bytes_per_second is None or self.bandwidth is None:
            return None
        return row.bytes_per_second / self.bandwidth

    def as_json(self) -> dict[str, Any]:
        """Returns everything for JSON, including the rates and ratios."""
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
