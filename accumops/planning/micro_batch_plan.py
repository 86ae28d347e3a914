"""How a model trains within a memory limit: the micro-batch, the window, and what is recomputed."""

import dataclasses
import os
from typing import Any

import keras

from accumops.adapters.keras_functional import graph_of
from accumops.memory.pictures import figure_of
from accumops.memory.segments import Segment, regions_of, run_regions
from accumops.sizes import readable

_NAME_OF_WRAPPER = "accumops>GradientAccumulateModel"


@dataclasses.dataclass(frozen=True)
class MeasuredMicroBatch:
    """A micro-batch that was measured."""

    micro_batch_size: int
    recompute: str
    """What is recomputed: `"nothing"`, or how many segments of the model."""
    memory: int | None
    """The most bytes that training takes, or None if it was stopped at the limit."""
    seconds: float | None
    """The time of the micro-batch, or None."""

    @property
    def samples_per_second(self) -> float | None:
        """How many samples are trained in a second."""
        return None if self.seconds is None else self.micro_batch_size / self.seconds


@dataclasses.dataclass(frozen=True)
class MicroBatchPlan:
    """What `accumops.find_micro_batch_size` has found. `print` shows it as a table, and `plot` as a picture."""

    micro_batch_size: int
    """Samples a micro-batch."""
    accum_steps: int
    """Micro-batches a window. The last one of a window may be smaller."""
    effective_batch_size: int
    """Samples a window."""
    recompute: tuple[tuple[Segment, ...], ...]
    """The segments of the model that are recomputed, region by region; empty if nothing is."""
    predicted_peak: int
    """The most bytes that training is expected to take."""
    memory_limit: int
    """The limit, in bytes."""
    fixed: int
    """The bytes of `predicted_peak` that do not depend on the micro-batch: weights, accumulators, slots, the batches of
    `fit`, and on a CPU the program itself."""
    samples_per_second: float
    """How many samples are trained in a second."""
    measured: tuple[MeasuredMicroBatch, ...]
    """What was measured."""
    device: str
    """The device."""
    measured_by: str
    """Who has counted the memory."""
    notes: tuple[str, ...] = ()
    """What else there is to know."""

    @property
    def recomputes(self) -> str:
        """What is recomputed, in words."""
        return described(self.recompute)

    def __str__(self) -> str:
        lines = [
            f"micro_batch_size={self.micro_batch_size}, accum_steps={self.accum_steps} for an effective batch of "
            f"{self.effective_batch_size}, recomputing {self.recomputes}",
            f"expected: {readable(self.predicted_peak)} of {readable(self.memory_limit)}, of which "
            f"{readable(self.fixed)} do not depend on the micro-batch; {self.samples_per_second:.1f} samples a second",
            "",
            f"{'micro-batch':>11}  {'recomputes':<14}{'memory':>12}{'samples/s':>12}",
        ]
        for each in self.measured:
            chosen = each.micro_batch_size == self.micro_batch_size and each.recompute == self.recomputes
            memory = "over limit" if each.memory is None else readable(each.memory)
            speed = "" if each.samples_per_second is None else f"{each.samples_per_second:.1f}"
            mark = "  <- the plan" if chosen else ""
            lines.append(f"{each.micro_batch_size:>11}  {each.recompute:<14}{memory:>12}{speed:>12}{mark}")
        lines += ["", f"Memory on {self.device}, as counted by {self.measured_by}.", *self.notes]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws memory and speed over the micro-batch. Needs matplotlib.

        Args:
            path: The file, whose ending says the format: `.png`, `.pdf`, `.svg`.

        Raises:
            ImportError: If matplotlib is missing.
        """
        figure = figure_of(8, 3.4)
        memory_axes, speed_axes = figure.subplots(1, 2)
        for kind, shade in zip(sorted({each.recompute for each in self.measured}), _SHADES, strict=False):
            own = [each for each in self.measured if each.recompute == kind and each.memory and each.seconds]
            sizes = [each.micro_batch_size for each in own]
            for axes, heights in (
                (memory_axes, [(each.memory or 0) / 2**20 for each in own]),
                (speed_axes, [each.samples_per_second or 0.0 for each in own]),
            ):
                axes.plot(sizes, heights, "o-", color=shade, label=f"recomputes {kind}")
        memory_axes.axhline(self.memory_limit / 2**20, color="black", linewidth=1)
        memory_axes.text(0, self.memory_limit / 2**20, " limit", va="bottom", fontsize=8)
        memory_axes.set_ylabel("memory, MiB")
        speed_axes.set_ylabel("samples a second")
        speed_axes.legend(fontsize=8)
        for axes in (memory_axes, speed_axes):
            axes.axvline(self.micro_batch_size, color="#bdbdbd", linewidth=1, zorder=0)
            axes.set_xlabel("samples a micro-batch")
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=150)

    def apply(self, model: keras.Model) -> keras.Model:
        """Has a model train as planned.

        A `GradientAccumulateModel` gets the micro-batch size, and the model that it wraps recomputes what is planned.
        Any other model recomputes what is planned: wrap it with `micro_batch_size=plan.micro_batch_size`.

        Args:
            model: The model that the plan was made for, or one with the same graph.

        Returns:
            The model.

        Raises:
            TypeError: If it is not a Keras model.
            ValueError: If its graph is another one.
        """
        if not isinstance(model, keras.Model):
            raise TypeError(f"`model` must be a keras.Model. Received: {model!r}")
        is_wrapper = keras.saving.get_registered_name(type(model)) == _NAME_OF_WRAPPER
        net: Any = model.model if is_wrapper else model
        if self.recompute:
            regions = regions_of(graph_of(net)) if graph_of(net) is not None else []
            ends = [max((segment.end for segment in each), default=0) for each in self.recompute]
            if len(regions) != len(self.recompute) or any(
                end > region.begin + len(region.nodes) for region, end in zip(regions, ends, strict=True)
            ):
                raise ValueError(f"The plan was made for another graph than that of '{net.name}'.")
            run_regions(regions, self.recompute)
        if is_wrapper:
            wrapper: Any = model
            wrapper.micro_batch_size = self.micro_batch_size
        return model


_SHADES = ("#2171b5", "#fd8d3c", "#6baed6", "#31a354")


def described(segments: tuple[tuple[Segment, ...], ...]) -> str:
    """What is recomputed, in words."""
    count = sum(segment.recomputed for each in segments for segment in each)
    return "nothing" if not count else f"{count} segment{'s' if count > 1 else ''}"
