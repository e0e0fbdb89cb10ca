"""Modules that run the regions of a converted net, and the custom operator behind them."""
