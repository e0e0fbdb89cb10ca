"""One kernel for a whole sequence of an elementwise loop.

The front records a step of the loop (`record`), translates it to expressions of one element (`aten`, `translate`) and
chooses what the backward pass saves (`saving`). A back end (`back_end`, `back_ends`) writes and runs kernels from them:
`cpp` with `cpp_writer`, `cpp_time`, `cpp_prelude`, `build` and `launch` for the CPU, `triton` with `triton_source`,
`triton_prelude` and `triton_launch` for GPUs; `layout` says where the elements of their operands are. `lowered` joins
both, `region` keeps them for one loop region, `function` is what autograd sees, `operator` what torch.compile sees.
"""
