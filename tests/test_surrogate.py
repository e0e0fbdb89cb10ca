"""Spike functions: Heaviside forward, the documented derivative backward, under every transform of torch."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn

from snnfx import surrogate
from snnfx.errors import InputError
from snnfx.surrogate import CustomSurrogate, Surrogate


def normal(x: float, mean: float, deviation: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * deviation**2)) / (deviation * math.sqrt(2 * math.pi))


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# The table of the module's docstring in plain Python, with other values than the defaults.
FORMULAS: dict[str, tuple[dict[str, float], Callable[[float], float]]] = {
    "Sigmoid": ({"alpha": 3.0}, lambda x: 3 * logistic(3 * x) * (1 - logistic(3 * x))),
    "ATan": ({"alpha": 3.0}, lambda x: 1.5 / (1 + (math.pi / 2 * 3 * x) ** 2)),
    "SoftSign": ({"alpha": 3.0}, lambda x: 1.5 / (1 + 3 * abs(x)) ** 2),
    "SuperSpike": ({"alpha": 3.0}, lambda x: 3 / (1 + abs(x)) ** 2),
    "FastSigmoid": ({"alpha": 10.0}, lambda x: 1 / (1 + 10 * abs(x)) ** 2),
    "Erf": ({"alpha": 1.5}, lambda x: 1.5 / math.sqrt(math.pi) * math.exp(-((1.5 * x) ** 2))),
    "PiecewiseExp": ({"alpha": 1.5}, lambda x: 0.75 * math.exp(-1.5 * abs(x))),
    "MultiGaussian": (
        {"sigma": 0.4, "height": 0.2, "spread": 5.0, "gamma": 0.7},
        lambda x: 0.7 * (1.2 * normal(x, 0, 0.4) - 0.2 * normal(x, 0.4, 2) - 0.2 * normal(x, -0.4, 2)),
    ),
    "PiecewiseQuadratic": ({"alpha": 0.8}, lambda x: 0.8 * max(0, 1 - 0.8 * abs(x))),
    "Triangle": ({"gamma": 0.4, "width": 1.3}, lambda x: 0.4 * max(0, 1 - abs(x) / 1.3)),
    "Rectangle": ({"width": 1.6}, lambda x: 1 / 1.6 if abs(x) < 0.8 else 0),
    "PiecewiseLeakyReLU": ({"w": 0.7, "c": 0.05}, lambda x: 1 / 1.4 if abs(x) < 0.7 else 0.05),
    "LeakyKReLU": ({"leak": 0.2, "k": 0.9}, lambda x: 0.9 if x >= 0 else 0.2),
}
NAMES = sorted(FORMULAS)
FLAT = ("Rectangle", "PiecewiseLeakyReLU", "LeakyKReLU")
# Away from all kinks and jumps of the formulas above.
POINTS = [-2.71, -1.05, -0.55, -0.3, -0.013, 0.017, 0.23, 0.61, 1.11, 2.9]


def make(name: str, **options: object) -> Surrogate:
    return getattr(surrogate, name)(**FORMULAS[name][0], **options)


def points(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(POINTS, dtype=dtype)


def expected(name: str, x: Tensor) -> Tensor:
    return torch.tensor([FORMULAS[name][1](float(v)) for v in x], dtype=x.dtype)


def gradient(spike: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    return torch.autograd.grad(spike(x).sum(), x)[0]


def test_every_surrogate_of_the_module_is_tested_here() -> None:
    public = (getattr(surrogate, name) for name in surrogate.__all__)
    zoo = {cls.__name__ for cls in public if isinstance(cls, type) and issubclass(cls, Surrogate)}
    assert zoo - {"Surrogate", "CustomSurrogate"} == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_forward_is_heaviside_and_backward_is_the_documented_formula(name: str, dtype: torch.dtype) -> None:
    x = points(dtype).requires_grad_()
    spike = make(name)(x)
    assert spike.dtype == dtype
    assert spike.tolist() == [float(v >= 0) for v in POINTS]
    (grad,) = torch.autograd.grad(spike.sum(), x)
    assert grad.dtype == dtype
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    torch.testing.assert_close(grad, expected(name, x.detach()), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_weighted_by_the_incoming_one(name: str) -> None:
    x = points().requires_grad_()
    incoming = torch.linspace(-2, 3, len(x), dtype=x.dtype)
    (grad,) = torch.autograd.grad(make(name)(x), x, incoming)
    torch.testing.assert_close(grad, incoming * expected(name, x.detach()))


@pytest.mark.parametrize("name", NAMES)
def test_primitive_is_smooth_and_its_gradient_is_the_surrogate(name: str) -> None:
    smooth = make(name, spiking=False)
    assert torch.autograd.gradcheck(smooth, points().requires_grad_())
    torch.testing.assert_close(gradient(smooth, points()), gradient(make(name), points()))


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"LeakyKReLU", "MultiGaussian"}))
def test_primitive_is_one_half_at_the_threshold(name: str) -> None:
    x = torch.zeros(1, dtype=torch.float64)
    assert float(make(name, spiking=False)(x)) == pytest.approx(0.5)
    torch.testing.assert_close(gradient(make(name, spiking=False), x), gradient(make(name), x))


@pytest.mark.parametrize("name", NAMES)
def test_second_derivative_is_that_of_the_formula(name: str) -> None:
    x = points().requires_grad_()
    (grad,) = torch.autograd.grad(make(name)(x).sum(), x, create_graph=True)
    if name in FLAT:
        assert not grad.requires_grad or not torch.autograd.grad(grad.sum(), x)[0].any()
        return
    (second,) = torch.autograd.grad(grad.sum(), x)
    step = 1e-6
    slope = (expected(name, x.detach() + step) - expected(name, x.detach() - step)) / (2 * step)
    torch.testing.assert_close(second, slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_edge_values(name: str) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan])
    spike, grad = make(name)(x), gradient(make(name), x)
    assert spike.tolist() == [1, 1, 1, 0, 0]
    assert torch.isfinite(grad[:4]).all()
    assert torch.isfinite(grad[4]) if name in FLAT else torch.isnan(grad[4])


def test_nan_has_the_outside_gradient_where_the_derivative_is_flat() -> None:
    x = torch.tensor([math.nan])
    flat = [surrogate.Rectangle(), surrogate.PiecewiseLeakyReLU(c=0.25), surrogate.LeakyKReLU(leak=0.125)]
    assert [float(gradient(s, x)) for s in flat] == [0, 0.25, 0.125]


def test_boxcars_do_not_include_their_edges() -> None:
    x = torch.tensor([-0.5, 0.5])
    assert gradient(surrogate.Rectangle(width=1.0), x).tolist() == [0, 0]
    assert gradient(surrogate.PiecewiseLeakyReLU(w=0.5, c=0.0), x).tolist() == [0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_large_half_precision_inputs_do_not_overflow_into_nan(name: str) -> None:
    x = torch.tensor([-60000.0, -300.0, 300.0, 60000.0], dtype=torch.float16)
    assert torch.isfinite(gradient(make(name), x)).all()


@pytest.mark.parametrize("shape", [(), (0,), (3, 1, 2)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert surrogate.Sigmoid()(x).shape == gradient(surrogate.Sigmoid(), x).shape == shape


# Equality with the packages that the names and defaults come from


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("Sigmoid()", "Sigmoid()"),
        ("ATan()", "ATan()"),
        ("SoftSign()", "SoftSign()"),
        ("SuperSpike()", "SuperSpike()"),
        ("Erf()", "Erf()"),
        ("PiecewiseExp()", "PiecewiseExp()"),
        ("PiecewiseQuadratic()", "PiecewiseQuadratic()"),
        ("PiecewiseLeakyReLU()", "PiecewiseLeakyReLU()"),
        ("LeakyKReLU()", "LeakyKReLU()"),
        ("Rectangle()", "Rect()"),
        ("Rectangle(width=0.5)", "Rect(alpha=2.0)"),
        ("ATan(alpha=0.7)", "ATan(alpha=0.7)"),
        ("LeakyKReLU(leak=0.3, k=2.0)", "LeakyKReLU(leak=0.3, k=2.0)"),
    ],
)
def test_gradient_equals_spikingjelly(ours: str, theirs: str) -> None:
    package = pytest.importorskip("spikingjelly.activation_based.surrogate")
    mine, other = eval(ours, vars(surrogate)), eval(theirs, vars(package))
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    assert torch.equal(mine(x), other(x))
    torch.testing.assert_close(gradient(mine, x), gradient(other, x), rtol=1e-13, atol=1e-15)
    if ours != "SuperSpike()":  # has no primitive there
        mine.spiking = other.spiking = False
        torch.testing.assert_close(mine(x), other(x), rtol=1e-13, atol=1e-15)


def test_fast_sigmoid_equals_snntorch() -> None:
    package = pytest.importorskip("snntorch.surrogate")
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    torch.testing.assert_close(gradient(surrogate.FastSigmoid(), x), gradient(package.fast_sigmoid(), x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_triangle_and_super_spike_equal_norse() -> None:
    package = pytest.importorskip("norse.torch.functional.threshold")
    x = torch.linspace(-4, 4, 1601, dtype=torch.float64)
    theirs = gradient(lambda x: package.threshold(x, "triangle", 0.3), x)
    torch.testing.assert_close(gradient(surrogate.Triangle(), x), theirs)
    # Norse 1.1 takes an alpha and does not use it.
    theirs = gradient(lambda x: package.threshold(x, "super", 100.0), x)
    torch.testing.assert_close(gradient(surrogate.SuperSpike(), x), theirs)


# Transforms


@pytest.mark.parametrize("name", [*NAMES, "CustomSurrogate"])
def test_torch_func_transforms(name: str) -> None:
    spike = CustomSurrogate(lambda x, a: a / (1 + x * x), a=2.0) if name == "CustomSurrogate" else make(name)
    x = points()
    reference, direction = gradient(spike, x), torch.linspace(1, 2, len(x), dtype=x.dtype)

    torch.testing.assert_close(torch.func.grad(lambda x: spike(x).sum())(x), reference)
    torch.testing.assert_close(torch.func.jacrev(spike)(x), reference.diag())
    torch.testing.assert_close(torch.func.jacfwd(spike)(x), reference.diag())
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(spike))(x), reference)
    assert torch.equal(torch.func.vmap(spike, in_dims=1, out_dims=1)(x.view(2, 5)), spike(x).view(2, 5))
    output, tangent = torch.func.jvp(spike, (x,), (direction,))
    assert torch.equal(output, spike(x))
    torch.testing.assert_close(tangent, direction * reference)
    output, pull = torch.func.vjp(spike, x)
    torch.testing.assert_close(pull(direction)[0], direction * reference)
    double = torch.func.grad(lambda x: torch.func.grad(lambda x: spike(x).sum())(x).square().sum())(x)
    assert torch.isfinite(double).all()


def test_forward_mode_keeps_half_precision() -> None:
    x = torch.randn(4, dtype=torch.bfloat16)
    spike = CustomSurrogate(lambda x: torch.exp(-(x.float() ** 2)))
    output, tangent = torch.func.jvp(spike, (x,), (torch.ones_like(x),))
    assert output.dtype == tangent.dtype == gradient(spike, x).dtype == torch.bfloat16


def test_make_fx_records_the_surrogate_gradient() -> None:
    """The kernels derive their backward from this graph."""
    from torch.fx.experimental.proxy_tensor import make_fx

    spike, x = surrogate.ATan(), points()

    def forward_and_gradient(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = spike(x)
        return y, torch.autograd.grad(y.sum(), x)[0]

    traced = make_fx(forward_and_gradient)(x)
    other = torch.randn(len(x), dtype=x.dtype)
    torch.testing.assert_close(traced(other), forward_and_gradient(other))


@pytest.mark.parametrize("name", ["Sigmoid", "LeakyKReLU", "CustomSurrogate"])
def test_compiles_as_one_graph(name: str) -> None:
    spike = CustomSurrogate(lambda x, a: a / (1 + x * x), a=2.0) if name == "CustomSurrogate" else make(name)
    compiled = torch.compile(spike, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(points()), spike(points()))
    torch.testing.assert_close(gradient(compiled, points()), gradient(spike, points()))


def test_all_surrogates_compile_in_one_graph() -> None:
    spikes = nn.ModuleList([make(name) for name in NAMES])

    def total(x: Tensor) -> Tensor:
        return torch.stack([spike(x) * (i + 1) for i, spike in enumerate(spikes)]).sum(0)

    compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradient(compiled, points()), gradient(total, points()))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile_around_torch_func_keeps_the_surrogate_gradient(backend: str) -> None:
    """pytorch#193279: a Function that Dynamo traces through loses its backward there, without a word."""
    spike, x = surrogate.ATan(), points()
    transforms = {
        "grad": torch.func.grad(lambda x: spike(x).sum()),
        "jvp": lambda x: torch.func.jvp(spike, (x,), (torch.ones_like(x),))[1],
        "vmap of grad": torch.func.vmap(torch.func.grad(spike)),
    }
    for name, transform in transforms.items():
        compiled = torch.compile(transform, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(x), gradient(spike, x), msg=lambda m, name=name: f"{name}: {m}")


