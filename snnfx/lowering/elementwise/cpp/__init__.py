"""The CPU back end: generated C++."""
