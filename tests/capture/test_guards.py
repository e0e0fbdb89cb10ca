"""Guards: a net notices every change outside its graph that a captured step depends on."""

from __future__ import annotations

import argparse
import collections
import copy
import enum
import functools
import pickle
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx import neuron
from snnfx.errors import CaptureError, SnnfxWarning
from support.stepping import fresh_copy, step_model

X_SEQ = torch.rand(5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2
SCALE = 2.0
LIST = [2.0]
TABLE: dict[str, Any] = {"act": torch.relu}
LOG: list[int] = []


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "SNNFX315", SnnfxWarning)
        yield


@pytest.fixture(autouse=True)
def restored_variables() -> Iterator[None]:
    before = SCALE, list(LIST), dict(TABLE), Constants.gain, Config.shared
    yield
    globals()["SCALE"], LIST[:], _, Constants.gain, Config.shared = before
    TABLE.update(before[2])
    LOG.clear()


class Config:
    """A plain object of a user."""

    shared = 2.0

    def __init__(self, k: Any = 2.0) -> None:
        self.k = k

    @property
    def doubled(self) -> Any:
        return self.k * 2

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.k

    def __call__(self, x: Tensor) -> Tensor:
        return x * self.k


class Slotted:
    __slots__ = ("k",)

    def __init__(self) -> None:
        self.k = 2.0


class Constants:
    gain = 2.0


class Mode(enum.Enum):
    A = 1
    B = 2


Pair = collections.namedtuple("Pair", "a b")


class Model(nn.Module):
    """A neuron behind a function of the step that reads the attribute `c`."""

    def __init__(self, c: Any, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.neuron = neuron.IFNode(v_threshold=0.9)
        self.__dict__["function"] = function
        self.c = c

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.function(self, x)) + self.function(self, x)


def scaled_by_global(x: Tensor) -> Tensor:
    return x * SCALE


def set_global(name: str, value: Any) -> None:
    globals()[name] = value


def double() -> Tensor:
    return torch.tensor(2.0, dtype=torch.float64)


other_module = types.ModuleType("a_module_of_the_user")
exec("K = 2.0\ndef times_k(x): return x * K", vars(other_module))
sys.modules[other_module.__name__] = other_module


def imports_inside(self: Any, x: Tensor) -> Tensor:
    from a_module_of_the_user import K

    return x * K


