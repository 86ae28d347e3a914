"""What `accumops verify` runs: checks on this machine that the fused ops compute the same as the reference."""

from accumops.verification.runner import SUBJECTS, NothingToVerify, Result, backend, find_device, fused_problem, run

__all__ = ["run", "Result", "NothingToVerify", "backend", "find_device", "fused_problem", "SUBJECTS"]
