"""The step program, and the base class of passes, the pass manager and the verifier."""
