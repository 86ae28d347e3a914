"""Layers that have to do with the size of a batch."""

from typing import NoReturn

from accumops.layers.batch_size_limit import BatchSizeLimit
from accumops.renamed import missing_name

__all__ = ["BatchSizeLimit"]


def __getattr__(name: str) -> NoReturn:
    raise missing_name(__name__, name)
