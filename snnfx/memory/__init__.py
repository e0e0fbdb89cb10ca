"""Predict the memory of a net, and plan chunk lengths and recomputation within a budget."""
