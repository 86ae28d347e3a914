"""The `limit` suite: what recompute is worth where memory is limited and gradients are accumulated anyway.

A smaller micro-batch keeps to the limit, too. Recompute allows a larger one, which has to be faster by more than the
second forward pass costs.
"""

from collections.abc import Callable

import keras

from accumops.benchmark.contender import Contender, time_contenders
from accumops.benchmark.recompute import convolutional, training_step, transformer
from accumops.benchmark.result import Result
from accumops.memory.profile import memory_profile
from accumops.memory.recompute_layers import recompute_layers

ROUNDS = 10
SMALL = (2, 8)  # micro-batches without recompute, whose memory is the limit
FACTORS = (2, 4)
_WARMUP = 2


def turns(rounds: int) -> int:
    """How often `run` calls `progress`."""
    return len(NETWORKS) * len(SMALL) * (1 + _WARMUP + rounds)


def run(*, device: str, rounds: int, progress: Callable[[], object]) -> Result:
    """Times micro-batches a sample: small ones, and larger ones that recompute within the same memory.

    Args:
        device: `"CPU"` or `"GPU"`.
        rounds: Timed runs of each contender.
        progress: Called after each round.
    """
    rows = []
    for network in NETWORKS:
        for small in SMALL:
            limit = memory_of(network, small)
            sizes = {f"{factor} times the samples, recomputed": factor * small for factor in FACTORS}
            contenders = [
                Contender(name, lambda n=network, b=size, m=limit: _step(n, b, m), times=size)  # type: ignore[misc]
                for name, size in sizes.items()
            ]
            plain = Contender("all activations kept", lambda n=network, b=small: _step(n, b), floor=True, times=small)  # type: ignore[misc]
            case = f"{network}, {small} samples in {limit / 2**20:.0f} MiB"
            # The row of a size that no plan keeps to the limit has the error as its note.
            rows += time_contenders(
                case, [plain, *contenders], device=device, rounds=rounds, warmup=_WARMUP, progress=progress
            )
    return Result(
        "micro-batches within a memory limit, time of a sample",
        tuple(rows),
        ("The limit is the predicted memory of the small micro-batch, weights and gradients included.",),
        settings={"small": SMALL, "factors": FACTORS},
    )


def memory_of(network: str, batch_size: int) -> int:
    """The predicted bytes of a training step without recompute, weights included."""
    profile = memory_profile(NETWORKS[network](), batch_size, measure=False)
    return profile.weights + profile.state + profile.steps[0].predicted


def _step(network: str, batch_size: int, limit: int | None = None) -> Callable[[], object]:
    model = NETWORKS[network]()
    if limit is not None:
        recompute_layers(model, memory=limit, batch_size=batch_size)
    return training_step(model, batch_size)


def _application(name: str) -> Callable[[], keras.Model]:
    return lambda: getattr(keras.applications, name)(
        input_shape=(96, 96, 3), weights=None, classes=10, classifier_activation=None
    )


NETWORKS: dict[str, Callable[[], keras.Model]] = {
    "residual convolutions": lambda: convolutional()[0],
    "transformer": lambda: transformer()[0],
    "ResNet50": _application("ResNet50"),
    "MobileNetV2": _application("MobileNetV2"),
}
