"""Choices that only a measurement can make: measured once for each machine and shape, then remembered.

| module          | contents                                                                      |
|-----------------|-------------------------------------------------------------------------------|
| `permission`    | whether a call may be interrupted by a measurement                            |
| `remembered`    | measured values, kept in this process and in the cache folder                 |
| `fastest`       | the fastest of several functions for a key, with the reason of the choice     |
| `image_formats` | the memory format in which a small convolution is fastest                     |
"""
