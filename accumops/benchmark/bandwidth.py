"""The memory's bandwidth, and the shortest time in which it can move a number of bytes."""

import statistics
import time
from collections.abc import Callable, Iterator

import tensorflow as tf

from accumops.benchmark.result import Row
from accumops.benchmark.timing import Samples
from accumops.ops import LibraryError, library

_ARRAY_BYTES = 256 << 20  # the size of each of the triad's three arrays: more than caches hold
_PLAIN, _STREAMING, _DEVICE = "plain stores", "streaming stores", "on the GPU"


class Bandwidth:
    """Measures the memory's bandwidth with the triad `a = b + s * c`, in samples between other measurements.

    On a CPU accumops' own kernel runs the triad, once with plain stores, which read each cache line before they write
    it, and once with streaming stores. On a GPU XLA compiles the triad.

    Args:
        device: `"CPU"` or `"GPU"`.

    Raises:
        LibraryError: If the kernels' module was not built.
    """

    def __init__(self, device: str) -> None:
        self._measure = _host_triad() if device == "CPU" else _device_triad()
        self._rates: list[dict[str, float]] = []

    def sample(self) -> None:
        """Takes one sample."""
        self._rates.append(self._measure())

    def before(self, progress: Callable[[], object]) -> Callable[[], object]:
        """Returns a `progress` that first takes a sample, so that samples interleave with other measurements."""

        def sample_and_report() -> None:
            self.sample()
            progress()

        return sample_and_report

    @property
    def best(self) -> float:
        """The median in bytes per second, for the faster kind of stores."""
        return max(statistics.median(rates) for rates in self._by_stores().values())

    def limits(self, case: str, bytes_moved: int) -> Iterator[Row]:
        """Yields a row for each kind of stores: the time to move these bytes. The shortest is the floor."""
        for stores, rates in self._by_stores().items():
            median = statistics.median(rates)
            yield Row(
                case,
                f"memory's limit, {stores}",
                1e3 * bytes_moved / median,
                spread=Samples(tuple(rates)).spread if len(rates) > 1 else None,
                bytes_moved=bytes_moved,
                floor=median == self.best,
            )

    def _by_stores(self) -> dict[str, list[float]]:
        return {stores: [rates[stores] for rates in self._rates] for stores in self._rates[0]}


def _host_triad() -> Callable[[], dict[str, float]]:
    kernels = library.load_kernels()
    if kernels is None:
        raise LibraryError("The memory's bandwidth cannot be measured: the module of the kernels was not built.")

    def measure() -> dict[str, float]:
        # Use as many threads as TensorFlow.
        threads = tf.config.threading.get_intra_op_parallelism_threads() or None
        rates = kernels.memory_bandwidth(threads, bytes_per_array=_ARRAY_BYTES, repeats=1)
        return {_PLAIN: rates["plain"], _STREAMING: rates["streaming"]}

    return measure


def _device_triad() -> Callable[[], dict[str, float]]:
    values = _ARRAY_BYTES // 4
    b, c = tf.ones([values]), tf.ones([values])
    triad = tf.function(lambda scale: b + scale * c, jit_compile=True)
    triad(tf.constant(1.0))
    tf.test.experimental.sync_devices()

    def measure() -> dict[str, float]:
        start = time.perf_counter()
        triad(tf.constant(3.0))
        tf.test.experimental.sync_devices()
        return {_DEVICE: 12 * values / (time.perf_counter() - start)}

    return measure
