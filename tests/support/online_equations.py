"""Online rules written out for one architecture each, with the chain rule by hand; oracles, see `online_oracles.py`.

| oracle | rule | source |
|---|---|---|
| `dense_ottt` | OTTT-A | Xiao et al. 2022, arXiv 2210.04195 |
| `authors_ottt` | OTTT-A and OTTT-O as in the authors' code, with a readout | Xiao et al. 2022 |
| `layerwise_exact` | OSTL: exact in each layer, spatial between layers | Bohnstingl et al. 2022, arXiv 2007.12723 |
| `eprop` | eligibility propagation, symmetric feedback | Bellec et al. 2020, Nat. Comm. 11 |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from support.online_oracles import TriangleSpike, triangle


@dataclass
class Dense:
    """Layers of LIF neurons, `u[t] = leak * (u[t-1] - s[t-1]) + W s_pre[t] + b`, threshold 1, the reset detached."""

    weights: list[Tensor]
    biases: list[Tensor]
    leaks: list[float]

    def run(self, x_seq: Tensor) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """Spikes, input first, and potentials, by step and layer."""
        v = [torch.zeros(x_seq.shape[1], len(b), dtype=x_seq.dtype) for b in self.biases]
        spikes, potentials = [], []
        for x in x_seq:
            row, us = [x], []
            for layer, (W, b, leak) in enumerate(zip(self.weights, self.biases, self.leaks, strict=True)):
                u = leak * v[layer] + row[-1] @ W.T + b
                row.append((u >= 1).to(u))
                us.append(u)
                v[layer] = u - row[-1]
            spikes.append(row)
            potentials.append(us)
        return spikes, potentials


def dense_ottt(
    net: Dense, x_seq: Tensor, target: Tensor, loss_slope: Callable[[Tensor, Tensor], Tensor], trace_input: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """OTTT-A with the chain rule written out: gradients of the weights and of the biases, summed over the steps."""
    spikes, potentials = net.run(x_seq)
    d_weights, d_biases = [torch.zeros_like(W) for W in net.weights], [torch.zeros_like(b) for b in net.biases]
    traces = [torch.zeros_like(s) for s in spikes[0][:-1]]
    for row, us, wanted in zip(spikes, potentials, target, strict=True):
        traces = [
            leak * a + s if layer or trace_input else s
            for layer, (leak, a, s) in enumerate(zip(net.leaks, traces, row[:-1], strict=True))
        ]
        slope = loss_slope(row[-1], wanted)
        for layer in reversed(range(len(net.weights))):
            slope = slope * triangle(us[layer] - 1)
            d_weights[layer] += slope.T @ traces[layer]
            d_biases[layer] += slope.sum(0)
            slope = slope @ net.weights[layer]
    return d_weights, d_biases


def authors_ottt(
    net: Dense,
    readout: tuple[Tensor, Tensor],
    x_seq: Tensor,
    target: Tensor,
    loss_slope: Callable[[Tensor, Tensor], Tensor],
    lr: float = 0.0,
    momentum: float = 0.0,
) -> dict[str, list[Tensor]]:
    """OTTT as its authors' code computes it, for LIF layers and a readout `y = W s + b` that feeds no neuron.

    A neuron emits its spike and the trace of its spikes, which decays with the neuron's own leak. Every weight behind a
    neuron, the readout included, takes its gradient on this trace. The network's input and biases have no trace. The
    loss of a step is divided by T. With `lr`, SGD with momentum follows every step (OTTT-O).
    """
    T, count = len(x_seq), len(net.leaks)
    weights = [*(W.clone() for W in net.weights), readout[0].clone()]
    biases = [*(b.clone() for b in net.biases), readout[1].clone()]
    parameters = [*weights, *biases]
    total, velocity = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
    v = [torch.zeros(x_seq.shape[1], len(b), dtype=x_seq.dtype) for b in net.biases]
    traces = [torch.zeros_like(potential) for potential in v]
    for x, wanted in zip(x_seq, target, strict=True):
        operand, on_trace, potentials = x, [x], []
        for layer, leak in enumerate(net.leaks):
            u = leak * v[layer] + operand @ weights[layer].T + biases[layer]
            operand = (u >= 1).to(u)
            v[layer] = u - operand
            traces[layer] = leak * traces[layer] + operand
            on_trace.append(traces[layer])
            potentials.append(u)
        slope = loss_slope(operand @ weights[-1].T + biases[-1], wanted) / T
        gradients = [torch.zeros_like(p) for p in parameters]
        for layer in reversed(range(count + 1)):
            if layer < count:
                slope = slope * triangle(potentials[layer] - 1)
            gradients[layer] = slope.T @ on_trace[layer]
            gradients[count + 1 + layer] = slope.sum(0)
            slope = slope @ weights[layer]
        for p, speed, gradient, sum_ in zip(parameters, velocity, gradients, total, strict=True):
            sum_ += gradient
            speed.mul_(momentum).add_(gradient)
            p -= lr * speed
    return {
        "weight gradients": total[: count + 1],
        "bias gradients": total[count + 1 :],
        "weights": weights,
        "biases": biases,
    }


def layerwise_exact(
    net: Dense, x_seq: Tensor, target: Tensor, loss_slope: Callable[[Tensor, Tensor], Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Exact in each layer, spatial between layers (OSTL): d(u)/d(W, b) of a layer by forward mode, entry by entry."""
    spikes, potentials = net.run(x_seq)
    signals: list[list[Tensor]] = []
    for row, us, wanted in zip(spikes, potentials, target, strict=True):
        slope, found = loss_slope(row[-1], wanted), []
        for layer in reversed(range(len(net.weights))):
            found.insert(0, slope)
            slope = (slope * triangle(us[layer] - 1)) @ net.weights[layer]
        signals.append(found)

    results = []
    for layer, leak in enumerate(net.leaks):

        def layer_step(W: Tensor, b: Tensor, v: Tensor, given: Tensor, leak: float = leak) -> tuple[Tensor, Tensor]:
            u = leak * v + given @ W.T + b
            spike = TriangleSpike.apply(u - 1)
            return spike, u - spike.detach()

        W, b = net.weights[layer], net.biases[layer]
        gradients = []
        for which, parameter in enumerate((W, b)):
            gradient = torch.zeros_like(parameter)
            for index in range(parameter.numel()):
                unit = [torch.zeros_like(W), torch.zeros_like(b)]
                unit[which].view(-1)[index] = 1.0
                v = torch.zeros(x_seq.shape[1], len(b), dtype=x_seq.dtype)
                tangent = torch.zeros_like(v)
                for t, row in enumerate(spikes):
                    given = row[layer]
                    (_, v), (d_spike, tangent) = torch.func.jvp(
                        layer_step, (W, b, v, given), (*unit, tangent, torch.zeros_like(given))
                    )
                    gradient.view(-1)[index] += (signals[t][layer] * d_spike).sum()
            gradients.append(gradient)
        results.append(gradients)
    return [w for w, _ in results], [b for _, b in results]


