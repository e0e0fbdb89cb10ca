"""Reports about a model or a net: explain, draw, verify."""
