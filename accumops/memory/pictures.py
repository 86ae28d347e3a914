"""Pictures, for which matplotlib is optional."""

from typing import Any


def figure_of(width: float, height: float) -> Any:
    """Returns an empty matplotlib figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which looks for a screen
    except ImportError as error:
        raise ImportError(f"A picture needs matplotlib ({error}): pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")
