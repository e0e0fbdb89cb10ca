"""Reports about a model or a net: `explain`, `draw`, `profile` and `verify`.

| module | content |
|---|---|
| `explain` | `snnfx.explain`: converts a model and collects the rows of the report |
| `report` | `Report`, what `explain` returns: rows as data, and their layout as text |
| `conversion_notes` | the sentences of a report about state, BatchNorm, random numbers, kernels |
| `computing_nodes` | the nodes that a report counts, and the same node in two programs |
| `source_expressions` | nodes printed as Python expressions |
| `memory_report`, `memory_phases`, `memory_picture` | predicted memory: section of the report, data, picture |
| `region_execution`, `event_layers` | how each region and layer ran: kernel, stepped, dense, by events |
| `image_formats`, `linear_layers` | the memory format of convolutions, and the library of linear layers |
| `profile_data` | the rows of a profile |
| `document`, `plain_data` | output as terminal text or Markdown, and as JSON data |
| `picture/` | `snnfx.draw` |
| `profile/` | `snnfx.profile`: a measured call |
| `verify/` | `snnfx.verify`, with its own reference implementation |
"""