def test_compiled_surrogate_follows_alpha() -> None:
    spike = surrogate.ATan()
    compiled = torch.compile(spike, backend="aot_eager", fullgraph=True)
    for alpha in (1.0, 2.0, 5.0):
        spike.alpha = alpha
        torch.testing.assert_close(gradient(compiled, points()), gradient(surrogate.ATan(alpha), points()))


# Modules


@pytest.mark.parametrize("name", NAMES)
def test_copies_and_pickles_are_equal_and_independent(name: str) -> None:
    spike = make(name)
    for clone in (copy.deepcopy(spike), copy.copy(spike), pickle.loads(pickle.dumps(spike))):
        assert type(clone) is type(spike)
        assert repr(clone) == repr(spike)
        assert torch.equal(gradient(clone, points()), gradient(spike, points()))
        first = next(iter(FORMULAS[name][0]))
        setattr(clone, first, 0.123)
        assert getattr(spike, first) == FORMULAS[name][0][first]


def test_no_parameters_and_no_state_dict_entries() -> None:
    for name in NAMES:
        assert not list(make(name).parameters())
        assert not make(name).state_dict()


def test_alpha_is_live_and_a_past_call_keeps_its_own() -> None:
    spike, x = surrogate.Sigmoid(alpha=1.0), torch.zeros(1, requires_grad=True)
    early = spike(x)
    spike.alpha = 8.0
    late = spike(x)
    assert float(torch.autograd.grad(early, x)[0]) == 0.25
    assert float(torch.autograd.grad(late, x)[0]) == 2.0


