"""Sizes of memory, as people write and read them."""

import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def bytes_from(name: str, size: str | int) -> int:
    """Returns a size in bytes.

    Args:
        name: The name of the argument, for errors.
        size: Bytes, or a string like `"4GB"` or `"500MiB"`.

    Raises:
        TypeError: If it is neither an int nor a string.
        ValueError: If it is a string of another form, or not positive.
    """
    if isinstance(size, bool) or not isinstance(size, str | int):
        raise TypeError(f"`{name}` must be a number of bytes, or like '4GB'. Received: {size!r}")
    number = size
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]I?)?B\s*", size, re.IGNORECASE)
        if match is None:
            raise ValueError(f"`{name}` must be a number of bytes, or like '4GB' or '500MiB'. Received: {size!r}")
        number = int(float(match[1]) * _UNITS[(match[2] or "").upper()])
    if int(number) < 1:
        raise ValueError(f"`{name}` must be at least one byte. Received: {size!r}")
    return int(number)


def readable(size: float) -> str:
    """Returns a number of bytes with a unit."""
    return f"{size / 2**20:.1f}MiB" if size < 2**30 else f"{size / 2**30:.2f}GiB"
