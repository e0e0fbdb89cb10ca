"""Compare a net with an independent reference, the user's model run step by step: `snnfx.verify`.

| module | content |
|---|---|
| `verify` | `snnfx.verify`: compares in the dtype of the model and in float64, reports or raises |
| `check` | one comparison: outputs, states, contents of the modules, gradients |
| `runs` | runs of net and reference under the same conditions; everything is restored |
| `oracle`, `coroutines` | the reference: stepping the model, also with BatchNorm statistics over T*N |
| `observed_contents` | everything that a model stores, observed before and after the steps |
| `shared_draws` | the same random numbers for net and model, step by step |
| `float64_copies`, `rounding` | copies in float64; whether rounding explains a difference |
| `comparison`, `verification_report` | tolerances, the comparison of two values; the report |
| `divergence` | the first neuron that differs, neurons that never spike |
| `sequence_inputs` | input sequences, and their slices at each time step |
| `program_lookup` | regions and states of a program by qualified name |
"""
