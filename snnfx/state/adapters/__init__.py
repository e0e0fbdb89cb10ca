"""Adapters: what makes other libraries' neurons and layers readable to snnfx.

Each module serves one library and imports it only when a model that uses it is converted.
"""
