"""What `accumops bench` measures: suites of contenders, and what they are measured with."""

from accumops.benchmark.result import Result, Row
from accumops.benchmark.suites import SUITES, default_rounds, run, turns

__all__ = ["SUITES", "Result", "Row", "default_rounds", "run", "turns"]