def test_hyperparameters_are_python_floats() -> None:
    spike = surrogate.ATan(alpha=3)
    assert type(spike.alpha) is float
    spike.alpha = numpy.float32(0.5)  # as from a schedule
    assert type(spike.alpha) is float
    assert spike.alpha == 0.5


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan, True, "2", None, torch.tensor(2.0)])
def test_hyperparameters_out_of_range_are_refused_when_set(bad: object) -> None:
    with pytest.raises(InputError, match=r"SNNFX309 `alpha` of ATan cannot be .* finite number above 0"):
        surrogate.ATan(alpha=bad)
    spike = surrogate.ATan()
    with pytest.raises(InputError, match="SNNFX309"):
        spike.alpha = bad
    assert spike.alpha == 2.0


def test_zero_and_negative_are_fine_where_the_formula_allows_them() -> None:
    assert float(gradient(surrogate.LeakyKReLU(leak=-0.5), torch.tensor([-1.0]))) == -0.5
    assert surrogate.MultiGaussian(height=0.0).height == 0.0
    assert surrogate.PiecewiseLeakyReLU(c=0.0).c == 0.0


def test_spiking_can_be_switched_on_a_live_module() -> None:
    spike, x = surrogate.Sigmoid(), points()
    spike.spiking = False
    torch.testing.assert_close(spike(x), torch.sigmoid(4 * x))
    assert repr(spike) == "Sigmoid(alpha=4.0, spiking=False)"
    spike.spiking = True
    assert torch.equal(spike(x), (x >= 0).double())