Case = tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor], Callable[[Any], Any]]
CASES: dict[str, Case] = {
    "an attribute of an object": (Config, lambda s, x: x * s.c.k, lambda m: setattr(m.c, "k", 0.3)),
    "another object": (Config, lambda s, x: x * s.c.k, lambda m: setattr(m, "c", Config(0.3))),
    "a class attribute of an object": (Config, lambda s, x: x * s.c.shared, lambda m: setattr(Config, "shared", 0.3)),
    "an attribute that getattr reads": (Config, lambda s, x: x * getattr(s.c, "k"), lambda m: setattr(m.c, "k", 0.3)),  # noqa: B009
    "an attribute that a method reads": (Config, lambda s, x: s.c.scaled(x), lambda m: setattr(m.c, "k", 0.3)),
    "an attribute that a property reads": (Config, lambda s, x: x * s.c.doubled, lambda m: setattr(m.c, "k", 0.3)),
    "an attribute that a call reads": (Config, lambda s, x: s.c(x), lambda m: setattr(m.c, "k", 0.3)),
    "a method of one object": (
        Config,
        lambda s, x: s.c.scaled(x),
        lambda m: setattr(m.c, "scaled", lambda x: x * 0.3),
    ),
    "a slot": (Slotted, lambda s, x: x * s.c.k, lambda m: setattr(m.c, "k", 0.3)),
    "a Namespace": (
        lambda: argparse.Namespace(k=2.0),
        lambda s, x: x * s.c.k,
        lambda m: setattr(m.c, "k", 0.3),
    ),
    "an object in an object": (
        lambda: types.SimpleNamespace(n=Config()),
        lambda s, x: x * s.c.n.k,
        lambda m: setattr(m.c.n, "k", 0.3),
    ),
    "an object in a list": (
        lambda: [Config(), Config()],
        lambda s, x: x * s.c[1].k,
        lambda m: setattr(m.c[1], "k", 0.3),
    ),
    "an attribute that did not exist": (
        Config,
        lambda s, x: x * (s.c.z if hasattr(s.c, "z") else 1.0),
        lambda m: setattr(m.c, "z", 0.3),
    ),
    "a module attribute that did not exist": (
        Config,
        lambda s, x: x * getattr(s, "z", 1.0),
        lambda m: setattr(m, "z", 0.3),
    ),
    "an element of a long list": (
        lambda: [2.0] * 200,
        lambda s, x: x * s.c[150],
        lambda m: m.c.__setitem__(150, 0.3),
    ),
    "a number of another type": (
        lambda: [2] * 200,
        lambda s, x: x * (0.3 if isinstance(s.c[150], float) else 1),
        lambda m: m.c.__setitem__(150, 2.0),
    ),
    "a list in a list": (lambda: [[1.0, 2.0]], lambda s, x: x * s.c[0][1], lambda m: m.c[0].__setitem__(1, 0.3)),
    "the order of a dict": (
        lambda: {"a": 1.0, "b": 2.0},
        lambda s, x: x * next(iter(s.c.values())),
        lambda m: (m.c.pop("a"), m.c.update(a=1.0)),
    ),
    "an OrderedDict": (
        lambda: collections.OrderedDict(a=2.0),
        lambda s, x: x * s.c["a"],
        lambda m: m.c.update(a=0.3),
    ),
    "a deque": (
        lambda: collections.deque([2.0]),
        lambda s, x: x * s.c[0],
        lambda m: m.c.__setitem__(0, 0.3),
    ),
    "a set": (lambda: {"a"}, lambda s, x: x * (0.3 if "b" in s.c else 1.0), lambda m: m.c.add("b")),
    "a named tuple": (lambda: Pair(2.0, 1.0), lambda s, x: x * s.c.a, lambda m: setattr(m, "c", Pair(0.3, 1.0))),
    "an enum": (lambda: Mode.A, lambda s, x: x * (2.0 if s.c is Mode.A else 0.3), lambda m: setattr(m, "c", Mode.B)),
    "an array": (lambda: np.array([2.0]), lambda s, x: x * float(s.c[0]), lambda m: m.c.__setitem__(0, 0.3)),
    "another tensor": (double, lambda s, x: x * s.c, lambda m: setattr(m, "c", double() * 0.1)),
    "a tensor in a list": (lambda: [double()], lambda s, x: x * s.c[0], lambda m: m.c.__setitem__(0, double() * 0.1)),
    "the values of an operand": (double, lambda s, x: x * s.c, lambda m: m.c.fill_(0.3)),
    "a value that Python reads": (double, lambda s, x: x * float(s.c), lambda m: m.c.fill_(0.3)),
    "a value that Python reads, through data": (double, lambda s, x: x * s.c.item(), lambda m: m.c.data.fill_(0.3)),
    "a value that an operation outside the graph reads": (double, lambda s, x: x * (s.c * 2), lambda m: m.c.fill_(0.3)),
    "a function": (lambda: torch.relu, lambda s, x: s.c(x), lambda m: setattr(m, "c", torch.sin)),
    "a lambda": (lambda: lambda x: x * 2, lambda s, x: s.c(x), lambda m: setattr(m, "c", lambda x: x * 0.3)),
    "a partial": (
        lambda: functools.partial(torch.mul, other=2.0),
        lambda s, x: s.c(x),
        lambda m: setattr(m, "c", functools.partial(torch.mul, other=0.3)),
    ),
    "a global": (Config, lambda s, x: x * SCALE, lambda m: set_global("SCALE", 0.3)),
    "a global of a helper": (Config, lambda s, x: scaled_by_global(x), lambda m: set_global("SCALE", 0.3)),
    "an element of a global": (Config, lambda s, x: x * LIST[0], lambda m: LIST.__setitem__(0, 0.3)),
    "a function in a global": (Config, lambda s, x: TABLE["act"](x), lambda m: TABLE.update(act=torch.sin)),
    "an attribute of a global class": (
        Config,
        lambda s, x: x * Constants.gain,
        lambda m: setattr(Constants, "gain", 0.3),
    ),
    "a global of another module": (
        Config,
        lambda s, x: x * other_module.K,
        lambda m: setattr(other_module, "K", other_module.K * 0.3),
    ),
    "a global of a function of another module": (
        Config,
        lambda s, x: other_module.times_k(x),
        lambda m: setattr(other_module, "K", other_module.K * 0.3),
    ),
    "a name imported inside the step": (
        Config,
        imports_inside,
        lambda m: setattr(other_module, "K", other_module.K * 0.3),
    ),
}


