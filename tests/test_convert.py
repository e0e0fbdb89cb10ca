"""Every acceptance net: the converted net does what the stepped model does, and stays what it is when copied."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import snnfx
from snnfx.functional import reset_net
from support.nets import ACCEPTANCE, CSNN, AcceptanceNet, has
from support.stepping import assert_close_leaves

SMALL = [name for name, net in ACCEPTANCE.items() if net.package == "torch"]


@pytest.fixture(params=ACCEPTANCE)
def acceptance(request: pytest.FixtureRequest) -> AcceptanceNet:
    net = ACCEPTANCE[request.param]
    if not has(net.package) or (net.package == "spikingjelly" and not has("torchvision")):
        pytest.skip(f"{net.package} is not installed")
    return net


def stepped(model: nn.Module, sequences: tuple[Tensor, ...]) -> Any:
    """The oracle: a plain loop over the user's model, outputs stacked leaf by leaf."""
    reset_net(model)
    outputs = [pytree.tree_flatten(model(*x)) for x in zip(*sequences, strict=True)]
    reset_net(model)
    return pytree.tree_unflatten(
        [torch.stack(y) for y in zip(*(flat for flat, _ in outputs), strict=True)], outputs[0][1]
    )


@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
@pytest.mark.parametrize("batch_norm", ["fold", "per_step"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_acceptance_net_does_what_the_model_does(
    acceptance: AcceptanceNet, training: bool, batch_norm: str, with_examples: bool
) -> None:
    model = acceptance.make().double().train(training)
    if with_examples is False and acceptance.package == "spikingjelly":
        pytest.skip("once with examples is enough for a large net")
    example = acceptance.example(torch.float64) if with_examples else None
    net = snnfx.convert(model, example_inputs=example, batch_norm=batch_norm)
    snnfx.verify(model, net, *acceptance.sequences(5, torch.float64))


@pytest.mark.parametrize("name", SMALL)
def test_evaluation_outputs_equal_a_plain_loop(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make().double().eval()
    net = snnfx.convert(model, example_inputs=acceptance.example(torch.float64))
    sequences = acceptance.sequences(6, torch.float64)
    assert_close_leaves(net(*sequences), stepped(model, sequences))


@pytest.mark.parametrize("name", [n for n in SMALL if ACCEPTANCE[n].kinds is not None])
@pytest.mark.parametrize("with_examples", [True, False], ids=["examples", "no-examples"])
def test_plan_has_the_expected_regions(name: str, with_examples: bool) -> None:
    acceptance = ACCEPTANCE[name]
    net = snnfx.convert(acceptance.make(), example_inputs=acceptance.example() if with_examples else None)
    assert tuple(region.kind for region in net.regions) == acceptance.kinds


def test_one_fold_region_between_any_two_neurons_of_sew_resnet18() -> None:
    pytest.importorskip("spikingjelly")
    pytest.importorskip("torchvision")
    acceptance = ACCEPTANCE["sew_resnet18"]
    net = snnfx.convert(acceptance.make(), example_inputs=acceptance.example())
    kinds = [region.kind for region in net.regions]
    # 17 convolutional neurons and 3 in downsampling branches; stem, 8 x (conv1, conv2), 3 downsamples merge with none.
    assert kinds.count("loop") == 20
    assert kinds.count("fold") == 18
    assert set(kinds) == {"loop", "fold"}


@pytest.mark.parametrize("name", SMALL)
def test_copies_and_pickles_keep_class_slots_options_and_results(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    net = snnfx.convert(acceptance.make().eval(), example_inputs=acceptance.example())
    sequences = acceptance.sequences(4)
    expected = net(*sequences)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert isinstance(other, snnfx.Net)
        assert other.options == net.options
        assert [slot.name for slot in other.program.slots] == [slot.name for slot in net.program.slots]
        assert list(other.state_dict()) == list(net.state_dict())
        assert_close_leaves(other(*sequences), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1.0)
        assert_close_leaves(net(*sequences), expected)


@pytest.mark.parametrize("name", SMALL)
def test_state_dict_has_the_keys_of_the_model_in_its_order(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make()
    net = snnfx.convert(model, example_inputs=acceptance.example())
    assert list(net.state_dict()) == list(model.state_dict())
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(a is b for a, b in zip(net.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", SMALL)
def test_streaming_in_pieces_equals_the_whole(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    net = snnfx.convert(acceptance.make().double().eval(), example_inputs=acceptance.example(torch.float64))
    sequences = acceptance.sequences(7, torch.float64)
    whole, final = net.run(*sequences)
    first, state = net.run(*(x[:3] for x in sequences))
    second, state = net.run(*(x[3:] for x in sequences), state=state)
    assert_close_leaves(pytree.tree_map(lambda a, b: torch.cat([a, b]), first, second), whole)
    assert_close_leaves(state, final)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_inference_in_chunks_equals_the_whole(name: str, k: int) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make().double().eval()
    example = acceptance.example(torch.float64)
    sequences = acceptance.sequences(5, torch.float64)
    with torch.no_grad():
        whole = snnfx.convert(model, example_inputs=example, chunk=None)(*sequences)
        assert_close_leaves(snnfx.convert(model, example_inputs=example, chunk=k)(*sequences), whole)


@pytest.mark.parametrize("name", SMALL)
def test_single_step_form_carries_state_like_the_model(name: str) -> None:
    acceptance = ACCEPTANCE[name]
    model = acceptance.make().double().eval()
    net = snnfx.convert(model, step_mode="s", example_inputs=acceptance.example(torch.float64))
    sequences = acceptance.sequences(4, torch.float64)
    outputs = [net(*x) for x in zip(*sequences, strict=True)]
    assert_close_leaves(pytree.tree_map(lambda *y: torch.stack(y), *outputs), stepped(model, sequences))
    reset_net(net)
    assert_close_leaves(net(*(x[0] for x in sequences)), outputs[0])


def test_every_call_starts_from_the_reset_state() -> None:
    net = snnfx.convert(CSNN().eval())
    x_seq = torch.rand(3, 2, 1, 8, 8)
    assert torch.equal(net(x_seq), net(x_seq))


def test_carried_state_lives_on_until_it_is_reset() -> None:
    model = CSNN().eval()
    net, carrying = snnfx.convert(model), snnfx.convert(model, carry_state=True)
    x_seq = torch.rand(6, 2, 1, 8, 8)
    pieces = torch.cat([carrying(x_seq[:2]), carrying(x_seq[2:])])
    assert torch.equal(pieces, net(x_seq))
    reset_net(carrying)
    assert torch.equal(carrying(x_seq), net(x_seq))


def test_an_optimizer_of_the_model_trains_the_net() -> None:
    torch.manual_seed(0)
    model = CSNN()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    net = snnfx.convert(model)
    x_seq = torch.rand(4, 2, 1, 8, 8) * 3
    before = [p.clone() for p in model.parameters()]
    net(x_seq).sum().backward()
    optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_example_inputs_of_another_batch_size_and_spatial_size_do_not_bind_the_net() -> None:
    model = (
        nn.Sequential(nn.Conv2d(1, 2, 3), snnfx.neuron.LIFNode(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    )
    net = snnfx.convert(model, example_inputs=torch.rand(2, 1, 6, 6, dtype=torch.float64))
    for shape in ((3, 5, 1, 6, 6), (4, 1, 1, 9, 7)):
        x_seq = torch.rand(shape, dtype=torch.float64)
        assert_close_leaves(net(x_seq), stepped(model, (x_seq,)))


def test_a_model_without_a_batch_dimension_is_mapped_not_folded_into_the_features() -> None:
    model = nn.Sequential(nn.Linear(4, 6), snnfx.neuron.LIFNode(), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    x_seq = torch.rand(5, 4, dtype=torch.float64)
    planned = snnfx.convert(model, example_inputs=x_seq[0])
    assert "fold" not in {r.kind for r in planned.regions if any(n.op == "call_module" for n in r.nodes)}
    assert_close_leaves(planned(x_seq), stepped(model, (x_seq,)))
    with pytest.warns(snnfx.errors.SnnfxWarning, match="SNNFX102"):
        assert_close_leaves(snnfx.convert(model)(x_seq), stepped(model, (x_seq,)))


def test_time_last_data() -> None:
    model = CSNN().double().eval()
    x_seq = torch.rand(4, 2, 1, 8, 8, dtype=torch.float64)
    net = snnfx.convert(model, time_dim=-1)
    assert_close_leaves(net(x_seq.movedim(0, -1)), stepped(model, (x_seq,)).movedim(0, -1))


def test_direct_encoding_takes_an_image_and_the_number_of_steps() -> None:
    model = CSNN().double().eval()
    image = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    net = snnfx.convert(model, time_dim=None)
    assert net.regions[0].kind == "once"
    assert_close_leaves(net(image, T=5), stepped(model, (image.expand(5, *image.shape),)))


def test_converting_a_net_again_changes_nothing_but_the_step_mode() -> None:
    net = snnfx.convert(CSNN())
    assert snnfx.convert(net, step_mode="m") is net
    single = snnfx.convert(net, step_mode="s")
    assert single.options.step_mode == "s"
    assert snnfx.convert(single, step_mode="m").options.step_mode == "m"
