"""What has a state of its own that follows a window, such as batch normalization, and how it joins the window.

A layer knows its variables but not who will train them; an accumulator is built for variables but does not know their
layers. So a layer registers its variables here, and the accumulator that is built for one of them finds the layer.
"""

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf


class WindowMember(Protocol):
    """What follows a window: it is told when the window ends or is dropped."""

    def check_window(self, accum_steps: Any) -> None:
        """Raises if the member's own windows have another number of micro-batches."""

    def join_window(self, accumulator: Any) -> None:
        """Is called when an accumulator is built for a variable that the member has registered."""

    @classmethod
    def close_windows(cls, members: Sequence[Any]) -> None:
        """Is called where a window ends, after the update, once for all members of the class.

        Under a mirroring strategy each replica calls it, in a replica context outside of any condition: members may
        communicate.
        """

    def drop_window(self) -> None:
        """Is called where a window is dropped; under a strategy where `reset` is called, once or on each replica."""


# The key is the `id` of a variable, since TensorFlow's variables cannot be keys. An id may be used again once its
# variable is gone; a member keeps its variables alive, and its entries go with it, so no entry outlives its variable.
_MEMBERS: weakref.WeakValueDictionary[int, WindowMember] = weakref.WeakValueDictionary()


def register_member(variable: keras.Variable, member: WindowMember) -> None:
    """Has `member`, which owns `variable`, join the window of the accumulator that is built for it."""
    _MEMBERS[id(variable)] = member


def members_of(variables: Sequence[tf.Variable | keras.Variable]) -> list[WindowMember]:
    """The members that have registered one of the variables, each once."""
    found = [_MEMBERS.get(id(variable)) for variable in variables]
    return list({id(member): member for member in found if member is not None}.values())
