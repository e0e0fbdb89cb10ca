"""Run a net and its reference from the reset state, observe what each leaves behind, and restore everything."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snnfx.errors import VerificationError
from snnfx.inspect.verify.comparison import named_leaves
from snnfx.inspect.verify.divergence import neurons_watched
from snnfx.inspect.verify.observed_contents import Observed, is_same, observe
from snnfx.inspect.verify.oracle import folded_forward, replay_forward, step_forward
from snnfx.inspect.verify.program_lookup import called_in, is_within, normalized_in, value_at
from snnfx.inspect.verify.sequence_inputs import SequenceInputs
from snnfx.inspect.verify.shared_draws import SharedDraws
from snnfx.inspect.verify.stepped_attributes import stepped_attributes
from snnfx.ops.sequence_functions import reduce_over_time
from snnfx.sandbox.attribute_values import AttributeValues
from snnfx.sandbox.isolation import isolated
from snnfx.sandbox.rng_states import rng_state
from snnfx.sandbox.tensor_snapshot import TensorSnapshot
from snnfx.sandbox.torch_internals import BatchNormBase, pytree
from snnfx.state.carry import CarriedArgument, SlotName, flatten_state, output_at, outputs_without, paths_of
from snnfx.state.registry import named_stateful, reset_net, storage_of

__all__ = ["Run", "Runs", "undisturbed"]


@dataclass
class Run:
    """Results of one run: `outputs` `[T, *]` by name, gradients, and the contents of the modules before and after."""

    outputs: dict[str, Any]
    states: dict[str, Any]
    gradients: dict[str, Tensor | None]
    before: dict[str, Observed]
    after: dict[str, Observed]
    drew_random_numbers: bool
    states_before: dict[str, Any] = field(default_factory=dict)
    """Registered states of the model before the first step."""
    stored_states: dict[str, int] = field(default_factory=dict)
    """The identity of the tensor that the model stores as each state."""
    spiking: dict[str, bool] = field(default_factory=dict)
    """For each neuron that was called, whether its output was ever different from zero."""


@contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Restore everything that runs of modules can change: contents, parameters, gradients, flags, generators."""
    snapshots = [TensorSnapshot(p) for p in {p: None for module in modules for p in module.parameters()}]
    with isolated(*modules):
        try:
            yield
        finally:
            for snapshot in snapshots:
                snapshot.restore()


