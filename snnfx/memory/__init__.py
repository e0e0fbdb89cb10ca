"""Memory as a plan: what a net holds as a function of the chunk, what is packed, and what is computed twice."""
