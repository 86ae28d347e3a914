"""Layers that have to do with the size of a batch."""

from accumops.layers.batch_size_limit import BatchSizeLimit

__all__ = ["BatchSizeLimit"]
