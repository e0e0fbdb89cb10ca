"""State as values: the `Stateful` protocol, the registry of stateful modules, state passed as arguments."""
