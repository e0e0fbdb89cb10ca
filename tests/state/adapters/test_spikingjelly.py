"""SpikingJelly: all single-step neurons, layer wrappers, containers and models; others are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("spikingjelly")

from spikingjelly.activation_based import functional, layer, neuron, surrogate

import snnfx
from snnfx.errors import CaptureError, InputError

FEATURES = 6


def leaky(x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A user-defined neuron for FlexSN."""
    h = v / 2.0 + x
    spike = surrogate.Sigmoid()(h - 1.0)
    return spike, h * (1.0 - spike)


def scaled_leaky(x: torch.Tensor, v: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return leaky(x * scale, v)


NEURONS: dict[str, Callable[[], nn.Module]] = {
    "ActivationAwareIFNode": neuron.ActivationAwareIFNode,
    "CUBALIFNode": neuron.CUBALIFNode,
    "ComplementaryLIFNode": neuron.ComplementaryLIFNode,
    "EIFNode": neuron.EIFNode,
    "FlexSN": lambda: neuron.FlexSN(leaky, num_states=1, step_mode="s"),
    "FlexSN, static input": lambda: neuron.FlexSN(scaled_leaky, 1, (torch.tensor(1.5).double(),), step_mode="s"),
    "HalfThresholdIFNode": neuron.HalfThresholdIFNode,
    "IFNode": neuron.IFNode,
    "ILIFNode": neuron.ILIFNode,
    "IzhikevichNode": neuron.IzhikevichNode,
    "KLIFNode": neuron.KLIFNode,
    "LIAFNode": lambda: neuron.LIAFNode(torch.relu, threshold_related=True),
    "LIFNode": lambda: neuron.LIFNode(tau=3.0, detach_reset=True, surrogate_function=surrogate.ATan()),
    "LIFNode, soft reset": lambda: neuron.LIFNode(tau=3.0, v_reset=None, decay_input=False),
    "LIFNode, reset potential": lambda: neuron.LIFNode(tau=3.0, v_reset=-0.2),
    "LIFNode, potentials stored": lambda: neuron.LIFNode(store_v_seq=True),
    "MPBNLIFNode": lambda: neuron.MPBNLIFNode(out_features=FEATURES),
    "ParametricLIFNode": neuron.ParametricLIFNode,
    "QIFNode": neuron.QIFNode,
    "RAFNode": neuron.RAFNode,
    "SLTTLIFNode": neuron.SLTTLIFNode,
    "SimpleIFNode": neuron.SimpleIFNode,
    "SimpleLIFNode": lambda: neuron.SimpleLIFNode(tau=2.0, decay_input=True),
    "TernaryIFNode": neuron.TernaryIFNode,
    "TernaryLIFNode": neuron.TernaryLIFNode,
}

NOT_NEURONS = {"BaseNode", "AdaptBaseNode", "SimpleBaseNode", "MPBNBaseNode", "NonSpikingBaseNode", "NoisyBaseNode"}
NOT_NEURONS |= {"ILCBaseNode", "NoisyILCBaseNode", "NoisyNonSpikingBaseNode"}
MULTI_STEP: dict[str, Callable[[], nn.Module]] = {
    "DSRIFNode": neuron.DSRIFNode,
    "DSRLIFNode": neuron.DSRLIFNode,
    "GatedLIFNode": lambda: neuron.GatedLIFNode(T=4),
    "NonSpikingIFNode": neuron.NonSpikingIFNode,
    "NonSpikingLIFNode": neuron.NonSpikingLIFNode,
    "PSN": lambda: neuron.PSN(T=4),
    "NoisyNonSpikingIFNode": lambda: neuron.NoisyNonSpikingIFNode(num_node=2),
    "NoisyCUBALIFNode": lambda: neuron.NoisyCUBALIFNode(num_node=2),
    "NoisyILCCUBALIFNode": lambda: neuron.NoisyILCCUBALIFNode(2, 2),
    "ILCIFNode": lambda: neuron.ILCIFNode(2, 2),
    "ILCLIFNode": lambda: neuron.ILCLIFNode(2, 2),
    "ILCCUBALIFNode": lambda: neuron.ILCCUBALIFNode(2, 2),
    "layer.ThresholdDependentBatchNorm2d": lambda: layer.ThresholdDependentBatchNorm2d(1.0, 1.0, 2),
    "layer.TemporalWiseAttention": lambda: layer.TemporalWiseAttention(T=16),
}


def sequence(*shape: int, T: int = 5) -> Tensor:
    return torch.rand(T, *shape, dtype=torch.float64) * 3


def stepped(model: nn.Module, x_seq: Tensor) -> Tensor:
    functional.reset_net(model)
    y_seq = torch.stack([model(x) for x in x_seq])
    functional.reset_net(model)
    return y_seq


def check(model: nn.Module, x_seq: Tensor, **options: Any) -> Any:
    """Convert and compare with a plain loop in evaluation mode, and by `verify` in both modes."""
    net = snnfx.convert(model, example_inputs=(x_seq[0],), **options)
    for training in (True, False):
        net.train(training)
        snnfx.verify(model, net, x_seq)
    with torch.no_grad():
        torch.testing.assert_close(net(x_seq), stepped(model, x_seq), atol=1e-9, rtol=1e-9)
    return net


@pytest.mark.parametrize("name", NEURONS)
def test_neuron_between_layers_is_one_loop(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, FEATURES), NEURONS[name](), nn.Linear(FEATURES, 3)).double()
    net = check(model, sequence(2, 4))
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]


