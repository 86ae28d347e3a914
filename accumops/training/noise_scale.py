"""The callback that logs how noisy gradients are, and what that says about the effective batch."""

import dataclasses
import math
import os
from typing import Any

from accumops.arguments import check_decay
from accumops.memory.pictures import figure_of
from accumops.training.callbacks import EffectiveBatchSize
from accumops.training.layerwise_step import check_noise
from accumops.window.noise import GradientNoise, Seen


class GradientNoiseScale(EffectiveBatchSize):
    """Logs the gradient noise scale: the effective batch at which noise and gradient are equally large.

    A batch much smaller than the noise scale gains almost as much from each further sample as from the ones before; a
    batch much larger makes updates that are hardly better than those of the noise scale. It is the simple noise scale
    of [McCandlish et al., 2018](https://arxiv.org/abs/1812.06162), from what a window has anyway: the squared norms of
    its micro-batches' gradients, and of their mean. These are added to the logs of each epoch:

    - `gradient_noise_scale`: in samples. Averages over windows, of numerator and denominator apart, with `decay`.
    - `batch_efficiency`: 1 / (1 + noise scale / effective batch): the share of the best possible step that an update
      makes, with the learning rate that suits it.
    - `gradient_norm`: the norm of the epoch's last window, without the factor of a scaled loss, before any clipping.
    - `effective_batch_size`: as `EffectiveBatchSize` logs it.
    - `accum_steps`: micro-batches a window, on average over the epoch; under a strategy, those of a replica.

    `plot` draws them. Windows need at least two micro-batches; micro-batches may have any sizes. The estimate contains
    all noise that micro-batches do not share: that of dropout too, and with batch normalization the micro-batches' own
    statistics. Variables with sparse gradients are left out. Nothing waits for a GPU within an epoch. While it is
    tracked, a window's last gradients pass through the accumulators. The averages are not saved: they start anew in a
    new process.

    Args:
        decay: What is left of the averages after one more window, at least 0 and less than 1.

    Raises:
        TypeError: If `decay` is not a number.
        ValueError: If `decay` is out of range; in `fit`, if nothing accumulates, if windows are sums
            (`reduction="sum"`), if batch normalization has `statistics="window"`, or if the model has a `train_step` of
            its own, whose samples are not counted.

    Example:

    >>> net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    >>> model = accumops.GradientAccumulateModel(net, micro_batch_size=4)
    >>> model.compile("sgd", loss="mse")
    >>> x, y = tf.random.normal([64, 3]), tf.random.normal([64, 1])
    >>> history = model.fit(x, y, batch_size=32, callbacks=[accumops.GradientNoiseScale()], verbose=0)
    >>> sorted(history.history)
    ['accum_steps', 'batch_efficiency', 'effective_batch_size', 'gradient_noise_scale', 'gradient_norm', 'loss']
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = check_decay(decay)
        self._epochs: dict[int, _Epoch] = {}
        self._seen_before = Seen()

    def on_train_begin(self, logs: Any = None) -> None:
        """Has the training step note the norms; a function that was traced without them is made anew."""
        super().on_train_begin(logs)
        check_noise(self.model)
        notes = self.optimizer.accumulator.state.notes
        before = None if notes.noise is None else notes.noise.decay
        if before != notes.track_noise(self.decay).decay:
            self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts to count."""
        super().on_epoch_begin(epoch, logs)
        self._seen_before = self._seen_so_far()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the values to the logs."""
        super().on_epoch_end(epoch, logs)
        if logs is None:
            return
        noise = self._noise
        scale, norm = (math.nan, math.nan) if noise is None else (float(noise.scale), float(noise.norm))
        windows, steps, shares = (
            now - before for now, before in zip(self._seen_so_far(), self._seen_before, strict=True)
        )
        # Shares are what losses divide by: samples, or the valid positions of a mask.
        scale *= self._samples_seen / shares if shares else math.nan
        batch = logs["effective_batch_size"]
        logs["gradient_noise_scale"] = scale
        logs["batch_efficiency"] = 1 / (1 + scale / batch)
        logs["gradient_norm"] = norm
        logs["accum_steps"] = steps / windows if windows else math.nan
        self._epochs = {each: values for each, values in self._epochs.items() if each < epoch}
        self._epochs[epoch] = _Epoch(scale, batch, logs["accum_steps"])

    @property
    def _noise(self) -> GradientNoise | None:
        """What is known of the noise, once the optimizer is built."""
        noise: GradientNoise | None = self.optimizer.accumulator.state.notes.noise
        return noise if noise is not None and noise.built else None

    def _seen_so_far(self) -> Seen:
        return Seen() if self._noise is None else self._noise.seen()

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws noise scale, effective batch and K over the epochs. Needs matplotlib.

        The shade goes from half the effective batch to twice that: a noise scale in it is a fair trade of samples for
        updates. Above it a larger K pays, below it a smaller one. A `fit` that goes on with `initial_epoch` goes on in
        the picture. An epoch whose noise scale is not known, or infinite, is left out of its line.

        Args:
            path: The file, whose ending says the format: `.png`, `.pdf`, `.svg`.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If no epoch has ended.
        """
        if not self._epochs:
            raise ValueError("There is nothing to plot before an epoch has ended: give the callback to `fit` first.")
        figure = figure_of(8, 4.6)
        above, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [2.2, 1]})
        epochs = [epoch + 1 for epoch in self._epochs]  # as `fit` prints them
        values = list(self._epochs.values())
        batches = [each.effective_batch for each in values]
        above.fill_between(epochs, [each / 2 for each in batches], [2 * each for each in batches], color="#deebf7")
        above.plot(epochs, batches, ".-", color="#2171b5", label="effective batch, shaded from half to twice of it")
        scales = [each.noise_scale if math.isfinite(each.noise_scale) else math.nan for each in values]
        above.plot(epochs, scales, ".-", color="#fd8d3c", label="gradient noise scale")
        above.set_ylabel("samples")
        above.legend(fontsize=8)
        below.plot(epochs, [each.accum_steps for each in values], ".-", color="#31a354")
        below.set_ylabel("K")
        below.set_xlabel("epoch")
        for axes, base in ((above, 10), (below, 2)):
            axes.set_yscale("log", base=base)
            axes.grid(axis="y", color="#eeeeee")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        below.yaxis.set_major_formatter("{x:g}")
        below.xaxis.get_major_locator().set_params(integer=True)
        figure.savefig(path, dpi=150)


@dataclasses.dataclass(frozen=True)
class _Epoch:
    """What an epoch has told, for the picture."""

    noise_scale: float
    effective_batch: float
    accum_steps: float
