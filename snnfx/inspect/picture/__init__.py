"""Pictures of step graphs and converted nets: `snnfx.draw`.

| module | content |
|---|---|
| `draw` | `snnfx.draw`: which part of a model or net goes into which frame |
| `drawn_operations`, `repeated_blocks` | which operations are drawn: repeated blocks once, closed modules as a box |
| `frames` | the frame of each operation: module, region, repeated block |
| `densities` | firing rates of a profile |
| `painter` | nodes of a program as boxes, pills and arrows |
| `layer_summary` | one layer or operation in a few characters, e.g. `1→64 3x3 pad 1` |
| `dot` | the elements of a picture, their styles, and the DOT text |
| `drawing` | `Drawing`, what `draw` returns: rendering with graphviz |
| `text_lengths` | text widths in SVG files that hold in every viewer |
"""
