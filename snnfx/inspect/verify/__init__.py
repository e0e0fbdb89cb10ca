"""Compare a net with an independent reference: the user's model, stepped."""
