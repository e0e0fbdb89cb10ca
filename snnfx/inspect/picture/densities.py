"""Firing rates and densities of inputs that a profile measured, for the rows of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from snnfx.inspect.profile_data import ProfileData
from snnfx.ir.printing import describe_node

__all__ = ["Densities", "Density"]


@dataclass(frozen=True)
class Density:
    """A measured fraction, with both ends where it differs between blocks.

    Args:
        values: the fraction in each block.
        meaning: a sentence for the tooltip.
        of_input: whether it is the density of the input of a layer, and not the rate of neurons.
    """

    values: tuple[float, ...]
    meaning: str
    of_input: bool = False

    @property
    def text(self) -> str:
        low, high = _percent(min(self.values)), _percent(max(self.values))
        return ("in " if self.of_input else "") + (f"{low} %" if low == high else f"{low}-{high} %")

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)


class Densities:
    """The densities of a profile, by layer."""

    def __init__(self, profile: ProfileData) -> None:
        self._rates = {row.layer: row.rate for row in profile.rates}
        self._inputs = {row.layer: row.density for row in profile.operations}

    def of(self, nodes: Sequence[Node]) -> Density | None:
        """The rate of neurons, or the density of the inputs of layers; None if not measured."""
        rates = self.of_neurons(nodes)
        if rates is not None:
            return rates
        found = _found(self._inputs, nodes)
        if not found:
            return None
        return Density(tuple(found.values()), f"inputs that are not zero: {_listed(found)}", of_input=True)

    def of_neurons(self, nodes: Sequence[Node]) -> Density | None:
        """The rates of the neurons among some operations; None without any."""
        found = _found(self._rates, nodes)
        return Density(tuple(found.values()), f"spikes per neuron and step: {_listed(found)}") if found else None


def _found(rows: dict[str, float], nodes: Sequence[Node]) -> dict[str, float]:
    names = dict.fromkeys(map(describe_node, nodes))
    return {name: rows[name] for name in names if name in rows}


def _listed(rows: dict[str, float]) -> str:
    texts = [f"{name} {_percent(value)} %" for name, value in rows.items()]
    return ", ".join(texts) if len(texts) > 1 else texts[0].partition(" ")[2]


def _percent(value: float) -> str:
    percent = 100 * value
    if 0 < percent < 0.05:
        return "<0.1"
    return f"{percent:.1f}" if 0 < percent < 10 else f"{percent:.0f}"
