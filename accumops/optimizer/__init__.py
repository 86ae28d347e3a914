"""An optimizer that accumulates, how it ends a window, and what makes the update."""
