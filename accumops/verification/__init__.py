"""Checks on this machine that the fused ops compute what the reference does: what `accumops verify` runs."""

from accumops.verification.runner import SUBJECTS, NothingToVerify, Result, backend, find_device, fused_problem, run

__all__ = ["run", "Result", "NothingToVerify", "backend", "find_device", "fused_problem", "SUBJECTS"]
