"""Batch normalization whose statistics move once a window; models with such layers and back."""
