"""Run a model and restore everything that the run changed."""