def eprop(
    W_in: Tensor,
    W_rec: Tensor,
    W_out: Tensor,
    x_seq: Tensor,
    target: Tensor,
    loss_slope: Callable[[Tensor, Tensor], Tensor],
    leak: float,
    readout_leak: float,
) -> dict[str, Tensor]:
    """e-prop with symmetric feedback for LIF neurons and a leaky read-out (Bellec et al. 2020, eqs. 11-24).

        v[t] = leak * v[t-1] + W_in x[t] + W_rec z[t-1] - z[t-1]       z = H(v - 1)
        y[t] = readout_leak * y[t-1] + W_out z[t]

    For each synapse: `eps_ji[t] = leak * eps_ji[t-1] + (what it carries)`, `e_ji = psi_j * eps_ji`, filtered by the
    leak of the read-out; `dE/dW_ji = sum_t (sum_k W_out_kj dE/dy_k[t]) * filtered e_ji[t]`.
    """
    N, hidden = x_seq.shape[1], len(W_rec)
    v = torch.zeros(N, hidden, dtype=x_seq.dtype)
    z, y = torch.zeros_like(v), torch.zeros(N, len(W_out), dtype=x_seq.dtype)
    shapes = {"in": W_in.shape, "rec": W_rec.shape}
    eps = {name: torch.zeros(N, *shape, dtype=x_seq.dtype) for name, shape in shapes.items()}
    filtered = {name: torch.zeros_like(e) for name, e in eps.items()}
    z_filtered = torch.zeros_like(z)
    gradients = {name: torch.zeros(shape, dtype=x_seq.dtype) for name, shape in shapes.items()}
    gradients["out"] = torch.zeros_like(W_out)
    outputs = []
    for x, wanted in zip(x_seq, target, strict=True):
        carried = {"in": x, "rec": z}
        v = leak * v + x @ W_in.T + z @ W_rec.T - z
        psi = triangle(v - 1)
        z = (v >= 1).to(v)
        y = readout_leak * y + z @ W_out.T
        z_filtered = readout_leak * z_filtered + z
        slope = loss_slope(y, wanted)
        gradients["out"] += slope.T @ z_filtered
        signal = slope @ W_out
        for name, given in carried.items():
            eps[name] = leak * eps[name] + given[:, None, :]
            filtered[name] = readout_leak * filtered[name] + psi[:, :, None] * eps[name]
            gradients[name] += (signal[:, :, None] * filtered[name]).sum(0)
        outputs.append(y)
    gradients["outputs"] = torch.stack(outputs)
    return gradients


def mse_slope(y: Tensor, target: Tensor) -> Tensor:
    return (y - target) / len(y)
