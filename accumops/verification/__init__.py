"""Checks on this machine that the fused ops compute what the reference does: what `accumops verify` runs."""

from accumops.verification.run import SUBJECTS, NothingToVerify, Result, find_device, fused_problem, run

__all__ = ["run", "Result", "NothingToVerify", "find_device", "fused_problem", "SUBJECTS"]
