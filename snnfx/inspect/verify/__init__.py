"""Compare a net with an independent reference, the user's model run step by step: `snnfx.verify`.

| module | content |
|---|---|
| `verify` | `snnfx.verify`: the arguments |
| `verification` | compares in the dtype of the model and, if they differ there, in float64 |
| `whole_call` | nets of models that run over time themselves |
| `matching_modules` | refuses a model whose modules cannot be compared by name |
| `check` | one comparison: outputs, states, contents of the modules, gradients |
| `runs` | runs of net and reference under the same conditions; everything is restored |
| `oracle`, `coroutines` | the reference: stepping the model, also with BatchNorm statistics over T*N |
| `observed_contents` | everything that a model stores, observed before and after the steps |
| `stepped_attributes`, `state_dependence` | attributes that earlier steps changed; values that the steps depend on |
| `shared_draws`, `draw_assignment` | the same random numbers for net and model, step by step |
| `float64_copies`, `float64_constants` | copies in float64, and their constants |
| `rounding`, `rounding_explanation` | whether rounding explains a difference |
| `comparison`, `verification_report` | tolerances, the comparison of two values; the report |
| `divergence` | the first neuron that differs, neurons that never spike |
| `sequence_inputs` | input sequences, and their slices at each time step |
| `program_lookup` | regions and states of a program by qualified name |
"""
