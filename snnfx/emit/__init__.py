"""From a step program with regions to the multi-step FX graph."""
