"""Max pooling of images, one pass forward and one backward.

| module        | purpose                                                    |
| ------------- | ---------------------------------------------------------- |
| `pool_source` | C++: pooling, and its backward pass                        |
| `pool_kernel` | launches it                                                |
| `max_pool`    | the autograd function, and which calls it takes            |
"""
