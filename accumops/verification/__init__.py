"""Checks on this machine that the fused ops compute what the reference does: what `accumops verify` runs."""

from accumops.verification.run import SUBJECTS, NothingToVerify, Result, run

__all__ = ["run", "Result", "NothingToVerify", "SUBJECTS"]
