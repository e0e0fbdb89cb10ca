"""Models and oracles of the tests."""
