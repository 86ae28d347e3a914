"""Runs the command line: `python -m accumops`."""

from accumops.cli import main

main(prog_name="python -m accumops")
