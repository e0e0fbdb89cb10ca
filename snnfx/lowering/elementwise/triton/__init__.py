"""The GPU back end: generated Triton."""
