"""What the norms cost that an update clips by: read from the sums, or reported by the op that adds the last gradients.

    python benchmarks/clipping.py [--rounds N]

For each size the end of a window with Adam's update, and an addition alone, in milliseconds: medians of interleaved
runs, of which each runs a few windows in one graph.
"""

import argparse
import os
from collections.abc import Callable, Sequence

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

from accumops import ops
from accumops.benchmark.accumulate import resnet50_shapes
from accumops.benchmark.contender import in_one_graph
from accumops.benchmark.timing import interleave, stopwatch

Shapes = Sequence[tuple[int, ...]]
WINDOWS = 4  # in one graph
SIZES: dict[str, Shapes] = {
    "6 variables of 2,048": [(2048,)] * 6,
    "120 variables of 16,384": [(128, 128)] * 120,
    "ResNet-50, 25.6 million values": resnet50_shapes(),
}


class Window:
    """The end of a window over variables of some shapes."""

    def __init__(self, shapes: Shapes) -> None:
        self.variables, self.sums, first, second = ([tf.Variable(tf.zeros(each)) for each in shapes] for _ in range(4))
        self.slots = [first, second]
        self.last = [tf.fill(each, 1e-3) for each in shapes]

    def _add(self, norms: bool = False) -> tf.Tensor | None:
        report = ops.accumulate(self.sums, self.last, scale=0.1, squared_norms=norms)
        return None if report is None else report[1]

    def _update(self, norms: tf.Tensor | None, *, fold: bool = False) -> None:
        scale = 1.0 if norms is None else tf.cast(1 / tf.maximum(tf.sqrt(tf.reduce_sum(norms)), 1.0), tf.float32)
        latest = {"latest": self.last, "weight": 0.1} if fold else {}
        ops.update(
            "adam",
            self.variables,
            self.slots,
            accumulators=self.sums,
            scales=scale,
            rate=1e-3,
            beta_1=0.9,
            beta_2=0.999,
            epsilon=1e-7,
            **latest,
        )

    def _read(self) -> tf.Tensor:
        return ops.squared_norms([tf.convert_to_tensor(each) for each in self.sums])

    def unclipped(self) -> None:
        """No norms, and the last gradients go straight into the update."""
        self._update(None, fold=True)

    def unfolded(self) -> None:
        """No norms."""
        self._add()
        self._update(None)

    def read(self) -> None:
        """The sums are read for their norms."""
        self._add()
        self._update(self._read())

    def reported(self) -> None:
        """The addition reports the norms."""
        self._update(self._add(norms=True))

    def folded(self) -> None:
        """Sums and last gradients are read for norms, which are not those of the mean, and again by the update."""
        self._update(self._read() + ops.squared_norms(self.last), fold=True)

    def addition(self) -> None:
        """An addition alone."""
        self._add()

    def addition_reported(self) -> None:
        """An addition alone that reports norms."""
        norms = self._add(norms=True)
        tf.raw_ops.Assert(condition=True, data=[norms])  # or TensorFlow leaves it out


WAYS: dict[str, Callable[[Window], None]] = {
    "not clipped, folded": Window.unclipped,
    "not clipped, not folded": Window.unfolded,
    "clipped, norms read": Window.read,
    "clipped, norms reported": Window.reported,
    "clipped, folded": Window.folded,
    "an addition": Window.addition,
    "an addition that reports norms": Window.addition_reported,
}


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds
    print(f"| | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    for name, shapes in SIZES.items():
        steps = {}
        for way, step in WAYS.items():
            window = Window(shapes)
            steps[way] = in_one_graph(lambda step=step, window=window: [lambda: step(window)] * WINDOWS)
            steps[way]()
        times = interleave(steps, sample=stopwatch(), rounds=rounds)
        cells = [f"{1e3 * each.median / WINDOWS:.3f}" for each in times.values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
