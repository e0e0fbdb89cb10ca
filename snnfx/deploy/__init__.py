"""Export a net to a file that runs without snnfx: torch.export, AOTInductor, ONNX, NIR.

| module | content |
|---|---|
| `export` | `snnfx.export` |
| `interface` | the inputs, states and outputs of an exported file, with their names and axes |
| `exported_module` | the net as a function of its inputs and states, for tracing |
| `scanned_regions` | loop and map regions as torch's `scan` operator |
| `functional_step` | one step as an ATen graph without side effects |
| `tracing` | the exported program: the net as ATen calls with named dynamic axes |
| `onnx_file`, `pt2_file` | write the program |
| `nir_step`, `nir_forms`, `neuron_fit`, `nir_layers`, `nir_parts` | a step as layers and fitted neurons |
| `nir_file`, `nir_export` | write a NIR graph |
| `from_nir`, `nir_modules`, `nir_cells` | `snnfx.from_nir` |
| `checking`, `run_file` | run the written file in a process without snnfx, and compare |
"""
