"""The command line, `python -m snnfx`.

| module | content |
|---|---|
| `commands` | the commands `explain`, `draw`, `verify`, `profile` and `export`, and their options |
| `model_factory` | loads the model that `pkg.module:factory` names |
"""
