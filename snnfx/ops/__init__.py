"""Functions that emitted graphs call."""
