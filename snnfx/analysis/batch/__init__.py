"""Batch analysis: where the batch dimension of each value is, and which nodes may be folded."""
