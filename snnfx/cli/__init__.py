"""The command line, `python -m snnfx`.

| module | content |
|---|---|
| `commands` | the commands `explain`, `draw` and `verify`, and their options |
| `model_factory` | loads the model that `pkg.module:factory` names |
"""
