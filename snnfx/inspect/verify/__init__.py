"""Compare a net with an independent reference, the user's model run step by step: `snnfx.verify`.

| module | content |
|---|---|
| `verify` | `snnfx.verify`: runs the net and the reference, compares, reports or raises |
| `oracle`, `coroutines` | the reference: stepping the model, also with BatchNorm statistics over T*N |
| `comparison` | tolerances, the comparison of two values, the report |
| `divergence` | the first neuron that differs |
| `sequence_inputs` | input sequences, and their slices at each time step |
| `program_lookup` | regions and states of a program by qualified name |
| `float64_copies`, `without_dropout` | the conditions of a comparison: float64, dropout switched off |
"""