def test_every_neuron_of_the_release_is_in_a_table() -> None:
    classes = {
        n for n, c in vars(neuron).items() if inspect.isclass(c) and issubclass(c, nn.Module) and not n.startswith("_")
    }
    tested = {name.partition(",")[0] for name in (*NEURONS, *MULTI_STEP, *CODING, "STBIFNode", "OTTTLIFNode")}
    assert classes - tested - NOT_NEURONS - {"MaskedPSN", "SlidingPSN"} == set()


def table() -> Any:
    return neuron.FewSpikeTable(*(torch.tensor([1.0, 0.5, 0.25]).double(),) * 3)


CODING: dict[str, Callable[[], nn.Module]] = {
    "FewSpikeNode": lambda: neuron.FewSpikeNode(table()),
    "OutlierAwareThresholdNode": lambda: neuron.OutlierAwareThresholdNode(table(), table(), split_threshold=1.0),
    "HGNode": lambda: neuron.HGNode([table(), table()], [0.5]),
}


@pytest.mark.parametrize("name", CODING)
def test_neuron_that_codes_a_number_within_a_step_has_no_state(name: str) -> None:
    net = check(nn.Sequential(nn.Linear(4, FEATURES), CODING[name](), nn.Linear(FEATURES, 3)).double(), sequence(2, 4))
    assert net.program.slots == []
    assert "loop" not in {region.kind for region in net.regions}


@pytest.mark.filterwarnings("ignore:SNNFX504")
def test_online_neurons_and_their_container_have_the_gradient_of_the_rule() -> None:
    hidden = nn.Linear(FEATURES, FEATURES)
    ottt, out = neuron.OTTTLIFNode, nn.Linear(FEATURES, 3)
    model = layer.OTTTSequential(nn.Linear(4, FEATURES), ottt(), hidden, ottt(), nn.Dropout(0.0), out)
    net = check(model.double(), sequence(2, 4))
    assert {slot.name for slot in net.train().program.slots} == {"1.v", "1.trace", "3.v", "3.trace"}


def test_online_neurons_without_examples_are_refused_with_a_hint() -> None:
    model = layer.OTTTSequential(nn.Linear(4, FEATURES), neuron.OTTTLIFNode(), nn.Linear(FEATURES, 3)).double()
    with pytest.raises(InputError, match="example_inputs"):
        snnfx.convert(model)(sequence(2, 4))