def assert_follows(net: Any, model: nn.Module) -> None:
    torch.testing.assert_close(net(X_SEQ), step_model(fresh_copy(model), X_SEQ), atol=1e-12, rtol=0)


@pytest.mark.parametrize("what", CASES)
def test_the_net_follows_a_change_of(what: str) -> None:
    make, function, change = CASES[what]
    model = Model(make(), function)
    net = snnfx.convert(model)
    before = net(X_SEQ)
    change(model)
    assert_follows(net, model)
    assert not torch.equal(net(X_SEQ), before)
    assert_follows(copy.deepcopy(net), model)


@pytest.mark.parametrize("what", CASES)
def test_calls_without_a_change_keep_the_plan(what: str) -> None:
    make, function, _ = CASES[what]
    net = snnfx.convert(Model(make(), function))
    guards = net.programs[True].guards, net.programs[False].guards
    net(X_SEQ)
    net.eval()(X_SEQ)
    net.train()(X_SEQ)
    assert (net.programs[True].guards, net.programs[False].guards) == guards
    assert net.programs[True].guards is guards[0]


def linear() -> nn.Module:
    return nn.Linear(4, 4, dtype=torch.float64)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([linear(), linear()])
        self.optional: nn.Module | None = None
        self.register_parameter("bias", None)
        self.neuron = neuron.LIFNode(tau=2.0, v_threshold=0.4)

    def helper(self, x: Tensor) -> Tensor:
        return x * 2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.optional is not None:
            x = self.optional(x)
        if self.bias is not None:
            x = x + self.bias
        return self.neuron(self.helper(x)) + x


