"""Loops with matrix products or convolutions inside: recorded, distributed over parts, and run without autograd.

The step and its backward pass are lists of ATen calls (`snnfx.lowering.aten_recording`). `operations` says what each
call is, `schedule` puts calls into the order in which a step runs them, with elementwise ones fused into kernels
(`fused`) and what needs no loop before or after it (`batched`). `gradients` takes the gradients of constants out of
the reversed loop, `saving` chooses what the forward pass keeps, `machine` runs a schedule over the steps, and `mixed`
puts both passes together.
"""
