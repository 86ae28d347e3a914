"""What is noted of windows for those who ask: how noisy gradients are, and the norm of each variable's gradient."""

import contextlib
from collections.abc import Sequence

import keras
import tensorflow as tf

from accumops.adapters.untracked import Untracked
from accumops.window.counters import Counters
from accumops.window.gradient_norms import GradientNorms
from accumops.window.micro_batch import Window
from accumops.window.noise import GradientNoise
from accumops.window.noise_schedule import NoiseScaleSchedule


class Notes(tf.Module):
    """The notes of the windows of one owner. Functions make those that have been asked for when they are traced.

    Args:
        owner: The owner's name, for messages.
        reduction: `"mean"` or `"sum"`, as the windows'.
        schedule: A schedule that follows the noise of gradients, or None.
    """

    def __init__(self, owner: str, reduction: str, schedule: NoiseScaleSchedule | None) -> None:
        super().__init__(name="notes")
        self.noise = None if schedule is None else GradientNoise(schedule.decay, schedule)
        """What is known of the gradients' noise, where somebody has asked for it."""
        self._owner, self._reduction = owner, reduction
        self._untracked = Untracked(norms=None, wants_norms=False, strategy=None, counters=None, beside=None)
        self._names: Sequence[str] = ()

    def build(
        self,
        names: Sequence[str],
        beside: keras.Variable,
        counters: Counters,
        strategy: tf.distribute.Strategy | None,
    ) -> None:
        """Creates the variables that are needed.

        Args:
            names: The names of the trained variables.
            beside: A variable on whose device notes are to be.
            counters: The counters of the windows.
            strategy: The mirroring strategy that the windows are under, or None.
        """
        self._names = tuple(names)
        vars(self._untracked).update(beside=beside, counters=counters, strategy=strategy)
        if self.noise is not None:
            self._build_noise(self.noise)
        if self.tracks_norms:
            self.track_norms()

    @property
    def norms(self) -> GradientNorms | None:
        """The norm of each variable's gradient, where somebody has asked for it."""
        norms: GradientNorms | None = self._untracked.norms
        return norms

    @property
    def tracks_norms(self) -> bool:
        """Whether somebody has asked for the norms."""
        return bool(self._untracked.wants_norms)

    @property
    def look_at_sums(self) -> bool:
        """Whether a window's last gradients have to be in its sums where it ends."""
        return self.noise is not None or self.tracks_norms

    def track_noise(self, decay: float) -> GradientNoise:
        """Has functions that are traced from now on note the noise of gradients.

        Args:
            decay: See `GradientNoise`. What has been noted before goes on with it; a schedule keeps its own.

        Raises:
            ValueError: If windows are sums.
        """
        if self._reduction != "mean":
            raise ValueError(
                f"{self._owner} has reduction='sum'. The noise scale compares means over micro-batches with the mean "
                "over their window."
            )
        if self.noise is None:
            self.noise = GradientNoise(decay)
            if self._names:
                self._build_noise(self.noise)
        if self.noise.followed is None:
            self.noise.decay = decay
        return self.noise

    def _build_noise(self, noise: GradientNoise) -> None:
        strategy = self._untracked.strategy
        with tf.init_scope(), contextlib.nullcontext() if strategy is None else strategy.scope():
            noise.build(self._untracked.beside, mirrored=strategy is not None)
        if noise.followed is not None:
            self._untracked.counters.follow(noise.followed.steps)

    def track_norms(self) -> None:
        """Has functions that are traced from now on note the norm of each variable's gradient."""
        self._untracked.wants_norms = True
        if self._names and self.norms is None:
            self._untracked.norms = GradientNorms(self._names, self._untracked.beside, self._untracked.strategy)

    def end(self, window: Window, scale: float | tf.Tensor | None) -> None:
        """Notes a window that ends.

        Args:
            window: The window, with all of its micro-batches in the sums.
            scale: The factor that its gradients have, as those of a scaled loss; None if they have none.
        """
        if self.noise is not None and window.groups is not None:
            steps = tf.convert_to_tensor(self._untracked.counters.step)
            self.noise.end(window.groups, window.verdict.applies, scale, steps)
        if self.norms is not None:
            self.norms.note(window, scale)
