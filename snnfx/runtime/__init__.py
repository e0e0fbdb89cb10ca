"""The converted net and its calls."""
