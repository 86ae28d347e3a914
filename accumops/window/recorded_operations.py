"""The operations that a block of code adds to the graph that is being traced, so that others can wait for them."""

import tensorflow as tf


class Recording:
    """Records the operations that a block adds to the graph that is being traced; none when executing eagerly."""

    def __init__(self) -> None:
        self.operations: list[tf.Operation] = []

    def __enter__(self) -> "Recording":
        self._graph = None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()
        self._before = 0 if self._graph is None else len(self._graph.get_operations())
        return self

    def __exit__(self, *exception: object) -> None:
        if self._graph is not None:
            self.operations = self._graph.get_operations()[self._before :]

    @property
    def effects(self) -> list[tf.Operation]:
        """The recorded operations that may change something."""
        return [each for each in self.operations if each.op_def.is_stateful and each.type != "ReadVariableOp"]
