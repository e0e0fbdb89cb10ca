"""The step program, and the passes, manager and verifier that work on it."""