class Runs:
    """Runs of a net and of its reference under the same conditions.

    Args:
        model: the single-step model.
        net: the net.
        inputs: the arguments of the net.
        first: initial values of carried arguments.
        gradients: whether to compute gradients.
        one_call: whether the reference is plain stepping, whatever the net says about BatchNorm.
        draws: the random numbers for both sides; None: both start from the same state of the generators.
    """

    def __init__(
        self,
        model: nn.Module,
        net: Any,
        inputs: SequenceInputs,
        first: dict[str, Any],
        gradients: bool,
        one_call: bool = False,
        draws: SharedDraws | None = None,
    ) -> None:
        self.model, self.net, self.inputs, self.gradients, self.draws = model, net, inputs, gradients, draws
        self.first, self.one_call = first, one_call
        self._in_one_thread = False
        self._is_source = getattr(net, "source", model) is model
        self._first_attributes: AttributeValues = getattr(net, "first_attributes", None) or AttributeValues.of(model)
        self._stepped: list[tuple[str, str]] | None = None
        source = getattr(net, "source", None)
        self.tree: nn.Module = source if isinstance(source, nn.Module) else net
        self.carry = paths_of(getattr(net.options, "carry", None))
        self.arguments: list[CarriedArgument] = getattr(getattr(net, "program", None), "carried", None) or [
            CarriedArgument(name, path, SlotName(name)) for name, path in self.carry.items()
        ]
        self.plan = self._planned()
        self.reduce: str | None = getattr(net.options, "reduce", None)
        self.folded: set[str] = set()
        self.once: set[str] = set()
        if net.options.batch_norm == "fold" and not one_call:
            kinds = {region.kind for region in self.plan.regions}
            once, per_step = called_in(self.plan, {"once"}), called_in(self.plan, kinds - {"once", "fold"})
            self.folded = {
                name
                for name, module in model.named_modules()
                if isinstance(module, BatchNormBase) and module.training and not is_within(name, per_step)
            } - normalized_in(self.plan, kinds - {"once", "fold"})
            self.once = {name for name in self.folded if is_within(name, once)}

    def _planned(self) -> Any:
        """The net planned for these inputs: for other ranks or batch sizes, the net is planned again."""
        planned_for = getattr(self.net, "planned_for", None)
        if planned_for is None:
            return self.net
        args, kwargs = self.inputs.whole()
        return planned_for(*args, **kwargs, **self.first_arguments())

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """Restore everything that a run changes."""
        roots = list(dict.fromkeys([self.model, self.tree, self.net]))
        with undisturbed(*roots):
            yield

    @contextmanager
    def _drawing(self, of_net: bool) -> Iterator[None]:
        with ExitStack() as stack:
            if self.draws is not None and of_net:
                stack.enter_context(self.draws.in_net())
            elif self.draws is not None:
                stack.enter_context(self.draws.in_steps(self.model, self.net.options.entry))
            yield

    # -- the net ----------------------------------------------------------------------------------------------------

    def run_net(self) -> Run:
        """Outputs, states and gradients of `net.run`, and the contents of its modules."""
        with self.isolated():
            generators, before = rng_state(), observe(self.tree)
            inputs = self.inputs.fresh()
            args, kwargs = inputs.whole()
            with self._drawing(of_net=True):
                y_seq, states = self.net.run(*args, **self.first_state(), **kwargs)
                outputs = self._outputs_of_net(y_seq)
                states = {name.lstrip("."): value for name, value in states.items()}
                gradients = self._gradients(outputs, inputs, self.tree)
            return self._result(self.tree, outputs, states, gradients, before, rng_state() != generators)

    def call_net(self) -> Run:
        """A plain call of the net without gradients, for which nets may take another path."""
        with self.isolated(), torch.no_grad(), self._drawing(of_net=True):
            getattr(self.net, "reset_carried_state", lambda: None)()
            generators, before = rng_state(), observe(self.tree)
            args, kwargs = self.inputs.fresh().whole()
            y_seq = self.net(*args, **kwargs, **self.first_arguments())
            if hasattr(self.net, "program"):
                y_seq = outputs_without(y_seq, list(self.carry.values()))
            outputs = self._outputs_of_net(y_seq)
            return self._result(self.tree, outputs, {}, {}, before, rng_state() != generators)

    def continued_net(self) -> dict[str, Any]:
        """The outputs of a second run of the net on the same inputs, from the final state of the first run."""
        with self.isolated(), torch.no_grad():
            args, kwargs = self.inputs.fresh().whole()
            with self._drawing(of_net=True):
                state = self.net.run(*args, **self.first_state(), **kwargs)[1]
            args, kwargs = self.inputs.fresh().whole()
            with self._drawing(of_net=True):
                return self._outputs_of_net(self.net.run(*args, **kwargs, state=state)[0])

    def record_net(self, names: list[str]) -> dict[str, Any]:
        """The recordings of `net.run` for these names."""
        with self.isolated(), torch.no_grad(), self._drawing(of_net=True):
            args, kwargs = self.inputs.fresh().whole()
            record: dict[str, Any] = self.net.run(*args, **self.first_state(), **kwargs, record=tuple(names))[2]
            return record

    def first_arguments(self) -> dict[str, Any]:
        """The initial values of carried arguments, in new containers."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self.first)  # type: ignore[no-any-return]

    def first_state(self) -> dict[str, Any]:
        """The initial values of carried arguments as the argument `state` of `net.run`."""
        state: dict[str, Any] = {}
        for argument in self.arguments:
            if self.first.get(argument.name) is not None:
                state |= flatten_state(argument, self.first_arguments()[argument.name])
        return {"state": state} if state else {}

    def _outputs_of_net(self, y_seq: Any) -> dict[str, Any]:
        outputs, dim = named_leaves(y_seq, "output"), self.inputs.output_dim
        for name, leaf in outputs.items():
            if isinstance(leaf, Tensor) and self.reduce is not None:
                outputs[name] = leaf.unsqueeze(0)
            elif isinstance(leaf, Tensor):
                if not -leaf.ndim <= dim < leaf.ndim or leaf.shape[dim] != self.inputs.steps:
                    why = f"its shape is {list(leaf.shape)}, and dimension {dim} should be T = {self.inputs.steps}."
                    raise VerificationError("SNNFX401", f"`{name}` of the net has no time dimension", why=why)
                outputs[name] = leaf.movedim(dim, 0)
        return outputs

    # -- the reference ------------------------------------------------------------------------------------------------

    def run_model(self, output_names: Any = None, state_names: Iterable[str] = ()) -> Run:
        """Outputs, states and gradients of the reference, and the contents of the model.

        Args:
            output_names: names of the outputs of the net, which may leave carried values out; None: all outputs.
            state_names: names of the states of the net.
        """
        try:
            return self._run_model(output_names, state_names)
        except RuntimeError as error:
            if "modified by an inplace operation" not in str(error):
                raise
        # The steps change a parameter that autograd saved: each step has the gradient at its own value.
        self._in_one_thread = True  # where this context is active
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            return self._run_model(output_names, state_names)

    def _run_model(self, output_names: Any, state_names: Iterable[str]) -> Run:
        with self.isolated():
            self.reset_model()
            generators, before, start = rng_state(), observe(self.model), self._registered_states()
            start = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), start)
            inputs = self.inputs.fresh()
            with neurons_watched(self.model) as spiking:
                steps = self.step_model(inputs)
            outputs = self.outputs_of_model(steps, output_names)
            states = self._states_of_model(steps[-1], state_names)
            stored = {name: id(value) for name, value in states.items() if isinstance(value, Tensor)}
            gradients = self._gradients(outputs, inputs, self.model)
            run = self._result(self.model, outputs, states, gradients, before, rng_state() != generators)
            return replace(run, states_before=start, stored_states=stored, spiking=spiking)

    def trace_model(self) -> None:
        """Run the reference without gradients, for observers of its modules."""
        with self.isolated(), torch.no_grad():
            self.reset_model()
            self.step_model(self.inputs.fresh())

    def reset_model(self) -> None:
        """Put the model into the state from which each call of the net starts."""
        if self.model.training != self.net.training:
            # The net shares the model's layers but not its containers, which must follow the net's mode as well.
            shared = set(self.net.modules())
            for module in self.model.modules():
                if module not in shared:
                    module.training = self.net.training
        reset_net(self.model)
        for owner, attribute in self._stepped_attributes():
            self._first_attributes.restore(self.model, owner, attribute)

    def _stepped_attributes(self) -> list[tuple[str, str]]:
        if self._stepped is None:
            self._stepped = []
            with self.isolated(), torch.no_grad():
                step = partial(self.step_model, self.inputs.fresh())
                self._stepped = stepped_attributes(self.model, self._first_attributes, self._is_source, step)
        return self._stepped

    def step_model(self, inputs: SequenceInputs) -> list[Any]:
        """The model's return value at each step, from its current state."""
        pairs = [inputs.of_step(t) for t in range(inputs.steps)]
        pairs[0] = pairs[0][0], {**pairs[0][1], **self.first_arguments()}
        steps, keywords, entry = [args for args, _ in pairs], [kwargs for _, kwargs in pairs], self.net.options.entry
        with self._drawing(of_net=False):
            if not self.folded:
                return step_forward(self.model, steps, entry, kwargs=keywords, carry=self.carry)
            forward = replay_forward if self._in_one_thread else folded_forward
            return forward(
                self.model,
                steps,
                lambda name, module: name in self.folded,
                entry,
                kwargs=keywords,
                carry=self.carry,
                is_once=lambda name, module: name in self.once,
            )

    def _registered_states(self) -> dict[str, Any]:
        """All states of registered modules of the model by qualified name, e.g. "lif1.v"."""
        return {
            f"{name}.{slot}" if name else slot: value
            for name, module, adapter in named_stateful(self.model)
            for slot, value in zip(adapter.names(module), adapter.read(module), strict=True)
        }

    def registered_storage(self) -> set[tuple[nn.Module, str]]:
        """The attributes in which registered classes store their states."""
        return storage_of(self.model)

    def _states_of_model(self, last_outputs: Any, names: Iterable[str]) -> dict[str, Any]:
        """The states after the last step: registered, carried, and attributes that the net calls states."""
        states = self._registered_states()
        for argument in self.arguments:
            states |= flatten_state(argument, output_at(last_outputs, argument.path))
        for name in set(names) - states.keys():
            for value in value_at(self.model, name):
                states[name] = value
        return states

    def outputs_of_model(self, outputs_of_steps: list[Any], names: Any) -> dict[str, Any]:
        """The outputs of all steps `[T, *]` by name.

        Args:
            outputs_of_steps: the return value of the model at each step.
            names: names of the outputs of the net; None: all outputs.
        """
        steps = [named_leaves(y, "output") for y in outputs_of_steps]
        if self.carry and names is not None and names != steps[0].keys():
            # A net may leave carried values out of its outputs; a single output is then not in a tuple.
            paths = list(self.carry.values())
            steps = [named_leaves(outputs_without(y, paths), "output") for y in outputs_of_steps]
        if any(step.keys() != steps[0].keys() for step in steps):
            raise VerificationError(
                "SNNFX401",
                "the outputs of the model cannot be stacked over time",
                why="their nesting changes between time steps.",
                hint="Return outputs with the same nesting at every step.",
            )
        over_time = {name: _over_time(name, [step[name] for step in steps]) for name in steps[0]}
        if self.reduce is None:
            return over_time
        how = self.reduce
        return {n: reduce_over_time(y, how).unsqueeze(0) if isinstance(y, Tensor) else y for n, y in over_time.items()}

    # -- both ---------------------------------------------------------------------------------------------------------

    def _result(
        self,
        tree: nn.Module,
        outputs: dict[str, Any],
        states: dict[str, Any],
        gradients: dict[str, Tensor | None],
        before: dict[str, Observed],
        is_random: bool,
    ) -> Run:
        after = observe(tree)
        # Copies: a state may be a buffer, which is restored afterwards.
        outputs, states = pytree.tree_map_only(Tensor, lambda x: x.detach().clone(), (outputs, states))
        return Run(outputs, states, gradients, before, after, is_random)

    def _gradients(
        self, outputs: Mapping[str, Any], inputs: SequenceInputs, module: nn.Module
    ) -> dict[str, Tensor | None]:
        """Gradients of a random linear functional of the outputs, the same for net and reference."""
        parts = []
        for name, y in outputs.items():
            if isinstance(y, Tensor) and y.requires_grad:
                # Seeded by the name, so that the weights do not depend on the other outputs with gradients.
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
                parts.append(torch.real(y * weights).sum())
        variables: dict[str, Tensor] = {
            f"parameter `{name}`": p for name, p in module.named_parameters() if p.requires_grad
        }
        leaves = zip(inputs.names, inputs.leaves, strict=True)
        variables |= {f"`{name}`": x for name, x in leaves if isinstance(x, Tensor) and x.requires_grad}
        if not self.gradients or not variables:
            return {}
        if not parts:
            return dict.fromkeys(variables)
        gradients = torch.autograd.grad(parts, list(variables.values()), allow_unused=True)
        return dict(zip(variables, gradients, strict=True))


def _over_time(name: str, values: list[Any]) -> Any:
    """Stack the values of one output over time: tensors `[T, *]`; other values once if they are constant.

    Numbers that change give a tensor `[T]`.
    """
    if all(isinstance(value, Tensor) for value in values):
        if any(value.shape != values[0].shape or value.dtype != values[0].dtype for value in values):
            raise VerificationError(
                "SNNFX401",
                f"`{name}` of the model cannot be stacked over time",
                why="its shape or dtype changes between time steps.",
                hint="Return a tensor of the same shape and dtype at every step.",
            )
        return torch.stack(values)
    if all(is_same(value, values[0]) for value in values):
        return values[0]
    kinds = {*map(type, values)}
    return torch.tensor(values, dtype=torch.float64 if kinds == {float} else None) if kinds in _NUMBERS else values


_NUMBERS = ({bool}, {int}, {float})
