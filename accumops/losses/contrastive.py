"""Contrastive losses: each sample's two embeddings against those of all other samples in the batch.

They couple the samples of a batch, so they need the whole batch: train them with `loss_over="window"`. The matrix of
similarities has n rows. It is computed in tiles of rows, forward and backward, so that it takes n times `tile` values.
"""

from typing import Any

import keras
import tensorflow as tf

from accumops.losses.row_tiles import over_row_tiles


class _Contrastive(keras.losses.Loss):
    """What the contrastive losses share.

    Args:
        temperature: What the cosine similarities of embeddings are divided by, a positive float. None if the
            embeddings' dot products are the logits already, as behind a `LearnedTemperature` layer.
        tile: Rows of the matrix of similarities that exist at a time, an int of at least 1.
        reduction: As for `keras.losses.Loss`.
        name: The name of the loss.
        dtype: As for `keras.losses.Loss`.
    """

    def __init__(
        self,
        temperature: float | None,
        tile: int = 256,
        reduction: str = "sum_over_batch_size",
        name: str | None = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"`temperature` must be positive, or None. Received: {temperature}")
        if isinstance(tile, bool) or not isinstance(tile, int) or tile < 1:
            raise ValueError(f"`tile` must be an int of at least 1, a number of rows. Received: {tile!r}")
        self.temperature = temperature
        self.tile = tile

    def call(self, y_true: Any, y_pred: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample.

        Args:
            y_true: Not used: the two embeddings of a sample belong together.
            y_pred: Embeddings, of shape (batch, 2, features).

        Returns:
            The losses, of shape (batch,).
        """
        if y_pred.shape.rank != 3 or y_pred.shape[1] not in (2, None):
            raise ValueError(
                f"{type(self).__name__} needs two embeddings a sample, of shape (batch, 2, features), such as "
                f"`keras.ops.stack([left, right], axis=1)`. Received: y_pred.shape={y_pred.shape}"
            )
        if self.temperature is not None:
            y_pred = unit_length(y_pred) / self.temperature**0.5
        return self.values(y_pred[:, 0], y_pred[:, 1])

    def values(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample from embeddings whose dot products are the logits."""
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this loss again."""
        return {**super().get_config(), "temperature": self.temperature, "tile": self.tile}


@keras.saving.register_keras_serializable(package="accumops")
class InfoNCE(_Contrastive):
    """The cross-entropy of finding a sample's right embedding, among those of the batch, by its left one.

    `-log(exp(l_i·r_i / t) / sum_j exp(l_i·r_j / t))`, with embeddings of length 1 and temperature t.

    Args:
        temperature: The temperature t, a positive float. None if the dot products are the logits already.
        tile: Rows of the matrix of similarities that exist at a time.
        reduction: As for `keras.losses.Loss`.
        name: The name of the loss.
        dtype: As for `keras.losses.Loss`.

    Raises:
        ValueError: If `temperature` is not positive or `tile` less than 1; in a call, if `y_pred` is not of shape
            (batch, 2, features).

    Example:

    >>> embeddings = tf.constant([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> float(accumops.losses.InfoNCE(temperature=1.0)(tf.zeros(2), embeddings)).__round__(3)
    0.313

    Source: van den Oord et al. 2018, "Representation Learning with Contrastive Predictive Coding".
    """

    def __init__(
        self,
        temperature: float | None = 0.07,
        tile: int = 256,
        reduction: str = "sum_over_batch_size",
        name: str | None = "info_nce",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, tile, reduction, name, dtype)

    def values(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample from embeddings whose dot products are the logits."""
        return _cross_entropy(left, right, self.tile)


@keras.saving.register_keras_serializable(package="accumops")
class CLIPLoss(_Contrastive):
    """InfoNCE from left to right and from right to left, in equal parts.

    The paper learns the temperature: put a `LearnedTemperature` layer at the end of the model, and use
    `temperature=None` here.

    Args:
        temperature: The temperature, a positive float. None if the dot products are the logits already.
        tile: Rows of the matrix of similarities that exist at a time.
        reduction: As for `keras.losses.Loss`.
        name: The name of the loss.
        dtype: As for `keras.losses.Loss`.

    Raises:
        ValueError: As for `InfoNCE`.

    Example:

    >>> embeddings = tf.constant([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> float(accumops.losses.CLIPLoss(temperature=1.0)(tf.zeros(2), embeddings)).__round__(3)
    0.313

    Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision".
    """

    def __init__(
        self,
        temperature: float | None = 0.07,
        tile: int = 256,
        reduction: str = "sum_over_batch_size",
        name: str | None = "clip_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, tile, reduction, name, dtype)

    def values(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample from embeddings whose dot products are the logits."""
        return (_cross_entropy(left, right, self.tile) + _cross_entropy(right, left, self.tile)) / 2


@keras.saving.register_keras_serializable(package="accumops")
class NTXent(_Contrastive):
    """The cross-entropy of finding a sample's other embedding among all others of the batch, left and right ones.

    Each of a sample's two embeddings looks for the other among the 2n - 1 embeddings that are not itself. A sample's
    loss is the mean of the two.

    Args:
        temperature: The temperature, a positive float. None if the dot products are the logits already.
        tile: Rows of the matrix of similarities that exist at a time.
        reduction: As for `keras.losses.Loss`.
        name: The name of the loss.
        dtype: As for `keras.losses.Loss`.

    Raises:
        ValueError: As for `InfoNCE`.

    Example:

    >>> embeddings = tf.constant([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> float(accumops.losses.NTXent(temperature=1.0)(tf.zeros(2), embeddings)).__round__(3)
    0.551

    Source: Chen et al. 2020, "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR).
    """

    def __init__(
        self,
        temperature: float | None = 0.1,
        tile: int = 256,
        reduction: str = "sum_over_batch_size",
        name: str | None = "nt_xent",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, tile, reduction, name, dtype)

    def values(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample from embeddings whose dot products are the logits."""
        both, count = tf.concat([left, right], 0), tf.shape(left)[0]
        values = _cross_entropy(both, both, self.tile, partner=count)
        return (values[:count] + values[count:]) / 2


@keras.saving.register_keras_serializable(package="accumops")
class SigLIPLoss(_Contrastive):
    """Whether two embeddings belong to one sample, asked for each pair in the batch by itself.

    `sum_j log(1 + exp(-z_ij (l_i·r_j / t + b)))` for sample i, with z_ij = 1 for i = j and -1 otherwise.

    The paper learns the temperature and the bias: put a `LearnedTemperature` layer with a bias at the end of the model,
    and use `temperature=None` and `bias=0.0` here.

    Args:
        temperature: The temperature t, a positive float. None if the dot products are the logits already.
        bias: The bias b, a float.
        tile: Rows of the matrix of similarities that exist at a time.
        reduction: As for `keras.losses.Loss`.
        name: The name of the loss.
        dtype: As for `keras.losses.Loss`.

    Raises:
        ValueError: As for `InfoNCE`.

    Example:

    >>> embeddings = tf.constant([[[1.0, 0.0], [1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]]])
    >>> float(accumops.losses.SigLIPLoss(temperature=1.0, bias=0.0)(tf.zeros(2), embeddings)).__round__(3)
    1.006

    Source: Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training".
    """

    def __init__(
        self,
        temperature: float | None = 0.1,
        bias: float = -10.0,
        tile: int = 256,
        reduction: str = "sum_over_batch_size",
        name: str | None = "siglip_loss",
        dtype: Any = None,
    ) -> None:
        super().__init__(temperature, tile, reduction, name, dtype)
        self.bias = float(bias)

    def values(self, left: tf.Tensor, right: tf.Tensor) -> tf.Tensor:
        """Computes the loss of each sample from embeddings whose dot products, plus the bias, are the logits."""

        def of_rows(rows: tf.Tensor, positions: tf.Tensor, shared: tf.Tensor) -> tf.Tensor:
            logits = tf.matmul(rows, shared, transpose_b=True) + tf.cast(self.bias, rows.dtype)
            signs = 2 * tf.one_hot(positions, tf.shape(shared)[0], dtype=rows.dtype) - 1
            return tf.reduce_sum(tf.math.softplus(-signs * logits), -1)

        return over_row_tiles(of_rows, left, right, self.tile)

    def get_config(self) -> dict[str, Any]:
        """Returns the arguments to make this loss again."""
        return {**super().get_config(), "bias": self.bias}


def unit_length(embeddings: tf.Tensor) -> tf.Tensor:
    """Returns embeddings with length 1 along their last axis; one of zeros stays so."""
    return tf.math.l2_normalize(embeddings, -1)


def _cross_entropy(queries: tf.Tensor, keys: tf.Tensor, tile: int, partner: tf.Tensor | None = None) -> tf.Tensor:
    """The cross-entropy of each query's key among all keys.

    Args:
        queries: Of shape (n, features).
        keys: Of shape (n, features).
        tile: Queries whose logits exist at a time.
        partner: If None, the key of query i is i. Otherwise i + `partner`, modulo n, and key i is no choice for it.
    """

    def of_rows(rows: tf.Tensor, positions: tf.Tensor, shared: tf.Tensor) -> tf.Tensor:
        logits = tf.matmul(rows, shared, transpose_b=True)
        labels = positions
        if partner is not None:
            count = tf.shape(shared)[0]
            labels = (positions + partner) % count
            own = tf.one_hot(positions, count, on_value=True, off_value=False, dtype=tf.bool)
            logits = tf.where(own, tf.constant(-float("inf"), logits.dtype), logits)
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)

    return over_row_tiles(of_rows, queries, keys, tile)
