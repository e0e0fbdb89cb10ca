"""A net under torch.compile is one operator with the results, gradients and buffers of the net itself."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import snnfx
from snnfx import neuron

BACKENDS = ("inductor", "aot_eager", "eager")


class Convolutional(nn.Module):
    """Convolutions, batch statistics, pooling and two spiking layers."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.lif1 = neuron.LIFNode(tau=2.0)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(channels * 9, 5)
        self.lif2 = neuron.ParametricLIFNode(init_tau=2.0)
        self.never = nn.Linear(2, 2)
        with torch.no_grad():
            self.fc.weight.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lif2(self.fc(self.pool(self.lif1(self.bn(self.conv(x)))).flatten(1)))


class Dense(nn.Module):
    """Two linear layers with a spiking layer between."""

    def __init__(self, features: int = 6) -> None:
        super().__init__()
        self.fc1, self.lif, self.fc2 = nn.Linear(4, features), neuron.LIFNode(tau=2.0), nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.lif(self.fc1(x)))


def images(T: int = 4, N: int = 3) -> Tensor:
    return torch.rand(T, N, 1, 6, 6, dtype=torch.float64)


def rows(T: int = 4, N: int = 3) -> Tensor:
    return 3 * torch.rand(T, N, 4, dtype=torch.float64)


def pair(model: nn.Module, example: Any, **options: Any) -> tuple[Any, Any]:
    """A net and a net of an equal model of its own, the oracle."""
    model = model.double()
    return (
        snnfx.convert(model, example_inputs=example, **options),
        snnfx.convert(copy.deepcopy(model), example_inputs=example, **options),
    )


class Graphs:
    """A backend that keeps the graphs of Dynamo."""

    def __init__(self, backend: str = "aot_eager") -> None:
        self.graphs: list[torch.fx.GraphModule] = []
        self.backend = backend

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.registry import lookup_backend

        self.graphs.append(graph)
        return lookup_backend(self.backend)(graph, inputs)

    @property
    def operators(self) -> list[str]:
        names = [str(n.target) for g in self.graphs for n in g.graph.nodes if n.op == "call_function"]
        return [name for name in names if "run_net" in name]

    @property
    def calls(self) -> int:
        """The number of calls in all graphs besides taking apart results."""
        nodes = [n for g in self.graphs for n in g.graph.nodes if n.op in ("call_function", "call_method")]
        return sum("getitem" not in str(n.target) for n in nodes)


def gradients(outputs: Any, tensors: list[Tensor]) -> list[Tensor | None]:
    for t in tensors:
        t.grad = None
    loss = sum(
        (y * torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)).sum()
        for y in pytree.tree_leaves(outputs)
    )
    loss.backward()  # type: ignore[union-attr]
    return [t.grad for t in tensors]


def assert_same(found: Any, expected: Any) -> None:
    assert pytree.tree_structure(found) == pytree.tree_structure(expected)
    for a, e in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        if isinstance(e, Tensor):
            torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
        else:
            assert a == e


def assert_trains_alike(compiled: Any, net: Any, oracle: Any, *inputs: Tensor, calls: int = 2, **kwargs: Any) -> None:
    """Outputs, gradients of all parameters and inputs, and buffers agree over some calls."""
    for _ in range(calls):
        mine = [x.clone().requires_grad_() for x in inputs]
        theirs = [x.clone().requires_grad_() for x in inputs]
        found, expected = compiled(*mine, **kwargs), oracle(*theirs, **kwargs)
        assert_same(found, expected)
        assert_same(gradients(found, [*mine, *net.parameters()]), gradients(expected, [*theirs, *oracle.parameters()]))
        assert_same(dict(net.named_buffers()), dict(oracle.named_buffers()))


