"""Layers that have to do with the batch: its size, and its samples together."""

from typing import NoReturn

from accumops.layers.batch_size_limit import BatchSizeLimit
from accumops.layers.coupled_layer import CoupledLayer
from accumops.renamed import missing_name

__all__ = ["BatchSizeLimit", "CoupledLayer"]


def __getattr__(name: str) -> NoReturn:
    raise missing_name(__name__, name)
