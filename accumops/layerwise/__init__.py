"""Windows that run layer by layer, so that a layer that couples samples sees all of its window."""