# -- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_gradients_and_statistics_are_those_of_the_net(backend: str, training: bool) -> None:
    net, oracle = pair(Convolutional(), images()[0])
    net.train(training), oracle.train(training)
    graphs = Graphs(backend)
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    assert_trains_alike(compiled, net, oracle, images())
    assert len(graphs.operators) == 1 and graphs.calls == 1
    assert all(p.grad is None for p in net.source.never.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_results_of_the_net(backend: str, mode: Any) -> None:
    net, oracle = pair(Convolutional(), images()[0])
    for training in (True, False):
        net.train(training), oracle.train(training)
        compiled = torch.compile(net, fullgraph=True, backend=backend)
        with mode():
            for _ in range(3):
                x = images()
                found = compiled(x)
                assert_same(found, oracle(x))
                assert not found.requires_grad
        assert_same(dict(net.named_buffers()), dict(oracle.named_buffers()))


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.lif = nn.Linear(4, 3), nn.Linear(4, 3), neuron.LIFNode(tau=2.0)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        current = self.a(x) + y
        spikes = self.lif(current)
        return {"spikes": spikes, "rest": (self.b(x), 7, current.detach()), "indices": spikes.argmax(-1)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_inputs_and_nested_outputs(backend: str) -> None:
    example = (rows()[0], torch.rand(3, 3, dtype=torch.float64))
    net, oracle = pair(ManyOutputs(), example)
    graphs = Graphs(backend)
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    x, y = rows(), torch.rand(4, 3, 3, dtype=torch.float64)
    found, expected = compiled(x, y=y), oracle(x, y=y)
    assert_same(found, expected)
    assert len(graphs.operators) == 1
    assert not found["rest"][2].requires_grad and not found["indices"].requires_grad
    assert_same(
        gradients([found["spikes"], found["rest"][0]], list(net.parameters())),
        gradients([expected["spikes"], expected["rest"][0]], list(oracle.parameters())),
    )


def test_a_parameter_that_the_used_outputs_do_not_reach_gets_no_gradient() -> None:
    net, oracle = pair(ManyOutputs(), (rows()[0], torch.rand(3, 3, dtype=torch.float64)))
    x, y = rows(), torch.rand(4, 3, 3, dtype=torch.float64)
    only_b = torch.compile(lambda x, y: net(x, y)["rest"][0], fullgraph=True, backend="aot_eager")
    found = gradients(only_b(x, y), list(net.parameters()))
    assert_same(found, gradients(oracle(x, y)["rest"][0], list(oracle.parameters())))
    assert found[0] is None


@pytest.mark.parametrize("time_dim", [-1, 1])
def test_time_in_another_dimension(time_dim: int) -> None:
    net, oracle = pair(Dense(), rows()[0], time_dim=time_dim)
    graphs = Graphs()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    assert_trains_alike(compiled, net, oracle, rows().movedim(0, time_dim))
    assert len(graphs.operators) == 1


def test_an_input_without_time_takes_any_T_in_two_graphs() -> None:
    net, oracle = pair(Dense(), rows()[0], time_dim=None)
    graphs = Graphs()
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    for T in (4, 5, 8, 16, 33):
        assert_trains_alike(compiled, net, oracle, rows()[0], calls=1, T=T)
    assert len(graphs.operators) == len(graphs.graphs) <= 2


@pytest.mark.parametrize("reduce", ["mean", "last"])
def test_reduced_outputs(reduce: str) -> None:
    net, oracle = pair(Dense(), rows()[0], reduce=reduce)
    assert_trains_alike(torch.compile(net, fullgraph=True, backend="aot_eager"), net, oracle, rows())


@pytest.mark.parametrize("options", [{"checkpoint": "regions"}, {"checkpoint": 2}, {"chunk": 2}])
def test_options_of_the_net_apply(options: dict[str, Any]) -> None:
    net, oracle = pair(Dense(), rows()[0], **options)
    compiled = torch.compile(net, fullgraph=True)
    assert_trains_alike(compiled, net, oracle, rows())
    net.eval(), oracle.eval()
    with torch.no_grad():
        x = rows(5)
        assert_same(compiled(x), oracle(x))


def test_a_whole_call_over_time_is_one_operator() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.lif = nn.Linear(4, 3), neuron.LIFNode(tau=2.0)

        def forward(self, x: Tensor) -> Tensor:
            self.lif.reset()
            return torch.stack([self.lif(self.fc(x[t])) for t in range(x.shape[0])]).mean(0)

    net, oracle = pair(Looped(), rows(), takes="sequence")
    graphs = Graphs()
    assert_trains_alike(torch.compile(net, fullgraph=True, backend=graphs), net, oracle, rows())


def test_dropout_draws_the_numbers_of_the_net() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), neuron.LIFNode(tau=2.0), nn.Linear(6, 3))
    net, oracle = pair(model, rows()[0])
    compiled, x = torch.compile(net, fullgraph=True), rows()
    for _ in range(2):
        torch.manual_seed(3)
        found = compiled(x)
        torch.manual_seed(3)
        assert_same(found, oracle(x))
    with torch.no_grad():
        both = torch.compile(lambda x: (net(x), net(x)), fullgraph=True)(x)
        assert not torch.equal(*both)


# -- state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_carried_state_goes_from_call_to_call_until_reset(backend: str) -> None:
    net, oracle = pair(Dense(), rows()[0], carry_state=True)
    graphs = Graphs(backend)
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    for _ in range(2):
        assert_trains_alike(compiled, net, oracle, rows(), calls=3)
        assert_same(dict(net.carried_state), dict(oracle.carried_state))
        snnfx.functional.reset_net(net), snnfx.functional.reset_net(oracle)
        assert net.carried_state is None
    assert len(graphs.operators) == len(graphs.graphs) == 2


