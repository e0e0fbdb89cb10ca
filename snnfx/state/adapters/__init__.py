"""Adapters for the neurons and layers of other libraries, one module per library.

snnfx imports an adapter module only when it converts a model that uses the library.
"""
