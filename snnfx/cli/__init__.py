"""The command line, `python -m snnfx`.

| module | what is in it |
|---|---|
| `commands` | the commands `explain`, `draw` and `verify`, and their options |
| `model_factory` | loads the model that `pkg.module:factory` names |
"""
