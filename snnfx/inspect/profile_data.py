"""The data of a profile: time, firing rates, operations and memory of one call."""

from __future__ import annotations

from dataclasses import dataclass, field

from snnfx.inspect.memory_phases import PhaseMemory

__all__ = [
    "HOROWITZ",
    "Advice",
    "EnergyModel",
    "FiringRate",
    "LayerOperations",
    "ProfileData",
    "Recording",
    "RegionTime",
]

HOROWITZ = "Horowitz 2014, 45 nm CMOS, float32 (doi.org/10.1109/ISSCC.2014.6757323)"
"""The source of the default energies: 3.7 pJ for a multiplication and 0.9 pJ for an addition."""


@dataclass(frozen=True)
class RegionTime:
    """Time of one region, the median of the measured calls.

    Args:
        region: name of the region.
        kind: "once", "fold", "map" or "loop"; "sequence" for an operation on whole sequences; "" between regions.
        runs_as: how it ran, e.g. "kernel" or "stepped".
        contents: its operations.
        forward, backward: milliseconds in one call; backward is 0 in inference.
    """

    region: str
    kind: str
    runs_as: str
    contents: tuple[str, ...]
    forward: float
    backward: float = 0.0


@dataclass(frozen=True)
class FiringRate:
    """Firing rate of one layer of spiking neurons, in spikes per neuron and time step.

    Args:
        layer: qualified name.
        region: the region that runs it.
        neurons: number of neurons of one sample.
        rate: mean over time, batch and neurons.
        channels: rate of each channel (dimension 1 of one step, `[N, C, *]`).
        over_time: rate at each time step.
        silent: the channels without a spike in the call.
        saturated: the channels with a rate of at least 0.95.
    """

    layer: str
    region: str
    neurons: int
    rate: float
    channels: tuple[float, ...]
    over_time: tuple[float, ...]
    silent: tuple[int, ...] = ()
    saturated: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerOperations:
    """Multiply-accumulates (MACs) and accumulates (ACs) of one layer in the whole call, forward.

    Args:
        layer: qualified name.
        kind: type of the layer.
        region: the region that runs it.
        dense_macs: MACs if its input were dense.
        macs: MACs of its products without a spike operand.
        acs: accumulates of its products with a spike operand (only 0 and 1): the weights that spikes meet.
        density: fraction of its input elements that are not 0.
        spikes: fraction of its products with a spike operand.
    """

    layer: str
    kind: str
    region: str
    dense_macs: int
    macs: int
    acs: int
    density: float
    spikes: float


@dataclass(frozen=True)
class EnergyModel:
    """Energy of one operation in picojoules.

    Args:
        mac_pj: one multiply-accumulate.
        ac_pj: one accumulate.
        source: the publication or measurement.
    """

    mac_pj: float = 4.6
    ac_pj: float = 0.9
    source: str = HOROWITZ

    def joules(self, macs: float, acs: float = 0.0) -> float:
        """Energy of these operations in joules."""
        return (macs * self.mac_pj + acs * self.ac_pj) * 1e-12


@dataclass(frozen=True)
class Advice:
    """A change that may help.

    Args:
        option: the option to set, e.g. `time_dim=None`.
        text: why, in one or two sentences.
        region: the region or layer that it is about; "" for the net.
    """

    option: str
    text: str
    region: str = ""


@dataclass(frozen=True)
class Recording:
    """Values of one layer or slot over time, for sample 0 and some of its units.

    Args:
        name: qualified name.
        spikes: whether the values are spikes.
        units: number of units of one sample.
        values: `[T][unit]`.
    """

    name: str
    spikes: bool
    units: int
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, repr=False)
class ProfileData:
    """A measured call of a net.

    Args:
        model: class of the model.
        train: whether a training step was measured (forward and backward), or inference.
        T: number of time steps.
        batch: batch size; 0 without inputs.
        inputs: shape of each input, time first.
        environment: PyTorch, device and threads.
        forward, backward: milliseconds of the whole call, as the user runs it.
        repeats: number of measured calls.
        regions: time of each region, in execution order.
        rates: firing rate of each layer of spiking neurons.
        operations: operations of each layer with products.
        uncounted: layer -> why its operations are not counted.
        energy_model: energy of one operation.
        memory: predicted memory of the call.
        advice: what would help next.
        recordings: the recorded layers.
        notes: limits of this profile.
        picture: the drawn net as SVG; "" without the program `dot`.
    """

    model: str
    train: bool
    T: int
    batch: int
    inputs: tuple[tuple[int, ...], ...]
    environment: str
    forward: float
    backward: float
    repeats: int
    regions: tuple[RegionTime, ...]
    rates: tuple[FiringRate, ...]
    operations: tuple[LayerOperations, ...]
    uncounted: dict[str, str]
    energy_model: EnergyModel
    memory: PhaseMemory
    advice: tuple[Advice, ...]
    recordings: tuple[Recording, ...] = ()
    notes: tuple[str, ...] = ()
    picture: str = field(default="", repr=False)

    @property
    def dense_macs(self) -> int:
        """MACs of the call if all inputs of layers were dense."""
        return sum(row.dense_macs for row in self.operations)

    @property
    def macs(self) -> int:
        """MACs of the call."""
        return sum(row.macs for row in self.operations)

    @property
    def acs(self) -> int:
        """Accumulates of the call, also called synaptic operations."""
        return sum(row.acs for row in self.operations)

    @property
    def energy(self) -> float:
        """Estimated energy of the counted operations of the call in joules."""
        return self.energy_model.joules(self.macs, self.acs)

    @property
    def dense_energy(self) -> float:
        """Estimated energy in joules if all inputs of layers were dense."""
        return self.energy_model.joules(self.dense_macs)

    @property
    def rate(self) -> float:
        """Spikes per neuron and time step over all layers of spiking neurons."""
        neurons = sum(row.neurons for row in self.rates)
        return sum(row.rate * row.neurons for row in self.rates) / neurons if neurons else 0.0
