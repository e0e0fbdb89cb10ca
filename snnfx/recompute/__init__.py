"""Segments that recompute values in the backward pass instead of saving them."""
