"""What has a state of its own that follows a window, such as batch normalization, and how it joins the window.

A layer knows its variables but not who will train them; an accumulator is built for variables but does not know their
layers. So a layer registers its variables here, and the accumulator that is built for one of them finds the layer.
"""

import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import keras
import tensorflow as tf

from accumops.adapters.tensorflow import xla_compiles_this


class WindowMember(Protocol):
    """What follows windows."""

    def check_window(self, accum_steps: Any) -> None:
        """Raises if the member's own windows have another number of micro-batches."""

    def found_by(self, accumulator: Any, variables: Sequence[tf.Variable | keras.Variable]) -> Any:
        """Is called when an accumulator is built for variables of which the member has registered one.

        Returns the accumulator that it has followed until now, if that was built for the same variable, or None.
        """


class MemberWindow(Protocol):
    """What a member keeps of an open window: it is told when the window ends or is dropped."""

    member: WindowMember

    @classmethod
    def close_windows(cls, windows: Sequence[Any]) -> None:
        """Is called where a window ends, after the update, once for what all members of a kind keep.

        Under a mirroring strategy each replica calls it, in a replica context outside of any condition: members may
        communicate.
        """

    @classmethod
    def drop_windows(cls, windows: Sequence[Any], unless: tf.Tensor | None = None) -> None:
        """Is called where a window is dropped, once for what all members of a kind keep.

        Under a strategy it is called where `reset` is called, once or on each replica.

        Args:
            windows: What the members keep.
            unless: A bool scalar: if it is true, the window stays. None drops it.
        """

    def release(self) -> None:
        """Is called where the window's owner leaves the member."""


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


class Members:
    """What follows the windows of one owner.

    Args:
        owner: The name of the accumulator, for messages.
    """

    def __init__(self, owner: str) -> None:
        self.added_by_model = False
        """Whether a model that knows its layers adds them, and the accumulator does not look for them."""
        self._owner = owner
        self._windows: list[MemberWindow] = []
        self._lost: dict[str, str] = {}
        # Whether a member is lost, for functions that were traced before. On the host nothing waits for it.
        self._any_lost: tf.Variable | None = None

    def __bool__(self) -> bool:
        return bool(self._windows)

    def add(self, window: MemberWindow, *, can_be_lost: bool = False) -> None:
        """Has the end of a window call `close_windows` of what a member keeps of it, and its drop `drop_windows`.

        Args:
            window: What a member keeps.
            can_be_lost: Whether another accumulator may take the member away.
        """
        self._windows.append(window)
        if can_be_lost and self._any_lost is None:
            with tf.init_scope(), tf.device("/CPU:0"):
                self._any_lost = tf.Variable(False, trainable=False, name="any_member_lost")

    def window_of(self, member: WindowMember) -> Any:
        """What a member keeps of these windows, or None if it is not among the members."""
        return next((each for each in self._windows if each.member is member), None)

    def remove(self, window: MemberWindow) -> None:
        """Undoes `add`."""
        self._windows = [each for each in self._windows if each is not window]

    def close(self) -> None:
        """Ends what members keep of the window; under a strategy, on the replica that runs."""
        for kind, windows in self._by_kind():
            kind.close_windows(windows)

    def drop(self, unless: tf.Tensor | None = None) -> None:
        """Drops what members keep of the window, unless a bool scalar is true."""
        for kind, windows in self._by_kind():
            kind.drop_windows(windows, unless)

    def _by_kind(self) -> Iterator[tuple[type[MemberWindow], list[MemberWindow]]]:
        for kind in dict.fromkeys(type(window) for window in self._windows):
            yield kind, [window for window in self._windows if type(window) is kind]

    def release(self) -> None:
        """Has members forget these windows, which are not used any longer."""
        for window in self._windows:
            window.release()

    def lose(self, member: str, winner: str) -> None:
        """Has further micro-batches raise an error: a member follows another accumulator's windows.

        Args:
            member: The member's name.
            winner: The name of the accumulator.
        """
        self._lost[member] = winner
        self._note_lost()

    def regain(self, member: str) -> None:
        """Undoes `lose`."""
        if self._lost.pop(member, None) is not None:
            self._note_lost()

    def _note_lost(self) -> None:
        if self._any_lost is not None:
            with tf.init_scope():
                self._any_lost.assign(bool(self._lost))

    def check(self) -> list[tf.Operation]:
        """Raises if a member is lost, and returns operations that check it when a function runs again.

        XLA compiles no such operation.
        """
        for member, winner in self._lost.items():
            raise ValueError(
                f"The layer '{member}' follows the windows of {winner} since that was built, and no longer those of "
                f"{self._owner}. {_REMEDY}"
            )
        if self._any_lost is None or tf.executing_eagerly() or xla_compiles_this():
            return []
        with tf.device("/CPU:0"):
            message = (
                f"Layers that followed the windows of {self._owner} follow those of an accumulator that was built "
                f"later. {_REMEDY}"
            )
            return [tf.debugging.assert_equal(self._any_lost, False, message=message)]


_REMEDY = (
    "Train with one of the two: `layer.join_window(accumulator)` says which. To train in turns, wrap each model in a "
    "GradientAccumulateModel: a layer has a window for each of them."
)
