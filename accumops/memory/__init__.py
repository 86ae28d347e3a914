"""Memory: running parts of a model again instead of keeping what they computed."""
