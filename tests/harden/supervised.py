"""Runs the work of a part in processes of their own, one after another until its time is out, and notices one that
dies.

A part is a script with `--seconds`. Its last line is a report in JSON; its exit code is 0 if it found nothing wrong.
"""

import argparse
import collections
import importlib.machinery
import importlib.util
import json
import multiprocessing
import os
import pathlib
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
_processes = multiprocessing.get_context("forkserver")


class Found(Exception):
    """Something that must not be."""


def repeat(work, seconds, *, preload=(), **arguments):
    """Calls `work` in a new process again and again, with another seed each time, and adds up what it counts.

    Args:
        work: A function of a module, `work(seed, deadline, progress, **arguments)`, that returns a dict of counts. It
            sets `progress.value` to the number of what it does, and ends soon after the deadline.
        seconds: How long.
        preload: The modules that all of the processes share, imported and unused.
        **arguments: More arguments of `work`.

    Raises:
        Found: If a process ends in another way than by returning, with the seed and the number.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # a process with one thread can be forked
    _processes.set_forkserver_preload(list(preload))
    deadline = time.time() + seconds
    totals = collections.Counter(processes=0)
    while not totals["processes"] or time.time() < deadline:
        seed = totals["processes"]
        progress = _processes.RawValue("q", -1)
        receiving, sending = _processes.Pipe(duplex=False)
        process = _processes.Process(target=_run, args=(work, seed, deadline, progress, arguments, sending))
        process.start()
        sending.close()
        try:
            result = receiving.recv()
        except EOFError:
            result = "it sent nothing"
        process.join()
        if process.exitcode != 0 or isinstance(result, str):
            raise Found(
                f"With seed {seed}, in number {progress.value}, the process ended with {process.exitcode}: {result}"
            )
        totals.update(result)
        totals["processes"] += 1
    return totals


def _run(work, seed, deadline, progress, arguments, sending):
    try:
        result = dict(work(seed, deadline, progress, **arguments))
    except BaseException:
        result = traceback.format_exc()
    sending.send(result)
    sending.close()


def main(part):
    """Runs a part from the command line.

    Args:
        part: A function of the seconds that returns a dict for JSON.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long, about")
    try:
        report = part(parser.parse_args().seconds)
    except Found as found:
        sys.exit(str(found))
    print(json.dumps(report))


def load_kernels():
    """Loads the kernels' module by its path: importing accumops would import TensorFlow."""
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = ROOT / "accumops" / "ops" / f"_kernels{suffix}"
        if path.is_file():
            loader = importlib.machinery.ExtensionFileLoader("_kernels", str(path))
            module = importlib.util.module_from_spec(
                importlib.util.spec_from_file_location("_kernels", path, loader=loader)
            )
            loader.exec_module(module)
            return module
    raise SystemExit("the kernels are not built: run `make build`")
