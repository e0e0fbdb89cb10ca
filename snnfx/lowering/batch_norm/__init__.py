"""BatchNorm in training whose normalisation runs inside the kernel of a loop.

| module           | purpose                                                                                  |
| ---------------- | ---------------------------------------------------------------------------------------- |
| `channel_source` | C++: the statistics of each channel in one pass, and the gradient through them in place  |
| `channel_kernel` | launches it                                                                              |
| `training_norm`  | the autograd function: statistics and per-channel factors for the loop that normalises   |
"""
