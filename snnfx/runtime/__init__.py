"""`Net`, the converted model, and the execution of its calls."""
