"""The formula for what a window costs on N devices, which docs/scaling.md explains.

Run as a program, it prints the predictions of that page.
"""

import dataclasses
import math
from collections.abc import Sequence

SIZES = {"bfloat16": 2, "float32": 4, "float64": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """An all-reduce, described by what each replica gives to it."""

    dtype: str
    values: int

    @property
    def bytes(self) -> int:
        """The bytes that each replica gives and gets."""
        return self.values * SIZES[self.dtype]


def at_the_end(values: int, channels: Sequence[int] = (), *, wide: int = 0) -> list[Collective]:
    """Returns the all-reduces at the end of a window.

    Args:
        values: The number of trainable values whose gradients are summed in float32 accumulators.
        channels: The number of channels of each AccumBatchNormalization layer.
        wide: The number of trainable values of float64 variables, whose accumulators are float64.
    """
    # The window's weight is one value more, float64 if any accumulator is.
    gradients = [Collective("float64", wide + bool(wide)), Collective("float32", values + (not wide))]
    moments = [Collective("float64", len(channels) + sum(channels)), Collective("float64", sum(channels))]
    return [each for each in gradients + moments if each.values]


def of_a_micro_batch(channels: Sequence[int]) -> list[Collective]:
    """Returns the all-reduces that layers with `synchronized=True` add to each micro-batch, forward and backward."""
    each_layer = [[Collective("float32", 1 + count), Collective("float32", count)] for count in channels]
    return 2 * [each for layer in each_layer for each in layer]


def total_bytes(collectives: Sequence[Collective]) -> int:
    """Returns the bytes that a replica gives to all these all-reduces."""
    return sum(each.bytes for each in collectives)


@dataclasses.dataclass(frozen=True)
class Network:
    """A connection of devices or nodes: bytes a second in each direction, and the seconds that a message takes."""

    bytes_per_second: float
    latency: float

    def all_reduce(self, count: int, of: int) -> float:
        """Returns the seconds to reduce `of` bytes on each of `count` devices, by a ring or a tree."""
        transfer = 2 * of / self.bytes_per_second
        ring = (count - 1) / count * transfer + 2 * (count - 1) * self.latency
        tree = transfer + 2 * math.ceil(math.log2(count)) * self.latency
        return min(ring, tree)


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A number of nodes, each with the same number of devices."""

    name: str
    nodes: int
    devices: int
    inside: Network
    across: Network
    """The network that each device has to itself."""
    memory: float = 3.0e12
    """Bytes a second between a device and its memory."""

    def all_reduce(self, of: int) -> float:
        """Returns the seconds to reduce `of` bytes on each device.

        The devices of a node reduce a share each and afterwards exchange the results; in between, the nodes reduce
        these shares across the network.
        """
        return self.inside.all_reduce(self.devices, of) + self.across.all_reduce(self.nodes, -(-of // self.devices))


@dataclasses.dataclass(frozen=True)
class Training:
    """A model, and the seconds of a micro-batch's forward and backward pass on a device."""

    name: str
    values: int
    pass_time: float
    channels: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WindowTime:
    """The seconds of a window, by kind of work."""

    passes: float
    accumulating: float
    reducing: float
    updating: float

    @property
    def total(self) -> float:
        """The seconds of the whole window."""
        return self.passes + self.accumulating + self.reducing + self.updating

    @property
    def efficiency(self) -> float:
        """The share of the window that the forward and backward passes take."""
        return self.passes / self.total

    @property
    def communication(self) -> float:
        """The share of the window that the all-reduces take."""
        return self.reducing / self.total

    def overlap(self, accum_steps: int) -> float:
        """Returns the largest share of the window that overlapping could save.

        All-reduces could at best run during the last backward pass, which is two thirds of a pass.
        """
        return min(self.reducing, self.passes / accum_steps * 2 / 3) / self.total


def time_of(training: Training, cluster: Cluster, accum_steps: int) -> WindowTime:
    """Returns the time of a window of `accum_steps` micro-batches a device, with float32 variables and Adam."""
    pass_over_memory = training.values / cluster.memory  # seconds to move one byte of each value
    reductions = at_the_end(training.values, training.channels)
    return WindowTime(
        passes=accum_steps * training.pass_time,
        accumulating=(12 * accum_steps - 4) * pass_over_memory,
        reducing=sum(cluster.all_reduce(each.bytes) for each in reductions),
        updating=(16 + 28) * pass_over_memory,
    )


def accum_steps_for(efficiency: float, training: Training, cluster: Cluster) -> int | None:
    """Returns the fewest micro-batches in a window that reach an efficiency, or None if no number does."""
    one, two = (time_of(training, cluster, accum_steps) for accum_steps in (1, 2))
    step = two.total - one.total
    left = training.pass_time - efficiency * step
    return max(1, math.ceil(efficiency * (one.total - step) / left)) if left > 0 else None


def resnet50_channels() -> tuple[int, ...]:
    """Returns the channels of the 53 batch normalization layers in keras.applications.ResNet50."""
    channels = [64]
    for blocks, filters in ((3, 64), (4, 128), (6, 256), (3, 512)):
        channels += [4 * filters] + blocks * [filters, filters, 4 * filters]
    return tuple(channels)


# Eight tenths of the bandwidth in the hardware's data sheets.
NVLINK = Network(0.8 * 450e9, 3e-6)
INFINIBAND = Network(0.8 * 400e9 / 8, 10e-6)
ETHERNET = Network(0.8 * 25e9 / 8, 30e-6)
ONE_NODE = Cluster("8 GPUs, one node", 1, 8, NVLINK, INFINIBAND)
MANY_NODES = Cluster("512 GPUs, 64 nodes", 64, 8, NVLINK, INFINIBAND)
HOSTS = Cluster("8 hosts with one GPU each, Ethernet", 8, 1, NVLINK, ETHERNET)

RESNET50 = Training("ResNet-50, b = 64", 25_583_592, 64 / 2500, resnet50_channels())
TRANSFORMER = Training("transformer, b = 8", 1_500_000_000, 8 * 1024 * 6 * 1.5e9 / 4e14)
TRANSFORMER_1 = Training("transformer, b = 1", 1_500_000_000, 1024 * 6 * 1.5e9 / 4e14)

CASES = (
    *((RESNET50, cluster) for cluster in (ONE_NODE, MANY_NODES, HOSTS)),
    *((training, cluster) for training in (TRANSFORMER, TRANSFORMER_1) for cluster in (ONE_NODE, MANY_NODES)),
)


def window_times() -> list[str]:
    """Returns the window times of all cases as lines of Markdown."""
    lines = [
        "| | K | window | passes | all-reduces | communication | efficiency | overlap | K windows of 1 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for training, cluster in CASES:
        of_one = time_of(training, cluster, 1).total
        for steps in (1, 4, 16):
            time = time_of(training, cluster, steps)
            milliseconds = (f"{1e3 * each:,.1f}" for each in (time.total, time.passes, time.reducing))
            shares = (f"{100 * each:.0f} %" for each in (time.communication, time.efficiency, time.overlap(steps)))
            case = f"{training.name}; {cluster.name}" if steps == 1 else ""
            lines.append(_row(case, str(steps), *milliseconds, *shares, f"{1e3 * steps * of_one:,.1f}"))
    return lines


def fewest_accum_steps() -> list[str]:
    """Returns the fewest micro-batches of all cases for some efficiencies, as lines of Markdown."""
    lines = ["| the fewest K for an efficiency of | 50 % | 80 % | 90 % |", "|---|---|---|---|"]
    for training, cluster in CASES:
        fewest = (accum_steps_for(efficiency, training, cluster) for efficiency in (0.5, 0.8, 0.9))
        lines.append(
            _row(f"{training.name}; {cluster.name}", *("none" if each is None else str(each) for each in fewest))
        )
    return lines


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print("\n".join([*window_times(), "", *fewest_accum_steps()]))
