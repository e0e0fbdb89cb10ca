"""Record the step of a loop as ATen calls and generate kernels from it."""
