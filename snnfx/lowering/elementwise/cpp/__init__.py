"""The CPU back end: generated C++.

`cpp_kernel` writes the source of a kernel from `cpp_prelude` (functions), `cpp_writer` (expressions and operands) and
`cpp_time_loop` (loops over time); `build` compiles and loads it; `cpp_launch` runs it.
"""
