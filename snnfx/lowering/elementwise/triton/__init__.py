"""The GPU back end: generated Triton.

`triton_kernel` writes the source of a kernel (`triton_source`), which calls the functions of `triton_prelude`;
`triton_launch` compiles and runs it.
"""