class Explicit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mem = torch.zeros(x.shape[0], 3, dtype=x.dtype) if mem is None else mem
        mem = 0.7 * mem + self.fc(x)
        return (mem > 0.5).to(x.dtype) * mem, mem


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_that_the_model_takes_and_returns(backend: str) -> None:
    net, oracle = pair(Explicit(), rows()[0], carry={"mem": 1})
    graphs = Graphs(backend)
    compiled = torch.compile(net, fullgraph=True, backend=graphs)
    assert_trains_alike(compiled, net, oracle, rows())
    x, mem = rows(), torch.rand(3, 3, dtype=torch.float64)
    mine, theirs = mem.clone().requires_grad_(), mem.clone().requires_grad_()
    found, expected = compiled(x, mine), oracle(x, theirs)
    assert_same(found, expected)
    assert_same(gradients(found, [mine, *net.parameters()]), gradients(expected, [theirs, *oracle.parameters()]))
    assert len(graphs.operators) == len(graphs.graphs) == 2


# -- parameters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_parameters_get_no_gradient_and_may_be_thawed(backend: str) -> None:
    net, oracle = pair(Convolutional(), images()[0])
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for freeze in (True, False):
        for n in (net, oracle):
            n.source.conv.requires_grad_(not freeze)
        assert_trains_alike(compiled, net, oracle, images(), calls=1)
        assert (net.source.conv.weight.grad is None) == freeze


def test_all_parameters_frozen() -> None:
    net, oracle = pair(Dense(), rows()[0])
    net.requires_grad_(False), oracle.requires_grad_(False)
    compiled = torch.compile(net, fullgraph=True)
    assert_same(compiled(rows().zero_()), oracle(rows().zero_()))
    x = rows()
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert_same(gradients(compiled(mine), [mine]), gradients(oracle(theirs), [theirs]))


@pytest.mark.parametrize("assign", [False, True])
def test_parameters_may_change_after_compilation(assign: bool) -> None:
    net, oracle = pair(Convolutional(), images()[0])
    compiled = torch.compile(net, fullgraph=True)
    assert_trains_alike(compiled, net, oracle, images(), calls=1)
    other = {name: value.clone() for name, value in Convolutional().double().state_dict().items()}
    for n in (net, oracle):
        n.load_state_dict(copy.deepcopy(other), assign=assign)
    assert_trains_alike(compiled, net, oracle, images())
    for n in (net, oracle):
        optimizer = torch.optim.SGD(n.parameters(), lr=0.1)
        optimizer.step()
        n.source.fc.weight.data = torch.ones_like(n.source.fc.weight)
    assert_trains_alike(compiled, net, oracle, images())


