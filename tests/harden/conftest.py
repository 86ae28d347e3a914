"""Keeps pytest from the scripts of `make harden`, which it would import to look for doctests."""

collect_ignore_glob = ["*.py"]
