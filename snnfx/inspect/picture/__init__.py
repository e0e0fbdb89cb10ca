"""Pictures of step graphs and converted nets."""
