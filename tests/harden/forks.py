"""Forks a process again and again while its threads run kernels: each child computes, with threads of its own.

python tests/harden/forks.py --seconds 60
"""

import os
import random
import signal
import threading
import time
import warnings

import numpy as np
from supervised import Found, load_kernels, main, repeat

WORKERS = 3
FORKS_OF_A_PROCESS = 1000


def check(kernels, random_):
    """Calls kernels with some number of threads, and looks at what they give."""
    size, threads = random_.choice((1000, 70_000, 300_000)), random_.randrange(1, 6)
    accumulator, gradient = np.ones(size, np.float32), np.ones(size, np.float32)
    kernels.accumulate([accumulator], [gradient], scale=2, threads=threads)
    sums = np.zeros(1)
    kernels.squared_norms([accumulator], sums, threads=threads)
    if not (accumulator == 3).all() or sums[0] != 9.0 * size:
        raise Found(f"{threads} threads over {size} values give {accumulator}, {sums}")


def work(seed, deadline, progress):
    warnings.simplefilter("ignore")  # Python warns of a fork in a process with threads, which is intended here
    kernels = load_kernels()
    done, failures = threading.Event(), []

    def compute(number):
        random_ = random.Random(number)
        try:
            while not done.is_set():
                check(kernels, random_)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=compute, args=(number,)) for number in range(WORKERS)]
    for worker in workers:
        worker.start()
    random_, forks = random.Random(seed), 0
    try:
        while forks < FORKS_OF_A_PROCESS and (not forks or time.time() < deadline):
            progress.value = forks
            child = os.fork()
            if child == 0:
                live(kernels, random_, depth=random_.choice((0, 0, 1)))
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status != 0:
                raise Found(f"fork {forks} of seed {seed} ended with {status}; -{signal.SIGALRM.value} is a deadlock")
            forks += 1
            random_.random()
    finally:
        done.set()
        for worker in workers:
            worker.join()
    if failures:
        raise failures[0]
    return {"forks": forks}


def live(kernels, random_, depth):
    """The life of a child, which may fork as well. Does not return."""
    code = 1
    try:
        signal.alarm(60)
        for _ in range(3):
            check(kernels, random_)
        if depth:
            grandchild = os.fork()
            if grandchild == 0:
                live(kernels, random_, depth - 1)
            if os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1]) != 0:
                raise Found("a fork of a fork failed")
            check(kernels, random_)
        code = 0
    finally:
        os._exit(code)


def part(seconds):
    return repeat(work, seconds, preload=["numpy"])


if __name__ == "__main__":
    main(part)
