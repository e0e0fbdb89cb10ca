"""Convert models that run over time themselves: find the loops of a captured call and re-roll them into steps."""
