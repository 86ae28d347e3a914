"""The callback that logs how noisy gradients are, and what that says about the effective batch."""

import math
from typing import Any

from accumops.arguments import check_decay
from accumops.training.callbacks import EffectiveBatchSize
from accumops.training.layerwise_step import check_noise


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

    Windows need at least two micro-batches; micro-batches may have any sizes. The estimate contains all noise that
    micro-batches do not share: that of dropout too, and with batch normalization the micro-batches' own statistics.
    Variables with sparse gradients are left out. Nothing waits for a GPU within an epoch. While it is tracked, a
    window's last gradients pass through the accumulators. The averages are not saved: they start anew in a new process.

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
    ['batch_efficiency', 'effective_batch_size', 'gradient_noise_scale', 'gradient_norm', 'loss']
    """

    def __init__(self, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = check_decay(decay)

    def on_train_begin(self, logs: Any = None) -> None:
        """Has the training step note the norms; a function that was traced without them is made anew."""
        super().on_train_begin(logs)
        check_noise(self.model)
        state = self.optimizer.accumulator.state
        before = state.noise
        if before is None or before.decay != self.decay:
            state.track_noise(self.decay)
            self.model.make_train_function(force=True)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Adds the values to the logs."""
        super().on_epoch_end(epoch, logs)
        if logs is None:
            return
        noise = self.optimizer.accumulator.state.noise
        scale = shares = norm = math.nan
        if noise is not None and noise.built:
            scale, shares, norm = (float(each) for each in (noise.scale, noise.shares, noise.norm))
        # Shares are what losses divide by: samples, or the valid positions of a mask.
        samples = logs.get("effective_batch_size", math.nan)
        logs["gradient_noise_scale"] = scale / shares * samples
        logs["batch_efficiency"] = 1 / (1 + scale / shares)
        logs["gradient_norm"] = norm
