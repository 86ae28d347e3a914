"""A model that trains with windows: its step, its functions and its callbacks."""