def test_tied_and_parametrized_weights() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.lif = nn.Linear(4, 4), nn.Linear(4, 4), neuron.LIFNode(tau=2.0)
            self.b.weight = self.a.weight
            self.c = parametrizations.weight_norm(nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.lif(self.b(self.lif(self.a(x)))))

    net, oracle = pair(Tied(), rows()[0])
    for backend in BACKENDS:
        graphs = Graphs(backend)
        assert_trains_alike(torch.compile(net, fullgraph=True, backend=graphs), net, oracle, rows())
        assert len(graphs.operators) == 1
        torch.compiler.reset()


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_the_compiled_function_changes_between_two_calls(backend: str) -> None:
    net, oracle = pair(Convolutional(), images()[0])

    def twice(n: Any) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            first = n(x)
            for p in n.parameters():
                p.mul_(0.5)
            return first, n(x)

        return run

    compiled = torch.compile(twice(net), fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            x = images()
            assert_same(compiled(x), twice(oracle)(x))
    assert_same(dict(net.named_buffers()), dict(oracle.named_buffers()))
    assert_same(dict(net.named_parameters()), dict(oracle.named_parameters()))


def test_functional_call_replaces_the_parameters() -> None:
    net, oracle = pair(Dense(), rows()[0])

    def run(n: Any, x: Tensor, scale: Tensor) -> Tensor:
        return torch.func.functional_call(n, {name: scale * p for name, p in n.named_parameters()}, (x,))

    mine, theirs = (torch.tensor(0.7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x = rows()
    for backend in ("inductor", "aot_eager"):
        found = gradients(torch.compile(run, fullgraph=True, backend=backend)(net, x, mine), [mine, *net.parameters()])
        assert_same(found, gradients(run(oracle, x, theirs), [theirs, *oracle.parameters()]))


@pytest.mark.parametrize("when", ["before", "between"])
def test_hooks_of_parameters_run_once(when: str) -> None:
    net, oracle = pair(Dense(), rows()[0])
    x, compiled = rows(), torch.compile(net, fullgraph=True)
    found = []
    for n, run in ((net, compiled), (oracle, oracle)):
        y = None if when == "before" else run(x)
        n.source.fc1.weight.register_hook(lambda gradient: 3 * gradient)
        found.append(gradients(run(x) if y is None else y, list(n.parameters())))
    assert_same(*found)
    assert len(net.source.fc1.weight._backward_hooks) == 1


# -- regions of code around the net -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_code_around_the_net_may_reuse_memory(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), neuron.LIFNode(tau=2.0), nn.Linear(6, 5), nn.Sigmoid())
    net, oracle = pair(model, rows()[0])

    def around(n: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            x = (x * 1.5 + 0.1).exp().log()
            y = n(x)
            y = (2 * y).exp() - y
            return (y + x.sum()).sin() * 0.5

        return run

    compiled = torch.compile(around(net), fullgraph=True, backend=backend)
    assert_trains_alike(compiled, net, around_with_parameters(oracle, around(oracle)), rows())


class around_with_parameters:
    def __init__(self, net: Any, run: Callable[[Tensor], Tensor]) -> None:
        self.net, self.run = net, run

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def parameters(self) -> Any:
        return self.net.parameters()

    def named_buffers(self) -> Any:
        return self.net.named_buffers()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_net_twice_and_two_nets_in_one_function(backend: str) -> None:
    first, first_oracle = pair(Convolutional(), images()[0])
    second, second_oracle = pair(Dense(), rows()[0])

    def run(a: Any, b: Any, x: Tensor, y: Tensor) -> Tensor:
        return a(x).sum() * a(x + 0.1).mean() + b(y).sum()

    graphs = Graphs(backend)
    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    for _ in range(2):
        x, y = images(), rows()
        found, expected = compiled(first, second, x, y), run(first_oracle, second_oracle, x, y)
        assert_same(found, expected)
        mine, theirs = (
            [*first.parameters(), *second.parameters()],
            [*first_oracle.parameters(), *second_oracle.parameters()],
        )
        assert_same(gradients(found, mine), gradients(expected, theirs))
        assert_same(dict(first.named_buffers()), dict(first_oracle.named_buffers()))
    assert len(graphs.operators) == 3


@pytest.mark.parametrize("inside", [True, False])
def test_autocast(inside: bool) -> None:
    model = Dense()
    net, oracle = snnfx.convert(model), snnfx.convert(copy.deepcopy(model))
    x = rows().float()

    def run(n: Any, x: Tensor) -> Tensor:
        if not inside:
            return n(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return n(x)

    compiled = torch.compile(run, fullgraph=True)
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not inside):
            found, expected = compiled(net, x), run(oracle, x)
        assert found.dtype == expected.dtype == torch.bfloat16
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert_same(gradients(found, list(net.parameters())), gradients(expected, list(oracle.parameters())))


def test_reduce_overhead_is_harmless() -> None:
    net, oracle = pair(Convolutional(), images()[0])
    assert_trains_alike(torch.compile(net, fullgraph=True, mode="reduce-overhead"), net, oracle, images(), calls=3)


# -- backward passes --------------------------------------------------------------------------------------------------


def test_two_backward_passes_with_a_retained_graph() -> None:
    net, oracle = pair(Dense(), rows()[0])
    compiled, x = torch.compile(net, fullgraph=True, backend="aot_eager"), rows()
    for run in (compiled, oracle):
        y = run(x).square().sum()
        y.backward(retain_graph=True)
        y.backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()
    assert_same([p.grad for p in net.parameters()], [p.grad for p in oracle.parameters()])


def recordings() -> int:
    gc.collect()
    return sum(type(o).__name__ == "_Recording" for o in gc.get_objects())


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_are_freed_with_the_output_or_after_backward(backend: str) -> None:
    net, _ = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    y = compiled(rows())
    assert recordings() == 1
    del y
    assert recordings() == 0
    y = compiled(rows())
    y.sum().backward()
    assert recordings() == 0 and y.shape == (4, 3, 3)


def test_a_second_derivative_is_refused() -> None:
    net, _ = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    x = rows().requires_grad_()
    (gradient,) = torch.autograd.grad(compiled(x).sin().sum(), x, create_graph=True)
    with pytest.raises(snnfx.errors.InputError, match="SNNFX316"):
        gradient.sum().backward()


def test_a_graph_that_was_lost_is_an_error() -> None:
    net, _ = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = compiled(rows())
    with pytest.raises(snnfx.errors.PassError, match="SNNFX511"):
        y.sum().backward()


# -- graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 16])
def test_two_graphs_for_all_lengths_whatever_the_sizes_of_the_model(channels: int) -> None:
    model = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.BatchNorm2d(channels), neuron.LIFNode(tau=2.0), nn.AvgPool2d(2)
    )
    net, oracle = pair(model, images()[0])
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for T in (4, 5, 8, 16, 33):
        assert_trains_alike(compiled, net, oracle, images(T), calls=1)
    assert counter.frame_count <= 2


def test_many_nets_may_be_compiled() -> None:
    for features in range(2, 2 + torch._dynamo.config.recompile_limit):
        net, oracle = pair(Dense(features), rows()[0])
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        for training in (True, False):
            net.train(training), oracle.train(training)
            x = rows()
            assert_same(compiled(x), oracle(x))


def test_two_graphs_for_all_batch_sizes() -> None:
    net, oracle = pair(Convolutional(), images()[0])
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for N in (3, 4, 6, 9):
        assert_trains_alike(compiled, net, oracle, images(5, N), calls=1)
    assert counter.frame_count <= 2


def test_explain_of_dynamo_finds_no_graph_break() -> None:
    net, _ = pair(Dense(), rows()[0])
    report = torch._dynamo.explain(net)(rows())
    assert (report.graph_count, report.graph_break_count) == (1, 0)


def test_an_exported_net_is_an_ordinary_graph() -> None:
    net, _ = pair(Dense(), rows()[0])
    program = torch.export.export(net, (rows(),))
    assert not any("run_net" in str(n.target) for n in program.graph.nodes)


# -- life of the net --------------------------------------------------------------------------------------------------


def test_a_copy_of_a_compiled_net_is_a_net_of_its_own() -> None:
    net, oracle = pair(Convolutional(), images()[0])
    compiled = torch.compile(net, fullgraph=True)
    assert_trains_alike(compiled, net, oracle, images(), calls=1)
    clone = copy.deepcopy(compiled)
    with torch.no_grad():
        clone.fc.weight.zero_()
    x = images()
    found, expected = torch.compile(clone, fullgraph=True)(x), compiled(x)
    assert not torch.equal(found, expected)
    assert_same(expected, oracle(x))


def test_a_compiled_net_may_be_saved_and_loaded(tmp_path: Any) -> None:
    net, oracle = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True)
    assert_trains_alike(compiled, net, oracle, rows(), calls=1)
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert_trains_alike(torch.compile(loaded, fullgraph=True), loaded, oracle, rows(), calls=1)
    again, _ = pair(Dense(), rows()[0])
    other = torch.compile(again, fullgraph=True)
    other.load_state_dict(compiled.state_dict())
    assert_trains_alike(other, again, oracle, rows(), calls=1)


def test_threads_share_a_compiled_net() -> None:
    net, oracle = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True)
    compiled(rows()).sum().backward()
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            generator = torch.Generator().manual_seed(seed)
            for _ in range(20):
                x = torch.rand(4, 3, 4, dtype=torch.float64, generator=generator)
                found = torch.autograd.grad(compiled(x).square().sum(), list(net.parameters()))
                assert_same(found, torch.autograd.grad(oracle(x).square().sum(), list(oracle.parameters())))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_changed_setting_is_followed() -> None:
    net, oracle = pair(Dense(), rows()[0])
    compiled = torch.compile(net, fullgraph=True)
    assert_trains_alike(compiled, net, oracle, rows(), calls=1)
    for n in (net, oracle):
        n.source.lif.tau, n.source.lif.v_threshold = 3.0, 0.8
    assert_trains_alike(compiled, net, oracle, rows())


# -- nets that are not one operator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", ["hook", "trainable attribute", "single step"])
def test_a_net_that_cannot_be_one_operator_compiles_as_a_graph(reason: str) -> None:
    model = Dense().double()
    options: dict[str, Any] = {"step_mode": "s"} if reason == "single step" else {}
    if reason == "trainable attribute":
        model.extra = [torch.ones(3, requires_grad=True)]
    net = snnfx.convert(model, example_inputs=rows()[0], **options)
    if reason == "hook":
        model.lif.register_forward_hook(lambda module, args, output: None)
    graphs = Graphs()
    compiled = torch.compile(net, backend=graphs)
    compiled(rows()[0] if options else rows())
    assert graphs.graphs and not graphs.operators
