"""The timed cases of update() and squared_norms()."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from bench import Bench, Calls, Case, WrongResultError, lay_out, shrink_sizes, verify_tensors
from kernel_definitions import SLOTS, Settings, gradient_of, step, wide
from model_sizes import gpt2_xl_sizes, resnet50_sizes

SCALE = 0.25


@dataclasses.dataclass(frozen=True)
class Update:
    """A case of update() for values of these sizes; if `latest` is a dtype, with latest gradients of it folded in."""

    name: str
    settings: Settings
    sizes: list[int]
    latest: str | None = None
    share: float | None = None  # the share of a copy's speed to reach
    microseconds: float | None = None  # the time to stay below

    def shrink(self) -> "Update":
        """Returns a thousandth of the case."""
        return dataclasses.replace(self, sizes=shrink_sizes(self.sizes))

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        spans, total = lay_out(self.sizes)
        slots = SLOTS[self.settings.rule]
        # Variances must not be negative.
        patterns = [bench.pattern(3 + i, "float32", positive=i > 1) for i in range(1 + slots)]
        sums = bench.pattern(1, "float32")
        numbers = bench.pattern(2, self.latest) if self.latest else None
        gradient_bytes = 4 + (numbers.host.itemsize if numbers else 0)
        footprint = total * (4 * (1 + slots) + gradient_bytes)
        count = bench.sets(footprint)
        bench.require_memory(count * footprint)
        device = bench.device
        calls: Calls = []
        for i in range(count):
            targets = [pattern.array(total) for pattern in patterns]
            views = [[target[begin:end] for begin, end in spans] for target in targets]
            total_gradient = sums.array(total)
            latest = numbers.array(total) if numbers else None
            keywords = {
                "accumulators": [total_gradient[begin:end] for begin, end in spans],
                "latest": None if latest is None else [latest[begin:end] for begin, end in spans],
                "stream": device.stream(),
                **self.settings.keywords(),
                **self._scalars(bench),
            }

            def call(views: list[Any] = views, keywords: dict[str, Any] = keywords) -> None:
                device.kernels.update(self.settings.rule, views[0], views[1:], **keywords)

            call()
            if i in (0, count - 1):
                self._verify(bench, targets, patterns, spans, sums, numbers)
            calls.append(call)
        return calls, sum(self.sizes) * (8 * (1 + slots) + gradient_bytes)

    def _scalars(self, bench: Bench) -> dict[str, Any]:
        """Returns the scalars of a call, in a form for which the module copies nothing."""
        names = ("rate", "decay", "weight")
        result = {name: bench.device.scalar(getattr(self.settings, name), np.float32) for name in names}
        for name in ("overwrite", "applies"):
            result[name] = bench.device.scalar(getattr(self.settings, name), np.bool_)
        return result | {"scales": bench.device.scalar(SCALE, np.float32)}

    def _verify(self, bench: Bench, targets: list[Any], patterns: list[Any], spans: list[tuple[int, int]], sums: Any,
                numbers: Any) -> None:  # fmt: skip
        for i, (target, pattern) in enumerate(zip(targets, patterns, strict=True)):

            def after(_: int, where: np.ndarray, i: int = i) -> np.ndarray:
                latest = numbers.at(where) if numbers else None
                gradient = gradient_of(self.settings, sums.at(where), latest, SCALE)
                before = [each.at(where) for each in patterns]
                value, slots = step(self.settings, before[0], gradient, before[1:])
                return (value, *slots)[i]

            verify_tensors(bench.device, target, spans, pattern.at, after)


@dataclasses.dataclass(frozen=True)
class SquaredNorms:
    """A case of squared_norms() for arrays of these sizes."""

    name: str
    sizes: list[int]
    dtype: str = "float32"
    share: float | None = None
    microseconds: float | None = None

    def shrink(self) -> "SquaredNorms":
        """Returns a thousandth of the case."""
        return dataclasses.replace(self, sizes=shrink_sizes(self.sizes))

    def prepare(self, bench: Bench) -> tuple[Calls, int]:
        """Returns verified calls, and the bytes that each call has to move."""
        spans, total = lay_out(self.sizes)
        numbers = bench.pattern(2, self.dtype)
        footprint = total * numbers.host.itemsize
        count = bench.sets(footprint)
        bench.require_memory(count * footprint)
        device = bench.device
        calls: Calls = []
        for i in range(count):
            values = numbers.array(total)
            arrays = [values[begin:end] for begin, end in spans]
            sums = device.empty(len(arrays), np.float64)
            device.poison(sums)
            keywords = {
                "workspace": device.empty(max(1, device.kernels.squared_norms_workspace(arrays)), np.uint8),
                "stream": device.stream(),
            }

            def call(arrays: Any = arrays, sums: Any = sums, keywords: dict[str, Any] = keywords) -> None:
                device.kernels.squared_norms(arrays, sums, **keywords)

            call()
            if i in (0, count - 1):
                self._verify(device.get(sums), spans, numbers)
            calls.append(call)
        return calls, sum(self.sizes) * numbers.host.itemsize

    def _verify(self, found: np.ndarray, spans: list[tuple[int, int]], numbers: Any) -> None:
        """Compares with sums over the pattern, which come from running totals of one period."""
        totals = np.concatenate([[0], np.cumsum(wide(numbers.host).astype(np.longdouble) ** 2)])

        def up_to(index: int) -> np.longdouble:
            periods, rest = divmod(index, len(numbers.host))
            return periods * totals[-1] + totals[rest]

        expected = np.array([float(up_to(end) - up_to(begin)) for begin, end in spans])
        wrong = ~np.isclose(found, expected, rtol=1e-11, atol=1e-9)
        if wrong.any():
            k = np.argmax(wrong)
            raise WrongResultError(f"{wrong.sum()} sums wrong, the first {found[k]} instead of {expected[k]}")


def cases() -> Iterator[Case]:
    """Yields the cases."""
    adam, adamw = Settings("adam"), Settings("adam", decay=0.01)
    small = [1000] * 300
    yield Update("update, 300 x 1000, Adam", adam, small, microseconds=10)
    resnet50 = resnet50_sizes()
    for name, settings in (("SGD", "sgd"), ("momentum", "momentum"), ("Lion", "lion")):
        yield Update(f"update, ResNet-50, {name}", Settings(settings), resnet50, share=0.9)
    yield Update("update, ResNet-50, Adam", adam, resnet50, share=0.9)
    yield Update("update, ResNet-50, AdamW", adamw, resnet50, share=0.9)
    for latest in ("float32", "bfloat16"):
        yield Update(f"update, ResNet-50, AdamW, {latest} folded in", adamw, resnet50, latest, share=0.9)
    gpt2_xl = gpt2_xl_sizes()
    yield Update("update, GPT-2 XL, SGD", Settings("sgd"), gpt2_xl, share=0.9)
    yield Update("update, GPT-2 XL, Adam", adam, gpt2_xl, share=0.9)
    yield Update("update, GPT-2 XL, AdamW", adamw, gpt2_xl, share=0.9)
    yield Update("update, GPT-2 XL, AdamW, float32 folded in", adamw, gpt2_xl, "float32", share=0.9)
    yield SquaredNorms("norms, 300 x 1000, float32", small, microseconds=12)
    yield SquaredNorms("norms, ResNet-50, float32", resnet50, share=0.9)
    yield SquaredNorms("norms, ResNet-50, bfloat16", resnet50, "bfloat16", share=0.9)
    yield SquaredNorms("norms, GPT-2 XL, float32", gpt2_xl, share=0.9)
