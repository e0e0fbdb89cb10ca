"""Segments that recompute intermediate tensors in the backward pass instead of saving them."""
