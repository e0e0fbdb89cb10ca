"""Compare the net of a model that runs over time itself with the model's own call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import VerificationError
from snnfx.inspect.verify.comparison import Comparison, Tolerance, compare, named_leaves
from snnfx.inspect.verify.observed_contents import Observed, changed_names, is_same, observe
from snnfx.inspect.verify.shared_draws import SharedDraws
from snnfx.inspect.verify.verification_report import VerificationReport
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.rng_states import rng_state
from snnfx.sandbox.structural_copy import StructuralCopy
from snnfx.sandbox.torch_internals import pytree
from snnfx.state.registry import registered_attributes, reset_net

__all__ = ["verify_whole_call"]

_CODES = {
    "output": "SNNFX401",
    "gradient": "SNNFX403",
    "buffer": "SNNFX404",
    "parameter": "SNNFX410",
    "attribute": "SNNFX410",
}


@dataclass
class _Call:
    """Outputs and gradients of one call, the contents of the model before and after, and whether it draws numbers."""

    outputs: dict[str, Any]
    gradients: dict[str, Tensor | None]
    before: dict[str, Observed]
    after: dict[str, Observed]
    is_random: bool


def verify_whole_call(
    model: nn.Module, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tolerance: Tolerance, gradients: bool
) -> VerificationReport:
    """Compare outputs, gradients, and everything that the call changes, from the reset state.

    States of registered neurons are not compared: a net does not write them.

    Args:
        model: the model that was converted with `takes="sequence"`.
        net: the net.
        args, kwargs: the arguments of the call.
        tolerance: largest allowed difference.
        gradients: whether to compare the gradients of a random linear functional of the outputs.

    Raises:
        VerificationError: SNNFX401, 403, 404 or 410, a value differs; SNNFX411, the random numbers of net and model
            cannot be the same.
    """
    calls = _Calls(model, net, args, kwargs, gradients)
    expected, actual = calls.of(model), calls.of(net)
    notes: list[str] = []
    if expected.is_random or actual.is_random:
        calls.draws = SharedDraws(model, 1, whole=True)
        expected, actual = calls.of(model), calls.of(net)
        notes.append(f"net and model drew the same random numbers: {calls.draws.description()}")
    comparisons = []
    for comparison in _compared(calls, actual, expected, tolerance, notes):
        if comparison.failed:
            what = f"the {comparison.kind} `{comparison.name}` differs from the model's own call"
            raise VerificationError(_CODES[comparison.kind], what, why=f"{comparison.detail}.")
        comparisons.append(comparison)
    first = next(x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
    steps = first.shape[net.options.time_dim if net.options.step_mode == "m" else 0]
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    return VerificationReport(
        steps, net.training, ", ".join(sorted(dtypes)), "the model's own call", tuple(comparisons), tuple(notes)
    )


def _compared(
    calls: _Calls, actual: _Call, expected: _Call, tolerance: Tolerance, notes: list[str]
) -> Iterator[Comparison]:
    for name in actual.outputs | expected.outputs:
        yield compare("output", name, actual.outputs.get(name), expected.outputs.get(name), tolerance)
    registered, lost = registered_attributes(calls.model), []
    changed = {
        *changed_names(expected.before, expected.after),
        *changed_names(actual.before, actual.after),
    }
    for name, entry in {**expected.before, **expected.after}.items():
        if (entry.owner, entry.attribute) in registered or (entry.kind != "buffer" and name not in changed):
            continue
        wanted, found = expected.after.get(name), actual.after.get(name)
        if wanted is None or found is None:
            detail = "only the model has it" if found is None else "only the net has it"
            result = Comparison(entry.kind, name, failed=wanted is not found, detail=detail)
        else:
            result = compare(entry.kind, name, found.value, wanted.value, tolerance)
        if result.failed and entry.kind == "attribute" and not calls.depends_on(entry.owner, entry.attribute):
            lost.append(f"`{name}`")
            continue
        yield result
    if lost:
        notes.append(f"the net does not write {', '.join(lost[:5])}, which no call reads before writing it")
    for name, gradient in expected.gradients.items():
        a, b = (torch.zeros(()) if g is None else g for g in (actual.gradients.get(name), gradient))
        found, wanted = torch.broadcast_tensors(a, b)
        yield compare("gradient", name, found, wanted, tolerance)


class _Calls:
    """Calls of net and model under the same conditions."""

    def __init__(
        self, model: nn.Module, net: Any, args: tuple[Any, ...], kwargs: dict[str, Any], gradients: bool
    ) -> None:
        self.model, self.net, self.args, self.kwargs, self.gradients = model, net, args, kwargs, gradients
        self.draws: SharedDraws | None = None

    @contextmanager
    def _drawing(self, module: nn.Module) -> Iterator[None]:
        if self.draws is None:
            yield
            return
        with self.draws.in_net() if module is self.net else self.draws.in_steps(self.model, self.net.options.entry):
            yield

    def _call_model(self) -> dict[str, Any]:
        args, kwargs = self._fresh()
        # A call of the module, unlike one of its method, runs its hooks.
        call = self.model if self.net.options.entry == "forward" else getattr(self.model, self.net.options.entry)
        return named_leaves(call(*args, **kwargs), "output")

    def _fresh(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def fresh(x: Tensor) -> Tensor:
            return x.detach().clone().requires_grad_(self.gradients and x.is_floating_point())

        return pytree.tree_map_only(Tensor, fresh, (self.args, self.kwargs))  # type: ignore[no-any-return]

    def of(self, module: nn.Module) -> _Call:
        """One call of net or model."""
        with isolated(self.model, self.net):
            generators = rng_state()
            args, kwargs = self._fresh()
            reset_net(module)
            before = observe(self.model)
            with self._drawing(module):
                is_method = module is self.model and self.net.options.entry != "forward"
                call = getattr(module, self.net.options.entry) if is_method else module
                outputs = named_leaves(call(*args, **kwargs), "output")
                after = observe(self.model)
                inputs = {n: x for n, x in named_leaves((args, kwargs), "input").items() if isinstance(x, Tensor)}
                gradients = self._gradients(outputs, inputs)
            is_random = rng_state() != generators
            outputs = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), outputs)
            return _Call(outputs, gradients, before, after, is_random)

    def _gradients(self, outputs: dict[str, Any], inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
        wanted = {n: p for n, p in (*inputs.items(), *self.model.named_parameters()) if p.requires_grad}
        differentiable = [y for y in outputs.values() if isinstance(y, Tensor) and y.requires_grad]
        if not (self.gradients and differentiable and wanted):
            return dict.fromkeys(wanted)
        generator = torch.Generator().manual_seed(0)
        weights = [torch.rand(y.shape, generator=generator).to(y) for y in differentiable]
        total = torch.stack([(w * y).sum() for w, y in zip(weights, differentiable, strict=True)]).sum()
        return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), allow_unused=True), strict=True))

    def depends_on(self, owner: nn.Module, attribute: str) -> bool:
        """Whether a call depends on an attribute: from its final value, it gives something else."""
        with isolated(self.model, self.net), torch.no_grad(), self._drawing(self.model):
            reset_net(self.model)
            self._call_model()
            has_final, final = attribute in owner.__dict__, owner.__dict__.get(attribute)
            final = StructuralCopy(tensor=lambda x: x.detach().clone()).of(final)
        if not has_final:
            return True
        results = []
        for starts_with_final in (False, True):
            with isolated(self.model, self.net), torch.no_grad(), self._drawing(self.model):
                reset_net(self.model)
                if starts_with_final:
                    owner.__dict__[attribute] = final
                outputs = self._call_model()
                results.append(outputs | {name: entry.value for name, entry in observe(self.model).items()})
        a, b = results
        return a.keys() != b.keys() or not all(is_same(a[name], b[name]) for name in a)