def test_marked_as_elementwise() -> None:
    assert surrogate.SpikeFunction.snnfx_elementwise
    assert all(getattr(surrogate, name).snnfx_elementwise for name in NAMES)


def test_tracing_through_a_surrogate_is_refused_instead_of_losing_its_gradient() -> None:
    with pytest.raises(InputError, match="SNNFX305"):
        torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), surrogate.ATan()))


# Surrogates of one's own


class Cauchy(Surrogate):
    """What the documentation shows, with two hyperparameters and a primitive."""

    def __init__(self, alpha: float = 1.0, scale: float = 1.0, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha, scale=scale)

    @staticmethod
    def derivative(x: Tensor, alpha: float, scale: float) -> Tensor:
        return scale * alpha / (1 + (alpha * x) ** 2)

    @staticmethod
    def primitive(x: Tensor, alpha: float, scale: float) -> Tensor:
        return scale * torch.atan(alpha * x)


def bell(x: Tensor, sharpness: float) -> Tensor:
    return torch.exp(-sharpness * x * x)


def test_subclass_with_derivative_and_primitive() -> None:
    spike, x = Cauchy(alpha=2.0, scale=0.5), points()
    torch.testing.assert_close(gradient(spike, x), 1 / (1 + 4 * x * x))
    clone = pickle.loads(pickle.dumps(spike))
    assert torch.equal(gradient(clone, x), gradient(spike, x))
    spike.spiking = False
    assert torch.autograd.gradcheck(spike, x.requires_grad_())