def test_neuron_for_inference_only() -> None:
    model = nn.Sequential(nn.Linear(4, FEATURES), neuron.STBIFNode(q_threshold=0.5, level=4), nn.Linear(FEATURES, 3))
    x_seq = sequence(2, 4)
    net = snnfx.convert(model.double().eval(), example_inputs=(x_seq[0],))
    with torch.no_grad():
        assert torch.equal(net(x_seq), stepped(model, x_seq))
    snnfx.verify(model, net, x_seq, gradients=False)


@pytest.mark.parametrize(
    "make",
    [lambda: neuron.MaskedPSN(k=2, T=5, lambda_init=1.0), lambda: neuron.SlidingPSN(k=2)],
    ids=["masked", "sliding"],
)
def test_neuron_that_stores_its_inputs(make: Callable[[], nn.Module]) -> None:
    check(nn.Sequential(nn.Linear(4, FEATURES), make(), nn.Linear(FEATURES, 3)).double(), sequence(2, 4))


@pytest.mark.parametrize("name", MULTI_STEP)
def test_neuron_without_a_single_step_form_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match="SNNFX20[45]"):
        snnfx.convert(nn.Sequential(nn.Linear(2, 2), MULTI_STEP[name]()))


def test_multi_step_mode_is_refused_with_the_option_that_converts_it() -> None:
    with pytest.raises(CaptureError, match='(?s)SNNFX204.*takes="sequence"'):
        snnfx.convert(nn.Sequential(nn.Linear(2, 2), neuron.IFNode(step_mode="m")))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Conv1d": (lambda: layer.Conv1d(3, 4, 3), (2, 3, 8)),
    "Conv2d": (lambda: layer.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "Conv3d": (lambda: layer.Conv3d(3, 4, 3), (2, 3, 4, 4, 4)),
    "ConvTranspose2d": (lambda: layer.ConvTranspose2d(3, 4, 3), (2, 3, 6, 6)),
    "Upsample": (lambda: layer.Upsample(scale_factor=2), (2, 3, 4, 4)),
    "GroupNorm": (lambda: layer.GroupNorm(1, 3), (2, 3, 4, 4)),
    "MaxPool2d": (lambda: layer.MaxPool2d(2), (2, 3, 4, 4)),
    "AvgPool2d": (lambda: layer.AvgPool2d(2), (2, 3, 4, 4)),
    "AdaptiveAvgPool2d": (lambda: layer.AdaptiveAvgPool2d(1), (2, 3, 4, 4)),
    "Linear": (lambda: layer.Linear(3, 4), (2, 3)),
    "Flatten": (layer.Flatten, (2, 3, 4)),
    "BatchNorm1d": (lambda: layer.BatchNorm1d(3), (4, 3)),
    "BatchNorm2d": (lambda: layer.BatchNorm2d(3), (2, 3, 4, 4)),
    "WSConv2d": (lambda: layer.WSConv2d(3, 4, 3), (2, 3, 6, 6)),
    "WSLinear": (lambda: layer.WSLinear(3, 4), (2, 3)),
    "VotingLayer": (lambda: layer.VotingLayer(2), (2, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_wrapper_in_single_step_mode_is_folded(name: str) -> None:
    make, shape = LAYERS[name]
    net = check(nn.Sequential(make(), neuron.IFNode()).double(), sequence(*shape))
    # In evaluation the neuron kernel fuses the BatchNorm; in training its statistics cover the folded batch.
    assert [region.kind for region in net.programs[False].regions] == (
        ["loop"] if name.startswith("BatchNorm") else ["fold", "loop"]
    )
    net.train()
    assert [region.kind for region in net.regions][-1:] == ["loop"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer.LinearRecurrentContainer(neuron.LIFNode(), FEATURES, FEATURES, True),
        lambda: layer.ElementWiseRecurrentContainer(neuron.LIFNode(), lambda x, y: x + 0.5 * y),
        lambda: layer.SynapseFilter(tau=5.0, learnable=True),
        lambda: layer.Delay(2),
        layer.NeuNorm,
    ],
    ids=["linear recurrent", "element-wise recurrent", "synapse filter", "delay", "neunorm"],
)
def test_stateful_layer_is_looped_and_its_neighbour_layers_folded(make: Callable[..., nn.Module]) -> None:
    if make is layer.NeuNorm:
        model = nn.Sequential(nn.Conv2d(2, 3, 3), layer.NeuNorm(3, 4, 4), nn.Flatten(), nn.Linear(48, 2)).double()
        x_seq = sequence(2, 2, 6, 6)
    else:
        model = nn.Sequential(nn.Linear(4, FEATURES), make(), nn.Linear(FEATURES, 3)).double()
        x_seq = sequence(2, 4)
    net = check(model, x_seq)
    assert [region.kind for region in net.regions] == ["fold", "loop", "fold"]


def test_dropout_holds_one_mask_for_a_sequence() -> None:
    model = nn.Sequential(nn.Linear(4, 50), layer.Dropout(0.5)).double()
    net, x_seq = snnfx.convert(model), sequence(2, 4)
    y_seq = net(x_seq)
    dropped = y_seq == 0
    assert dropped.any() and not dropped.all()
    assert all(torch.equal(mask, dropped[0]) for mask in dropped)
    assert not torch.equal(net(x_seq) == 0, dropped)
    _, state = net.run(x_seq[:2])
    first, _ = net.run(x_seq[:2], state=state)
    second, _ = net.run(x_seq[2:], state=state)
    assert torch.equal(first == 0, dropped[:2]) or torch.equal((first == 0)[0], (second == 0)[0])


def test_dropout_draws_the_mask_that_stepping_draws() -> None:
    model = nn.Sequential(nn.Linear(4, 50), layer.Dropout(0.5), neuron.IFNode()).double()
    net, x_seq = snnfx.convert(model), sequence(2, 4)
    torch.manual_seed(3)
    expected = stepped(model, x_seq)
    torch.manual_seed(3)
    assert torch.equal(net(x_seq), expected)


def test_conversion_does_not_change_the_memories_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3), neuron.LIFNode()).double()
    x_seq = sequence(2, 4)
    model(x_seq[0])
    before = model[1].v
    net = snnfx.convert(model, example_inputs=(x_seq[0],))
    net(x_seq).sum().backward()
    assert model[1].v is before


