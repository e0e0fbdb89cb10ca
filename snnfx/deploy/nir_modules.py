"""The module of a NIR node: a layer of torch.nn, a neuron of snnfx.neuron, or one of `nir_cells`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from snnfx import neuron
from snnfx.deploy.nir_cells import CurrentIntegrator, Delay, Firing, Integrator, Scaling, above
from snnfx.deploy.nir_file import INITIAL
from snnfx.errors import InputError

__all__ = ["dtype_of", "graph_refusal", "module_of"]


def graph_refusal(name: str, why: str, hint: str = "") -> InputError:
    """The refusal of a node of a NIR graph."""
    return InputError("SNNFX816", f"the node `{name}` cannot be imported", why=why, hint=hint)


def dtype_of(nodes: list[Any]) -> torch.dtype:
    """The dtype of the weights of a graph, or of all its numbers if it has no weights."""
    arrays = [np.asarray(node.weight) for node in nodes if hasattr(node, "weight")]
    if not arrays:
        arrays = [np.asarray(v) for n in nodes for k, v in vars(n).items() if k not in _NOT_NUMBERS]
    dtypes = [a.dtype for a in arrays if a.dtype in (np.float32, np.float64)]
    return torch.float64 if dtypes and all(d == np.float64 for d in dtypes) else torch.float32


_NOT_NUMBERS = ("input_type", "output_type", "metadata", "input_shape")


def module_of(name: str, node: Any, dt: float, dtype: torch.dtype) -> nn.Module:
    """The module of a node other than Input, Output and graphs.

    Args:
        name: its name, for messages.
        node: the node.
        dt: the time step in seconds.
        dtype: the dtype of the module.

    Raises:
        InputError: SNNFX816, the node has no form in PyTorch, or none at this time step.
    """
    return _Importer(name, node, dt, dtype).module()


class _Importer:
    def __init__(self, name: str, node: Any, dt: float, dtype: torch.dtype) -> None:
        self.name, self.node, self.dt, self.dtype = name, node, dt, dtype

    def module(self) -> nn.Module:
        kind = type(self.node).__name__
        if kind in ("Affine", "Linear"):
            return self._dense()
        if kind in ("Conv1d", "Conv2d"):
            return self._convolution(nn.Conv1d if kind == "Conv1d" else nn.Conv2d)
        if kind in ("AvgPool2d", "SumPool2d"):
            return self._pooling(kind == "SumPool2d")
        if kind == "Flatten":
            start, end = int(self.node.start_dim), int(self.node.end_dim)
            return nn.Flatten(start + 1 if start >= 0 else start, end + 1 if end >= 0 else end)
        if kind == "Scale":
            return Scaling(self._tensor(self.node.scale))
        if kind == "Threshold":
            return Firing(self._tensor(self.node.threshold))
        if kind == "Delay":
            return self._delay()
        if kind == "Identity":
            return nn.Identity()
        if kind in ("IF", "I", "LIF", "LI", "CubaLIF", "CubaLI"):
            return self._neuron(kind)
        raise graph_refusal(self.name, f"snnfx has no module for {kind}.")

    # -- layers -------------------------------------------------------------------------------------------------------

    def _array(self, value: Any) -> Any:
        return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)

    def _tensor(self, value: Any) -> Tensor:
        return torch.tensor(self._array(value), dtype=self.dtype)

    def _dense(self) -> nn.Module:
        weight, bias = self._tensor(self.node.weight), getattr(self.node, "bias", None)
        if weight.dim() != 2:
            raise graph_refusal(self.name, f"its weight has {weight.dim()} dimensions, but nn.Linear has two.")
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=self.dtype)
        return self._filled(layer, weight, bias)

    def _convolution(self, kind: Any) -> nn.Module:
        node, weight = self.node, self._tensor(self.node.weight)
        size = weight.dim() - 2
        groups = int(node.groups)
        padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
        layer = kind(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            stride=self._sizes(node.stride, size),
            padding=padding if isinstance(padding, str) else self._sizes(padding, size),
            dilation=self._sizes(node.dilation, size),
            groups=groups,
            bias=node.bias is not None,
            dtype=self.dtype,
        )
        return self._filled(layer, weight, node.bias)

    def _filled(self, layer: Any, weight: Tensor, bias: Any) -> nn.Module:
        with torch.no_grad():
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(self._tensor(bias))
        return layer  # type: ignore[no-any-return]

    def _sizes(self, value: Any, count: int) -> tuple[int, ...]:
        flat = [int(v) for v in self._array(value).reshape(-1)]
        return tuple(flat) if len(flat) == count else tuple(flat[:1] * count)

    def _pooling(self, is_sum: bool) -> nn.Module:
        kernel, stride, padding = (self._sizes(getattr(self.node, k), 2) for k in ("kernel_size", "stride", "padding"))
        return nn.AvgPool2d(kernel, stride, padding, divisor_override=1 if is_sum else None)  # type: ignore[arg-type]

    def _delay(self) -> nn.Module:
        steps = np.unique(self._array(self.node.delay).astype(np.float64)) / self.dt
        if steps.size != 1 or abs(steps[0] - round(steps[0])) > 1e-3:
            raise graph_refusal(self.name, f"its delays are {_few(steps)} time steps, but must be one whole number.")
        return Delay(round(steps[0])) if round(steps[0]) else nn.Identity()

    # -- neurons ------------------------------------------------------------------------------------------------------

    def _numbers(self, field: str) -> Any:
        """A parameter in float64; of float32 its shortest decimal form, so that 2e-4 is 2e-4."""
        value = self._array(getattr(self.node, field))
        if value.dtype != np.float32:
            return value.astype(np.float64)
        return np.array([float(str(v)) for v in value.reshape(-1)], np.float64).reshape(value.shape)

    def _decay(self, field: str) -> Any:
        """The factor that a decay leaves after a step."""
        rate = self.dt / self._numbers(field)
        if not (np.isfinite(rate).all() and (rate > 0).all() and (rate <= 1 + 1e-6).all()):
            raise graph_refusal(
                self.name,
                f"its {field} is {_few(self._numbers(field))} s, but must be at least the time step dt={self.dt:g} s.",
                "Pass the dt of the file.",
            )
        return np.maximum(1.0 - rate, 0.0)

    def _neuron(self, kind: str) -> nn.Module:
        fires = kind.endswith("F")
        if kind in ("IF", "I"):
            leak, gain = np.ones_like(self._numbers("r")), self._numbers("r") * self.dt
            offset = rest = np.zeros_like(leak)
        else:
            leak = self._decay("tau_mem" if kind.startswith("Cuba") else "tau")
            gain, rest = self._numbers("r") * (1 - leak), self._numbers("v_leak")
            offset = rest * (1 - leak)
        threshold, reset = (self._numbers(f) if fires else None for f in ("v_threshold", "v_reset"))
        initial = rest if reset is None else reset
        initial = np.broadcast_to(self.node.metadata.get(INITIAL, initial), leak.shape)
        current = None
        if kind.startswith("Cuba"):
            i_leak = self._decay("tau_syn")
            current = (i_leak, self._numbers("w_in") * (1 - i_leak))
        known = self._known(kind, leak, gain, rest, threshold, reset, initial, current)
        if known is not None:
            return known
        membrane = {"leak": leak, "gain": gain, "offset": offset, "initial": initial}
        membrane |= {} if threshold is None else {"v_threshold": self._array(self.node.v_threshold), "v_reset": reset}
        tensors = {k: self._tensor(v) for k, v in membrane.items()}
        if current is None:
            return Integrator(**tensors)
        return CurrentIntegrator(*map(self._tensor, current), **tensors)

    def _known(
        self,
        kind: str,
        leak: Any,
        gain: Any,
        rest: Any,
        threshold: Any,
        reset: Any,
        initial: Any,
        current: Any,
    ) -> nn.Module | None:
        """The neuron of snnfx.neuron with these parameters, if all elements are equal and one has them."""
        numbers = [_one(v) for v in (leak, gain, rest, initial)]
        fired = [] if threshold is None else [_one(threshold), _one(reset)]
        currents = [] if current is None else [_one(v) for v in current]
        if None in numbers or None in fired or None in currents:
            return None
        a, b, v_rest, start = numbers
        assert a is not None and b is not None
        v_reset = fired[1] if fired else None
        if fired:
            limit = float(above(self._tensor(np.asarray(self.node.v_threshold).reshape(-1)[0])))
            arguments: dict[str, Any] = {"v_threshold": self._short(limit), "v_reset": v_reset}
            if start != v_reset:
                return None
        if kind == "IF" and _near(b, 1.0):
            return neuron.IFNode(**arguments)
        if kind == "CubaLIF" and v_rest == 0 and _near(b, 1.0) and currents[1] is not None and _near(currents[1], 1.0):
            return neuron.CUBALIFNode(c_decay=currents[0], v_decay=a, **arguments)  # type: ignore[arg-type]
        if kind not in ("LIF", "LI") or not 0 < a < 1 or v_rest != (v_reset if fired else start):
            return None
        tau = float(f"{1 / (1 - a):.12g}")
        if not (_near(b, 1.0) or _near(b, 1 - a)):
            return None
        if fired:
            return neuron.LIFNode(tau=tau, decay_input=not _near(b, 1.0), **arguments)
        return neuron.LeakyIntegrator(tau=tau, decay_input=not _near(b, 1.0)) if v_rest == 0 else None

    def _short(self, value: float) -> float:
        """The shortest decimal number that is this one in the dtype of the module."""
        return float(str(np.float32(value))) if self.dtype == torch.float32 else value


def _one(values: Any) -> float | None:
    """The number that all elements are, or None."""
    flat = np.asarray(values, np.float64).reshape(-1)
    return float(f"{flat[0]:.12g}") if flat.size and np.allclose(flat, flat[0], rtol=1e-12, atol=1e-12) else None


def _near(value: float, expected: float) -> bool:
    return abs(value - expected) <= 1e-6 * abs(expected)


def _few(values: Any) -> str:
    numbers = sorted({f"{v:g}" for v in np.asarray(values).reshape(-1)})
    return ", ".join(numbers[:3]) + (", ..." if len(numbers) > 3 else "")
