"""Lower loops that contain matrix products or convolutions: run them without autograd.

The step and its backward pass are lists of ATen calls (`snnfx.lowering.aten_recording`). In the order of the imports:

| module               | contents                                                                              |
|----------------------|---------------------------------------------------------------------------------------|
| `call_kinds`         | tables of operators (views, batched, linear); a call as a functional call             |
| `fused_group`        | element-wise calls of a step, fused into one kernel                                   |
| `convolution_calls`  | recorded convolutions and input gradients as convolutions of an extended input        |
| `schedule`           | the order of a pass: before the loop, stages of each step, after the loop             |
| `batched_calls`      | run the calls before and after the loop for all time steps at once                    |
| `gradient_by_events` | the gradient of a weight from the elements of its operand that are not zero           |
| `gradient_source`    | C++ of this gradient                                                                  |
| `constant_gradients` | gradients of weights as one product over all steps, outside the reversed loop         |
| `loop_saved_values`  | choose the values that the forward pass saves for backward                            |
| `parts`              | parts of joined values, which kernels write to their places or copies move there      |
| `ring_buffers`       | the memory of the values of a loop                                                    |
| `operations`         | the operations of an iteration on ring buffers; each can run from Python              |
| `copied_rows`        | divide a copy into rows of consecutive bytes                                          |
| `sample_parts`       | divide the samples among threads                                                      |
| `convolution_tables` | the positions that a convolution reads and writes                                     |
| `convolution_source` | C++ of a convolution of one sample                                                    |
| `convolution_arguments` | the struct of its arguments                                                        |
| `loop_source`        | C++ that runs the operations of all iterations: products, fused kernels, copies       |
| `loop_arguments`     | the structs of its arguments                                                          |
| `compiled_loop`      | run all iterations in one call, or the reason against it                              |
| `executor`           | run a schedule over the time steps                                                    |
| `pass_result`        | the results of a run                                                                  |
| `relocation`         | point the operations of a compiled loop to other memory                               |
| `bound_runs`         | keep runs and repeat them with new values                                             |
| `mixed_step`         | `MixedStep`: the schedules of both passes, `forward` and `backward` over a sequence   |
| `first_states`       | the states before the first step                                                      |
| `autograd_loop`      | the `torch.autograd.Function` around a `MixedStep`                                    |
| `operator_shapes`    | shapes of the results for `snnfx::run_region` under torch.compile                     |
"""