def test_subclass_of_a_surrogate_with_another_derivative() -> None:
    class Dampened(surrogate.Sigmoid):
        @staticmethod
        def derivative(x: Tensor, alpha: float) -> Tensor:
            return 0.5 * surrogate.Sigmoid.derivative(x, alpha)

    class Renamed(surrogate.Sigmoid):
        pass

    x = points()
    torch.testing.assert_close(gradient(Dampened(), x), 0.5 * gradient(surrogate.Sigmoid(), x))
    assert torch.equal(gradient(Renamed(), x), gradient(surrogate.Sigmoid(), x))


def test_custom_surrogate_from_a_function() -> None:
    spike, x = CustomSurrogate(bell, sharpness=2), points()
    assert torch.equal(spike(x), (x >= 0).double())
    torch.testing.assert_close(gradient(spike, x), torch.exp(-2 * x * x))
    spike.sharpness = 3.0
    torch.testing.assert_close(gradient(spike, x), torch.exp(-3 * x * x))
    assert repr(spike) == "CustomSurrogate(sharpness=3.0)"


def test_custom_surrogates_do_not_share_their_derivative() -> None:
    flat, steep = CustomSurrogate(torch.ones_like), CustomSurrogate(lambda x: torch.full_like(x, 3.0))
    assert float(gradient(flat, torch.zeros(1))) == 1.0
    assert float(gradient(steep, torch.zeros(1))) == 3.0


def test_custom_surrogate_copies_and_pickles() -> None:
    spike = CustomSurrogate(bell, sharpness=2)
    for clone in (copy.deepcopy(spike), pickle.loads(pickle.dumps(spike))):
        clone.sharpness = 1.0
        torch.testing.assert_close(gradient(clone, points()), bell(points(), 1.0))
        torch.testing.assert_close(gradient(spike, points()), bell(points(), 2.0))
    scale = 3.0
    closure = copy.deepcopy(CustomSurrogate(lambda x: scale * torch.ones_like(x)))
    assert float(gradient(closure, torch.zeros(1))) == 3.0


def test_custom_surrogate_with_primitive() -> None:
    spike = CustomSurrogate(lambda x: 1 - torch.tanh(x) ** 2, torch.tanh, spiking=False)
    torch.testing.assert_close(spike(points()), torch.tanh(points()))
    spike.spiking = True
    torch.testing.assert_close(gradient(spike, points()), 1 - torch.tanh(points()) ** 2)


def test_without_a_primitive_there_is_no_smooth_mode() -> None:
    with pytest.raises(InputError, match=r"SNNFX309 CustomSurrogate cannot be set to spiking=False"):
        CustomSurrogate(bell, spiking=False, sharpness=1.0)
    spike = CustomSurrogate(bell, sharpness=1.0)
    with pytest.raises(InputError, match="primitive="):
        spike.spiking = False
    assert spike.spiking


def test_mistakes_in_own_surrogates_are_named() -> None:
    with pytest.raises(InputError, match=r"`derivative` of Method is not a static method"):

        class Method(Surrogate):
            def derivative(self, x: Tensor) -> Tensor:
                return x

    class Empty(Surrogate):
        pass

    with pytest.raises(InputError, match=r"Empty has no static method `derivative`"):
        Empty()
    with pytest.raises(InputError, match=r"`derivative` of a CustomSurrogate is a Linear"):
        CustomSurrogate(nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"`primitive` of a CustomSurrogate is a int"):
        CustomSurrogate(bell, 3)
    with pytest.raises(InputError, match=r"cannot be called `training`"):
        CustomSurrogate(bell, training=1.0)
    with pytest.raises(InputError, match=r"cannot be called `forward`"):
        CustomSurrogate(bell, forward=1.0)
