"""The timed cases of batch normalization and of the merging of its moments."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from bench import Bench, Calls, Case, Pattern, WrongResultError
from kernel_definitions import BatchNorm as Definition
from kernel_definitions import excess, storage

EPSILON = 1e-3


@dataclasses.dataclass(frozen=True)
class BatchNorm:
    """A case of batch_norm(), or of its gradient, for an array of this shape, with channels last."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    gradient: bool = False
    share: float | None = None  # the share of a copy's speed to reach
    microseconds: float | None = None  # the time to stay below

    def shrink(self) -> "BatchNorm":
        """Returns the case with one sample."""
        return dataclasses.replace(self, shape=(1, *self.shape[1:]))

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        size, channels = math.prod(self.shape), self.shape[-1]
        numbers, incoming = bench.pattern(2, self.dtype), bench.pattern(3, self.dtype)
        item_bytes = numbers.host.itemsize
        footprint = (3 if self.gradient else 2) * size * item_bytes
        count = bench.sets(footprint)
        bench.require_memory(count * footprint)
        device, kernels = bench.device, bench.device.kernels
        ones, zeros = (device.put(np.full(channels, value, np.float32)) for value in (1, 0))
        calls: Calls = []
        for i in range(count):
            x = numbers.array(size).reshape(self.shape)
            dy = incoming.array(size).reshape(self.shape) if self.gradient else None
            output = device.empty(size, storage(self.dtype)).reshape(self.shape)
            device.poison(output)
            names = ("mean", "rest", "variance", "inverse", "dgamma", "dbeta")
            made = {name: device.empty(channels, np.float32) for name in names}
            made["count"] = device.empty(1, np.int64)
            options = {
                "workspace": device.empty(max(1, kernels.batch_norm_workspace(x)), np.uint8),
                "stream": device.stream(),
            }

            def forward(x: Any = x, y: Any = output, made: Any = made, options: Any = options) -> None:
                outputs = {name: made[name] for name in ("count", "mean", "rest", "variance", "inverse")}
                kernels.batch_norm(x, ones, zeros, y=y, epsilon=EPSILON, **outputs, **options)

            def gradient(x: Any = x, dy: Any = dy, dx: Any = output, made: Any = made, options: Any = options) -> None:
                others = {name: made[name] for name in made if name != "variance"}
                kernels.batch_norm_gradient(x, dy, ones, dx=dx, **others, **options)

            forward()
            if self.gradient:
                gradient()
            if i in (0, count - 1):
                self._verify(bench, numbers, incoming, output, made)
            calls.append(gradient if self.gradient else forward)
        return calls, (5 if self.gradient else 3) * size * item_bytes

    def _verify(self, bench: Bench, numbers: Pattern, incoming: Pattern, output: Any, made: dict[str, Any]) -> None:
        """Compares some channels: their sums over all values, and their outputs in some rows."""
        size, channels = math.prod(self.shape), self.shape[-1]
        rows = size // channels
        chosen = np.unique([0, 1, channels // 2, channels - 1])
        where = np.arange(rows)[:, None] * channels + chosen
        x, dy = numbers.at(where), incoming.at(where)
        parameters = np.ones(len(chosen), np.float32), np.zeros(len(chosen), np.float32)
        definition = Definition(x, *parameters, dy, epsilon=EPSILON)
        found = {name: bench.device.get(array) for name, array in made.items()}
        names = ["variance", "inverse", *(["dgamma", "dbeta"] if self.gradient else [])]
        above = {name: excess(found[name][chosen], getattr(definition, name), "float32") for name in names}
        name = "dx" if self.gradient else "y"
        whole = getattr(definition, name)
        flat = output.reshape(rows, channels)
        for at in {0, rows // 2, max(0, rows - 100)}:
            part = bench.device.get(flat[at : at + 100])[:, chosen]
            expected = dataclasses.replace(whole, value=whole.value[at : at + 100])
            above[name] = max(above.get(name, -np.inf), excess(part, expected, self.dtype))
        if found["count"][0] != rows:
            raise WrongResultError(f"count is {found['count'][0]} instead of {rows}")
        for name, error in above.items():
            if not error <= 0:
                raise WrongResultError(f"{name} is wrong by {error} more than its bound")


@dataclasses.dataclass(frozen=True)
class Merge:
    """A case of merge_moments() for this many channels, into a window that stays open."""

    name: str
    channels: int
    share: float | None = None
    microseconds: float | None = None

    def shrink(self) -> "Merge":
        """Returns the case itself, which is small."""
        return self

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        device = bench.device
        numbers = np.random.default_rng(1).standard_normal((3, self.channels)).astype(np.float32)
        numbers[1] = 0
        batch = [device.put(np.array([100])), *(device.put(each) for each in np.abs(numbers))]
        window = device.put(np.array([0, 0, 1 << 40])), device.put(np.full((2, self.channels), np.nan))
        moving = [device.put(np.ones(self.channels, np.float32)) for _ in range(2)]

        def call() -> None:
            device.kernels.merge_moments(batch, window=window, moving=moving, stream=device.stream())

        for _ in range(3):
            call()
        mean, centred = device.get(window[1])
        expected = np.abs(numbers).astype(np.float64)
        if device.get(window[0]).tolist() != [300, 3, 1 << 40]:
            raise WrongResultError(f"the window's counters are {device.get(window[0])}")
        if not (np.allclose(mean, expected[0], rtol=1e-12) and np.allclose(centred, 300 * expected[2], rtol=1e-12)):
            raise WrongResultError("the window's moments are wrong")
        return [call], self.channels * (3 * 4 + 2 * 16)


def cases() -> Iterator[Case]:
    """Yields the cases."""
    for gradient in (False, True):
        for shape in ((256, 56, 56, 64), (256, 14, 14, 1024)):
            for dtype in ("bfloat16", "float32"):
                name = f"batch norm{', gradient' * gradient}, {' x '.join(map(str, shape))}, {dtype}"
                yield BatchNorm(name, shape, dtype, gradient, share=0.8)
    yield Merge("merge of moments, 2048 channels", 2048, microseconds=10)
