"""Layers that visit only the inputs that are not zero: products with the spikes of neurons.

The result equals the dense product up to the order of its sums. In the order of the imports:

| module            | contents                                                                     |
|-------------------|------------------------------------------------------------------------------|
| `geometry`        | the settings of a convolution or linear layer                                |
| `spike_bits`      | spikes with one bit for each neuron and step, and their max-pooling          |
| `event_source`    | the C++ source of the kernel                                                 |
| `event_kernel`    | launch it: the product, an estimate of the density, the checksum of a weight |
| `packed_weights`  | weights in tiles, packed once for each change                                |
| `event_gradients` | the product with its gradients, for training                                 |
| `crossovers`      | the density below which events are faster, measured and remembered           |
| `layer_decisions` | conditions and crossover of a layer, and how its latest call ran             |
| `event_layers`    | run a layer densely or by events                                             |
| `spike_readers`   | layers that read the bits of a neuron's kernel                               |
"""
