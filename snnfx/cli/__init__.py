"""The command line: `python -m snnfx`."""
