"""What `accumops bench` runs: the suites of contenders, and the tools that measure them."""

from accumops.benchmark.result import Result, Row
from accumops.benchmark.suites import SUITES, default_rounds, run, turns

__all__ = ["SUITES", "Result", "Row", "default_rounds", "run", "turns"]
