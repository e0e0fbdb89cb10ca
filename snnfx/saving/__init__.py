"""Save a net with its plan to one safetensors file, and load it for a model with the same code.

| module | content |
|---|---|
| `save`, `load` | `snnfx.save`, `snnfx.load` |
| `saved_file` | the file: tensors, and one JSON text in its metadata |
| `model_description` | what a plan depends on in a model: its modules, its code, the values that its code reads |
| `program_records` | a step program as plain values, and back |
| `plain_values` | values of graphs as JSON, and back |
| `known_functions` | the functions that a saved graph may call, by name |
"""