class Halved(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


TREES: dict[str, Callable[[Any], Any]] = {
    "a replaced layer": lambda m: m.layers.__setitem__(0, linear()),
    "a replaced neuron": lambda m: setattr(m, "neuron", neuron.IFNode(v_threshold=0.2)),
    "an appended layer": lambda m: m.layers.append(linear()),
    "a removed layer": lambda m: m.layers.__delitem__(1),
    "layers in another order": lambda m: setattr(m, "layers", nn.ModuleList([m.layers[1], m.layers[0]])),
    "a module where None was": lambda m: setattr(m, "optional", linear()),
    "a parameter where None was": lambda m: setattr(m, "bias", nn.Parameter(torch.ones(4, dtype=torch.float64))),
    "the class of a layer": lambda m: setattr(m.layers[0], "__class__", Halved),
    "the forward of a layer": lambda m: setattr(m.layers[0], "forward", lambda x: x.flip(0)),
    "the forward of a neuron": lambda m: setattr(m.neuron, "forward", lambda x: x * 0.3),
    "the forward of the model": lambda m: setattr(m, "forward", lambda x: m.layers[0](x)),
    "a method of the instance": lambda m: setattr(m, "helper", lambda x: x * 0.3),
    "a tied weight": lambda m: setattr(m.layers[0], "weight", m.layers[1].weight),
}


@pytest.mark.parametrize("what", TREES)
def test_the_net_follows(what: str) -> None:
    model = Layers()
    net = snnfx.convert(model)
    net(X_SEQ)
    TREES[what](model)
    expected = step_model(model, X_SEQ)  # a lambda in a deep copy would refer to the original
    snnfx.functional.reset_net(model)
    torch.testing.assert_close(net(X_SEQ), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(copy.deepcopy(net)(X_SEQ), expected, atol=1e-12, rtol=0)
    assert [*net.state_dict()] == [*model.state_dict()]
    assert [*map(id, net.parameters())] == [*map(id, model.parameters())]


def test_a_copy_made_between_a_change_and_the_next_call_follows() -> None:
    model = Layers()
    net = snnfx.convert(model)
    net(X_SEQ)
    model.neuron = neuron.IFNode(v_threshold=0.2)
    clone = copy.deepcopy(net)
    assert_follows(clone, model)
    program = clone.program
    clone(X_SEQ)
    assert clone.program is program


def test_weights_that_are_untied_later() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.rand(4, 4, dtype=torch.float64))
            self.b = self.a

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.a @ self.b

    model = Tied()
    net = snnfx.convert(model)
    net(X_SEQ)
    model.b = nn.Parameter(torch.rand(4, 4, dtype=torch.float64))
    assert_follows(net, model)


def test_a_method_of_the_class_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Layers()
    net = snnfx.convert(model)
    net(X_SEQ)
    monkeypatch.setattr(Layers, "helper", lambda self, x: x * 0.3)
    assert_follows(net, model)
    monkeypatch.setattr(Layers, "forward", lambda self, x: self.layers[1](x))
    assert_follows(net, model)


def test_closure_variables() -> None:
    scale, gains = 2.0, [2.0]
    model = Model(None, lambda s, x: x * scale * gains[0])
    net = snnfx.convert(model)
    net(X_SEQ)
    gains[0] = 0.7
    assert_follows(net, model)
    scale = 0.3
    assert_follows(net, model)


def test_default_arguments() -> None:
    def function(self: Any, x: Tensor, gains: list[float] = [2.0]) -> Tensor:  # noqa: B006
        return x * gains[0]

    model = Model(None, function)
    net = snnfx.convert(model)
    net(X_SEQ)
    assert function.__defaults__ is not None
    function.__defaults__[0][0] = 0.3
    assert_follows(net, model)


def test_a_flag_of_a_child() -> None:
    model = nn.Sequential(Model(None, lambda s, x: x * (2.0 if s.training else 0.3)))
    net = snnfx.convert(model)
    net(X_SEQ)
    model[0].eval()
    assert_follows(net, model)


def test_hooks_added_to_a_container_are_refused_at_the_call() -> None:
    model = nn.Sequential(nn.Sequential(linear()), neuron.IFNode())
    net = snnfx.convert(model)
    before = net(X_SEQ)
    for module in (model, model[0]):
        hook = module.register_forward_hook(lambda module, args, output: output * 0.1)
        with pytest.raises(CaptureError, match="SNNFX208"):
            net(X_SEQ)
        hook.remove()
        assert torch.equal(net(X_SEQ), before)


class ReadsGradMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()
        self.neuron = neuron.LIFNode(tau=2.0, v_threshold=0.4)

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(self.layer(x) * (2.0 if torch.is_grad_enabled() else 0.3)) + x


def test_a_net_has_one_plan_for_each_gradient_mode() -> None:
    model = ReadsGradMode()
    net = snnfx.convert(model)
    assert_follows(net, model)
    with torch.no_grad():
        assert_follows(net, model)
    replan, calls = net._replan, []
    net.__dict__["_replan"] = lambda *args: calls.append(args) or replan(*args)
    for _ in range(2):
        assert_follows(net, model)
        with torch.no_grad():
            assert_follows(net, model)
            torch.testing.assert_close(net.run(X_SEQ)[0], step_model(fresh_copy(model), X_SEQ))
            torch.testing.assert_close(torch.cat([*net.stream(X_SEQ.split(2))]), step_model(fresh_copy(model), X_SEQ))
    assert not calls


def test_verify_accepts_a_model_that_reads_the_gradient_mode() -> None:
    model = ReadsGradMode()
    assert snnfx.verify(model, snnfx.convert(model), X_SEQ)


def test_conversion_without_gradients_gives_a_net_that_trains() -> None:
    model = ReadsGradMode()
    with torch.no_grad():
        net = snnfx.convert(model)
        assert_follows(net, model)
    assert_follows(net, model)
    net(X_SEQ).sum().backward()
    assert model.layer.weight.grad is not None


def test_a_pickled_net_follows_changes() -> None:
    model = PickledModel()
    net = pickle.loads(pickle.dumps(snnfx.convert(model)))
    program = net.program
    assert_follows(net, net.source)
    assert net.program is program
    net.source.c.k = 0.3
    assert_follows(net, net.source)
    set_global("SCALE", 0.3)
    assert_follows(net, net.source)
    net.source.layers[0] = linear()
    assert_follows(net, net.source)


class PickledModel(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.function, self.tensor = Config(), torch.relu, torch.tensor(1.5)

    def helper(self, x: Tensor) -> Tensor:
        return self.function(x) * self.c.k * SCALE * self.tensor


def test_only_the_guards_are_replaced_if_the_program_is_the_same() -> None:
    model = Model(Config(), lambda s, x: x * (2.0 if s.c.k > 1 else 0.3))
    net = snnfx.convert(model)
    executable = net._executable
    model.c.k = 3.0
    net(X_SEQ)
    assert net._executable is executable
    replan = net._replan
    net.__dict__["_replan"] = None
    net(X_SEQ)  # the new guards hold
    net.__dict__["_replan"] = replan
    model.c.k = 0.5
    assert_follows(net, model)


STORES: dict[str, Callable[[Any, Tensor], Tensor]] = {}


def stores(function: Callable[[Any, Tensor], Tensor]) -> None:
    STORES[function.__name__] = function


@stores
def a_global(self: Any, x: Tensor) -> Tensor:
    global SCALE
    SCALE = SCALE + 1
    return x


@stores
def a_new_global(self: Any, x: Tensor) -> Tensor:
    global NEVER_DEFINED
    NEVER_DEFINED = x
    return x


@stores
def an_element_of_a_global(self: Any, x: Tensor) -> Tensor:
    LIST[0] += 1
    return x * LIST[0]


@pytest.mark.parametrize("what", STORES)
def test_a_step_that_stores_is_refused(what: str) -> None:
    before = SCALE, LIST[0]
    with pytest.raises(CaptureError, match="SNNFX226" if what == "a_new_global" else "SNNFX218"):
        snnfx.convert(Model(None, STORES[what]))
    assert (SCALE, LIST[0]) == before
    assert "NEVER_DEFINED" not in globals()


def test_a_step_that_stores_a_closure_variable_is_refused() -> None:
    count = 0

    def function(self: Any, x: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return x * count

    with pytest.raises(CaptureError, match="SNNFX218 a step changes the variable `count`"):
        snnfx.convert(Model(None, function))
    assert count == 0


def test_a_log_that_grows_is_no_guard() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        LOG.append(1)
        return x

    model = Model(None, function)
    net = snnfx.convert(model)
    program = net.program
    LOG.clear()
    assert_follows(net, model)
    assert net.program is program


def test_a_lock_is_guarded_by_identity() -> None:
    import threading

    def function(self: Any, x: Tensor) -> Tensor:
        with lock:
            return x * 2

    lock = threading.Lock()
    net = snnfx.convert(Model(None, function))
    program = net.program
    net(X_SEQ)
    assert net.program is program


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: setattr(m.c, "k", 0.3), "`c.k` is 0.3, but the step was captured with 2.0"),
        (lambda m: m.layers.append(linear()), "the module `layers.2` was added after the step was captured"),
        (lambda m: m.layers.__setitem__(0, linear()), "the module `layers.0` was replaced after the step was captured"),
        (lambda m: setattr(m, "function", torch.sin), "`function` is sin, but the step was captured with relu"),
        (lambda m: set_global("SCALE", 0.3), "SCALE` is 0.3, but the step was captured with 2.0"),
    ],
)
def test_the_warning_names(change: Callable[[Any], Any], text: str) -> None:
    model = PickledModel()
    net = snnfx.convert(model)
    change(model)
    with pytest.warns(SnnfxWarning) as caught:
        net(X_SEQ)
    assert any("SNNFX315" in str(w.message) and text in str(w.message) for w in caught)
