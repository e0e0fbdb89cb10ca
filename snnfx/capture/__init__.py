"""Record one time step of a module as a step program."""
