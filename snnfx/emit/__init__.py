"""Emit FX graphs from partitioned step programs."""