def parametric_lif_net() -> nn.Module:
    from spikingjelly.activation_based.model import parametric_lif_net

    return parametric_lif_net.CIFAR10DVSNet(
        channels=2, spiking_neuron=neuron.LIFNode, surrogate_function=surrogate.ATan()
    )


def mnist_net() -> nn.Module:
    from spikingjelly.activation_based.model import parametric_lif_net

    return parametric_lif_net.MNISTNet(channels=2, spiking_neuron=neuron.ParametricLIFNode)


def spiking_resnet18() -> nn.Module:
    from spikingjelly.activation_based.model import spiking_resnet

    return spiking_resnet.spiking_resnet18(
        num_classes=3, spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan()
    )


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "parametric_lif_net.CIFAR10DVSNet": (parametric_lif_net, (2, 2, 128, 128)),
    "parametric_lif_net.MNISTNet": (mnist_net, (2, 1, 28, 28)),
    "spiking_resnet18": (spiking_resnet18, (2, 3, 32, 32)),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_of_the_zoo(name: str) -> None:
    if "resnet" in name:
        pytest.importorskip("torchvision")
    make, shape = MODELS[name]
    model = make()
    functional.set_step_mode(model, "s")
    net = check(model.double(), sequence(*shape, T=2))
    assert {region.kind for region in net.regions} <= {"fold", "loop"}


def test_spikformer_for_whole_sequences_is_refused() -> None:
    from spikingjelly.activation_based.model import spikformer

    model = spikformer.Spikformer(
        T=4, in_channels=2, img_size_h=32, img_size_w=32, num_classes=3, embed_dims=16, num_heads=2, depths=1
    )
    with pytest.raises(CaptureError, match="SNNFX20[145]"):
        snnfx.convert(model, example_inputs=(torch.rand(2, 2, 32, 32),))
