"""Facts about a step program that passes ask for; an analysis changes nothing."""
