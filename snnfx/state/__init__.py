"""Explicit state: the `Stateful` protocol, adapters of stateful modules, state passed as arguments."""
