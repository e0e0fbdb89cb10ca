"""Functions called by step graphs and emitted graphs."""
