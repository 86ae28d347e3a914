"""Functions that accumulate into overlapping variables, and update them, from many threads at once: nobody waits for
ever, and no sum is lost.

    python tests/harden/overlapping.py --seconds 60
"""

import os
import random
import threading
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from supervised import Found, main

from accumops import ops

THREADS, VARIABLES = 8, 12
PATIENCE = 120  # seconds for one call
# Numbers below 2 ** 24 are exact in float32: sums are counted, and taken back to the host, before they get there.
CALLS_AT_ONCE = 2000


class Overlapping:
    """Variables, and functions over some of them in some order."""

    def __init__(self, random_):
        self.sums = [tf.Variable(tf.zeros(1 + 997 * i)) for i in range(VARIABLES)]
        self.weights = [tf.Variable(tf.zeros(1 + 997 * i)) for i in range(VARIABLES)]
        self.expected_sums = np.zeros(VARIABLES)
        self.expected_weights = np.zeros(VARIABLES)
        self._lock = threading.Lock()
        self.functions = [self._function(random_, kind) for kind in ("sum", "update") for _ in range(6)]

    def _function(self, random_, kind):
        """A function that adds 1 to some of the sums, or takes 1 from some of the weights, in one op."""
        chosen = random_.sample(range(VARIABLES), random_.randrange(2, VARIABLES))
        ones = [tf.ones(self.sums[i].shape) for i in chosen]

        def add():
            ops.accumulate([self.sums[i] for i in chosen], ones)

        def update():
            ops.update("sgd", [self.weights[i] for i in chosen], latest=ones, rate=1.0)

        run = add if kind == "sum" else update
        return kind, chosen, tf.function(run, autograph=False) if random_.random() < 0.7 else run

    def call(self, random_):
        kind, chosen, function = random_.choice(self.functions)
        function()
        with self._lock:
            if kind == "sum":
                self.expected_sums[chosen] += 1
            else:
                self.expected_weights[chosen] -= 1

    def check(self):
        """Compares all variables with the count of calls, and starts anew."""
        for variables, expected in ((self.sums, self.expected_sums), (self.weights, self.expected_weights)):
            for variable, value in zip(variables, expected, strict=True):
                if not (variable.numpy() == value).all():
                    raise Found(f"a variable of {variable.shape} has {set(variable.numpy())} instead of {value}")
                variable.assign(tf.zeros_like(variable))
            expected[:] = 0


def part(seconds):
    deadline, calls = time.monotonic() + seconds, 0
    seeds = random.Random(0)
    while not calls or time.monotonic() < deadline:
        shared, failures, started = Overlapping(seeds), [], [time.monotonic()] * THREADS

        def work(number, shared, failures, started):
            random_ = random.Random(number)
            try:
                for _ in range(CALLS_AT_ONCE):
                    started[number] = time.monotonic()
                    shared.call(random_)
                    if time.monotonic() > deadline:
                        break
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=(number, shared, failures, started), daemon=True)
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for number, thread in enumerate(threads):
            while thread.is_alive():
                thread.join(1)
                if thread.is_alive() and time.monotonic() - started[number] > PATIENCE:
                    raise Found(f"a call has waited for {PATIENCE} seconds")
        if failures:
            raise Found(f"a thread failed: {failures[0]!r}")
        calls += int(shared.expected_sums.sum() - shared.expected_weights.sum())
        shared.check()
    return {"additions to variables": calls, "threads": THREADS}


if __name__ == "__main__":
    main(part)
