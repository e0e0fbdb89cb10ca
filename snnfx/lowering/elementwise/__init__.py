"""Lower an element-wise loop to one kernel for all time steps.

The front end translates a recorded step (`snnfx.lowering.aten_recording`) to expressions of one element; a back end
writes and runs kernels from them.

| module            | contents                                                                                  |
|-------------------|-------------------------------------------------------------------------------------------|
| `expressions`     | the expression graph of one element, the interface between front end and back ends         |
| `aten_table`      | one rule for each element-wise ATen operator; `batch_norm`: its decomposition             |
| `translation`     | recording -> expressions, with the calls that PyTorch runs before and after the kernel    |
| `initial_states`  | the states before the first step                                                          |
| `saved_values`    | choose the values that the forward pass saves for backward                                |
| `operand_layout`  | dimensions and strides of the kernel's operands                                           |
| `back_end`        | the interface of a back end; `back_end_choice`: the back end of a device                  |
| `cpp/`            | the CPU back end: generated C++                                                           |
| `triton/`         | the GPU back end: generated Triton                                                        |
| `lowered_step`    | `LoweredStep`: kernels and surrounding calls, `forward` and `backward` over a sequence    |
| `autograd_kernel` | the `torch.autograd.Function` around a `LoweredStep`                                      |

`snnfx.regions.region_kernels` caches the lowered steps of one loop region.
"""
