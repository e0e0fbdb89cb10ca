"""`Net`: the converted model, a torch.fx.GraphModule that runs whole sequences.

The net shares the children, parameters and buffers of the model it came from, so an optimizer of the model goes on
working and the keys of the state_dict are the model's. Its graph is functional: `(inputs, state, time) -> (outputs,
final state)`; `forward`, `run` and the chunked form around it are ordinary Python.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.graph_module import _forward_from_src
from torch.utils import _pytree as pytree

from snnfx.carry import flatten_state, outputs_without, rebuild_state, split_arguments, with_output_at
from snnfx.errors import InputError, warn_once
from snnfx.functional import chunk_multi_step_forward
from snnfx.options import ConvertOptions, time_dims_of_leaves
from snnfx.passes.base import PassRecord
from snnfx.passes.chunk import ChunkPlan, plan_chunks
from snnfx.passes.emit import Emitted, emit_multi_step, emit_plain, emit_single_step
from snnfx.program import SELF_TARGET, Region, StepProgram
from snnfx.regions import combine_reductions
from snnfx.serialize import pack_program, unpack_program

__all__ = ["ConvertOptions", "Net"]

_REGIONS = "snnfx_regions"
_CONSTANTS = "snnfx_constants"


class Net(fx.GraphModule):
    """A converted single-step model; made by `snnfx.convert`.

    Call it with whole sequences: `y_seq = net(x_seq)` starts from the reset state every time. `run` takes and returns
    the state. `graph`, `code`, `regions` and `program` show what it does; `history` how it came about.
    """

    options: ConvertOptions
    history: list[PassRecord]
    _programs: dict[bool, StepProgram]
    _replan: Callable[..., Net] | None
    _time_dims: list[int | None]
    _output_time_dim: int

    def __init__(
        self,
        source: nn.Module,
        programs: dict[bool, StepProgram],
        options: ConvertOptions,
        history: Sequence[PassRecord] = (),
        replan: Callable[..., Net] | None = None,
    ) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(source).__name__)
        self.__dict__.update(
            _parameters=source._parameters,
            _buffers=source._buffers,
            _non_persistent_buffers_set=source._non_persistent_buffers_set,
            _modules=OrderedDict(source._modules),
        )
        self.__dict__[SELF_TARGET] = source
        # Not by assignment: the model may have children of these names.
        self.__dict__.update(
            options=options,
            history=list(history),
            training=source.training,
            _programs=programs,
            _replan=replan,
            _time_dims=time_dims_of_leaves(options.time_dim, programs[True]),
            _output_time_dim=options.time_dim if isinstance(options.time_dim, int) else 0,
        )
        self._carried: dict[str, Any] | None = None
        self._nets_for_shapes: dict[Any, Net] = {}
        self._recordings: dict[Any, Callable[..., Any]] = {}
        self._chunk_plans: dict[Any, ChunkPlan] = {}
        constants = {
            name: value
            for p in programs.values()
            for q in (p, p.first_step)
            if q
            for name, value in q.constants.items()
        }
        self._modules[_CONSTANTS] = _hold_constants(constants)
        self._modules[_REGIONS] = nn.Module()
        self._emit_all()

    # -- building -------------------------------------------------------------------------------------------------

    def _emit_all(self) -> None:
        same = self._programs[True] is self._programs[False]
        self._graphs: dict[bool, fx.Graph] = {}
        self._runners: dict[tuple[bool, str], Callable[..., Any]] = {}
        for mode in (True, False):
            if mode is False and same:
                self._graphs[False] = self._graphs[True]
                for (_, part), runner in list(self._runners.items()):
                    self._runners[False, part] = runner
                continue
            program = self._programs[mode]
            multi_step = self.options.step_mode == "m"
            label = "both_modes" if same else ("in_training" if mode else "in_evaluation")
            container = f"{_REGIONS}.{label}"
            if multi_step:
                emitted = emit_multi_step(program, container, self._target_name, reduce=self.options.reduce)
            else:
                emitted = emit_single_step(program, container, self._target_name)
            self._graphs[mode] = emitted.graph
            self._runners[mode, "main"] = self._compile(emitted.graph)
            is_plain = program.first_step is None and not program.carried and _is_plain_structure(program.output_spec)
            if multi_step and is_plain:
                plain = emit_plain(
                    program,
                    container,
                    self._target_name,
                    emitted.regions,
                    self._tensor_dims(),
                    self._output_time_dim,
                    self.options.reduce,
                )
                self._graphs[mode] = plain.graph
                self._runners[mode, "plain"] = self._compile(plain.graph)
                emitted.regions.update(plain.regions)
            self._install(emitted, label)
            if program.first_step is not None:
                first = emit_single_step(program.first_step, f"{_REGIONS}.{label}_first", self._target_name)
                self._install(first, f"{label}_first")
                self._runners[mode, "first"] = self._compile(first.graph)
        self._graph = self._graphs[self.training]
        self._graph.owning_module = self
        self.recompile()

    def _install(self, emitted: Emitted, label: str) -> fx.Graph:
        container = nn.Module()
        for name, region in emitted.regions.items():
            container._modules[name] = region
        self._modules[_REGIONS]._modules[label] = container  # type: ignore[union-attr]
        return emitted.graph

    def _compile(self, graph: fx.Graph) -> Callable[..., Any]:
        code = graph.python_code(root_module="self")
        return _forward_from_src(code.src, code.globals, {})

    def _target_name(self, target: str) -> str:
        """Where the net keeps what a target of the program names."""
        if target == SELF_TARGET:
            return target
        if any(target in p.constants for p in self._all_programs()):
            return f"{_CONSTANTS}.{target}"
        # A child called like a method or an attribute of ours (`run`, `options`, ...) is reached through the model.
        first = target.partition(".")[0]
        return f"{SELF_TARGET}.{target}" if hasattr(type(self), first) or first in self.__dict__ else target

    def _all_programs(self) -> list[StepProgram]:
        return [q for p in self._programs.values() for q in (p, p.first_step) if q is not None]

    def recompile(self) -> Any:
        """Regenerate the code of the current graph; `forward` stays the driver around it."""
        code = super().recompile()

        def forward(self: Net, *args: Any, T: int | None = None, **kwargs: Any) -> Any:
            return _forward(self, args, kwargs, T)

        # torch.export matches dynamic_shapes with the names of the arguments.
        forward.__signature__ = self._signature()  # type: ignore[attr-defined]
        forward.__doc__ = _forward.__doc__
        type(self).forward = forward
        return code

    def _signature(self) -> inspect.Signature:
        """The arguments of the captured step, by name, and `T`."""
        me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        T = inspect.Parameter("T", inspect.Parameter.KEYWORD_ONLY, default=None)
        programs = self.__dict__.get("_programs")
        if programs is None:
            return inspect.Signature([me, T])
        numbered = pytree.tree_unflatten(list(range(len(programs[True].input_leaves))), programs[True].input_spec)
        arguments = [*numbered[0], *numbered[1].values()]
        leaves = programs[True].input_leaves
        names = [leaves[min(pytree.tree_leaves(a), default=0)].name.partition(".")[0] for a in arguments]
        if len(set(names)) != len(names) or not all(n.isidentifier() and n not in ("self", "T") for n in names):
            many = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
            return inspect.Signature([me, many, T, inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)])
        positional = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        positional += [
            inspect.Parameter(c.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            for c in programs[True].carried
        ]
        return inspect.Signature([me, *positional, T])

    @property
    def graph(self) -> fx.Graph:
        """The graph of the current mode (training or evaluation)."""
        graphs = self.__dict__.get("_graphs")
        return graphs[self.training] if graphs else self._graph

    @graph.setter
    def graph(self, graph: fx.Graph) -> None:
        """Replace the graph of the current mode (and of both, while they are one)."""
        graphs = self.__dict__.get("_graphs")
        self._graph = graph
        graph.owning_module = self
        if graphs:
            runner = self._compile(graph)
            for mode in (True, False):
                if mode == self.training or self._programs[True] is self._programs[False]:
                    graphs[mode] = graph
                    self._runners[mode, "plain" if (mode, "plain") in self._runners else "main"] = runner
        self.recompile()

    @property
    def program(self) -> StepProgram:
        """The step program of the current mode."""
        return self._programs[self.training]

    @property
    def regions(self) -> list[Region]:
        """The regions of the current mode, in the order in which they run."""
        return self.program.regions

    @property
    def source(self) -> nn.Module:
        """The single-step model that the net was converted from; its modules are the net's."""
        return self.__dict__[SELF_TARGET]  # type: ignore[no-any-return]

    # -- running --------------------------------------------------------------------------------------------------

    def run(
        self,
        *args: Any,
        state: dict[str, Any] | None = None,
        record: Sequence[str] = (),
        T: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a sequence with explicit state; nothing is kept in the net.

        Args:
            *args: the inputs, as for calling the net.
            state: `{"lif1.v": Tensor, ...}`, the state before the first step; None: the reset state.
            record: qualified names of modules called in a step (their output) or of slots (their value after each
                step); the values over time are returned.
            T: the number of time steps, when no input carries time.
            **kwargs: inputs by name.

        Returns:
            `(y_seq, final state)`, or `(y_seq, final state, {name: [T, N, *]})` with `record`. Outputs that are
            carried (see `snnfx.convert`) are in the state, not in `y_seq`.

        Raises:
            InputError: the inputs do not fit (SNNFX301, 303, 305 to 307, 310), the state has other slots (SNNFX308),
                or there is nothing of a name in `record` (SNNFX311).

        Example:
            >>> import torch, snnfx
            >>> net = snnfx.convert(torch.nn.Sequential(torch.nn.Linear(3, 2), snnfx.neuron.LIFNode()))
            >>> x_seq = torch.rand(6, 4, 3)
            >>> first, state = net.run(x_seq[:2])
            >>> second, state, records = net.run(x_seq[2:], state=state, record=("1.v",))
            >>> torch.equal(torch.cat([first, second]), net(x_seq)), records["1.v"].shape
            (True, torch.Size([4, 4, 2]))
        """
        names = (record,) if isinstance(record, str) else tuple(record)
        outputs, state, records = self._execute(args, kwargs, state, names, T)
        outputs = outputs_without(outputs, [c.path for c in self.program.carried])
        return (outputs, state, dict(zip(names, records, strict=True))) if names else (outputs, state)

    def _execute(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: dict[str, Any] | None,
        record: tuple[str, ...],
        T: int | None,
    ) -> tuple[Any, dict[str, Any], tuple[Any, ...]]:
        given: dict[str, Any] = {}
        inputs: tuple[tuple[Any, ...], dict[str, Any]] = (args, kwargs)
        if self.program.carried:
            *inputs, given = self.split_carried(args, kwargs)  # type: ignore[assignment]
        leaves = self._bind(*inputs)
        if self.options.step_mode == "s":
            self._check_state(state)
            state = self._first_state(state, given)
            flat, state, recorded = self._single(leaves, state, record)
            return pytree.tree_unflatten(list(flat), self.program.output_spec), state, recorded
        leaves, T = self._time_first(leaves, T)
        other = self._other_net(leaves, given)
        if other is not None:
            return other._execute(args, kwargs, state, record, T)
        self._check_state(state)
        state = self._first_state(state, given)
        k = None if record else self._chunk_length(leaves, T)
        if k is not None and k < T:
            flat, state = self._in_chunks(k, leaves, state, T)
            records: tuple[Any, ...] = ()
        else:
            flat, state, records = self._steps(leaves, state, record, T)
        outputs = [self._time_back(y) for y in flat]
        return pytree.tree_unflatten(outputs, self.program.output_spec), state, records

    def _steps(
        self, leaves: list[Tensor], state: dict[str, Any] | None, record: tuple[str, ...], T: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        runner = self._recorder(record) if record else self._runners[self.training, "main"]
        if state is None and (self.training, "first") in self._runners:
            return self._first_then_rest(runner, leaves, record, T)
        time = torch.arange(T, device=leaves[0].device) if leaves else torch.arange(T)
        return runner(self, *leaves, state, time)  # type: ignore[no-any-return]

    def _first_then_rest(
        self, runner: Callable[..., Any], leaves: list[Tensor], record: tuple[str, ...], T: int
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        """The first step does something else than the others: it is run on its own."""
        varying = self._varying_leaves()
        now = [x[0] if v else x for x, v in zip(leaves, varying, strict=True)]
        first, state, _ = self._runners[self.training, "first"](self, *now, None, None)
        if record:
            raise InputError(
                "SNNFX311",
                "record= needs the state before the first step here",
                why="the first step of this model does something else than the others.",
                hint="Run one step first: _, state = net.run(x_seq[:1]); then record the rest with state=state.",
            )
        reduce = self.options.reduce
        if reduce is None:
            first = tuple(y.unsqueeze(0) if isinstance(y, Tensor) else y for y in first)
        if T == 1:
            return first, state, ()
        later = [x[1:] if v else x for x, v in zip(leaves, varying, strict=True)]
        time = torch.arange(1, T, device=leaves[0].device)
        rest, state, _ = runner(self, *later, state, time)
        if reduce is not None:
            return combine_reductions([(1, first), (T - 1, rest)], reduce), state, ()
        joined = tuple(torch.cat((a, b)) if isinstance(a, Tensor) else a for a, b in zip(first, rest, strict=True))
        return joined, state, ()

    def _single(
        self, leaves: list[Tensor], state: dict[str, Any] | None, record: tuple[str, ...]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
        if record:
            raise InputError("SNNFX311", "record= is for sequences", hint='Convert with step_mode="m".')
        part = "first" if state is None and (self.training, "first") in self._runners else "main"
        return self._runners[self.training, part](self, *leaves, state, None)  # type: ignore[no-any-return]

    def _in_chunks(
        self, k: int, leaves: list[Tensor], state: dict[str, Any] | None, T: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        varying = self._varying_leaves()
        sequences = tuple(x for x, v in zip(leaves, varying, strict=True) if v) or (torch.arange(T),)

        def one_chunk(*chunk_and_state: Any) -> Any:
            *chunk, state = chunk_and_state
            parts = iter(chunk)
            inputs = [next(parts) if v else x for x, v in zip(leaves, varying, strict=True)]
            flat, state, _ = self._steps(inputs, state, (), chunk[0].shape[0])
            return flat, state

        if self.options.reduce is None:
            return chunk_multi_step_forward(k, sequences, one_chunk, state=state)  # type: ignore[no-any-return]
        parts: list[tuple[int, tuple[Any, ...]]] = []
        for start in range(0, T, k):
            chunk = [x[start : start + k] for x in sequences]
            flat, state = one_chunk(*chunk, state)
            parts.append((chunk[0].shape[0], flat))
        return combine_reductions(parts, self.options.reduce), state  # type: ignore[return-value]

    # -- arguments ------------------------------------------------------------------------------------------------

    def split_carried(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
        """The arguments of a call as `(args, kwargs, those that are carried)`."""
        parameters = list(inspect.signature(getattr(type(self.source), self.options.entry)).parameters.values())[1:]
        return split_arguments(parameters, [c.name for c in self.program.carried], args, kwargs)

    def _first_state(self, state: dict[str, Any] | None, given: dict[str, Any]) -> dict[str, Any] | None:
        """The state before the first step, with what the caller gives as carried arguments."""
        for argument in self.program.carried:
            value = given.get(argument.name)
            if value is not None:
                state = {**(state or {}), **flatten_state(argument, value)}
            elif argument.required and not set(argument.slot_names()) <= set(state or {}):
                raise InputError(
                    "SNNFX308",
                    f"the first value of `{argument.name}` is missing",
                    why="it was given in example_inputs, and has no default.",
                    hint=f"Pass it as the model takes it: net(x_seq, {argument.name}=...).",
                )
        alone = self.options.step_mode == "s" or self.program.first_step is not None
        missing = {slot.name for slot in self.program.slots} - set(state or {})
        if state is not None and missing and alone:
            raise InputError(
                "SNNFX308",
                f"only a part of the state is given, {', '.join(sorted(missing))} is missing",
                why="the first step of this model does something else than the others, or is run on its own.",
                hint="Give all of it or nothing; net.run returns all of it.",
            )
        return state

    def final_state_in(self, outputs: Any, state: dict[str, Any]) -> Any:
        """What the model returns: outputs with the final values of what is carried in their places."""
        for argument in self.program.carried:
            outputs = with_output_at(outputs, argument.path, rebuild_state(argument, state))
        return outputs

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The tensors for the placeholders, after checking that the arguments are nested as they were at capture."""
        program = self.program
        flat, spec = pytree.tree_flatten((args, kwargs))
        if spec != program.input_spec:
            flat = self._bind_by_name(args, kwargs)
        tensors: list[Tensor] = []
        for leaf, value in zip(program.input_leaves, flat, strict=True):
            if leaf.placeholder is None:
                if value is not leaf.constant and value != leaf.constant:
                    raise InputError(
                        "SNNFX307",
                        f"the argument `{leaf.name}` is {value!r}, but the step was captured with {leaf.constant!r}",
                        why="values that are no tensors are fixed at conversion.",
                        hint="Convert again with this value in example_inputs.",
                    )
            elif not isinstance(value, Tensor):
                raise InputError("SNNFX305", f"the input `{leaf.name}` is a {type(value).__name__}, not a tensor")
            else:
                tensors.append(value)
        return tensors

    def _bind_by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Arguments that are given by keyword where they were captured by position, or the other way round."""
        program = self.program
        expected = pytree.tree_unflatten(list(range(len(program.input_leaves))), program.input_spec)
        names = [leaf.name for leaf in program.input_leaves]
        flat_expected = len(expected[0]) + len(expected[1]) == len(names)
        given = {**dict(zip([n for n in names if n not in kwargs], args, strict=False)), **kwargs}
        if flat_expected and len(args) + len(kwargs) == len(names) and set(given) == set(names):
            return [given[name] for name in names]
        raise InputError(
            "SNNFX307",
            "the arguments do not fit the captured step",
            why=f"it takes ({', '.join(names)}), nested as {program.input_spec}.",
            hint="Pass what one step takes with a time dimension, or convert with other example_inputs.",
        )

    def _tensor_dims(self) -> list[int | None]:
        """The time dimension of each tensor input."""
        leaves = self._programs[True].input_leaves
        return [d for d, leaf in zip(self._time_dims, leaves, strict=True) if leaf.placeholder is not None]

    def _varying_leaves(self) -> list[bool]:
        return [dim is not None for dim in self._tensor_dims()]

    def _time_first(self, leaves: list[Tensor], T: int | None) -> tuple[list[Tensor], int]:
        """Move time to dim 0 of every sequence and find T."""
        dims = self._tensor_dims()
        names = [leaf.name for leaf in self.program.input_leaves if leaf.placeholder is not None]
        moved: list[Tensor] = []
        if T is not None and (isinstance(T, bool) or not isinstance(T, int | torch.SymInt)):
            raise InputError("SNNFX309", f"T={T!r}", hint="T is the number of time steps, an int.")
        for name, dim, x in zip(names, dims, leaves, strict=True):
            if dim is None:
                moved.append(x)
                continue
            if x.dim() == 0 or not -x.dim() <= dim < x.dim():
                raise InputError(
                    "SNNFX306",
                    f"the input `{name}` has shape {list(x.shape)}",
                    why=f"its time dimension is {dim}.",
                    hint="A sequence is [T, N, ...].",
                )
            moved.append(x if dim == 0 else x.movedim(dim, 0))
            length = moved[-1].shape[0]
            if T is None:
                T = length
            elif length != T:
                raise InputError("SNNFX303", f"the input `{name}` has {length} time steps, others have {T}")
        if T is None:
            raise InputError("SNNFX310", "no input carries a time dimension", hint="Say how many steps: net(x, T=8).")
        if T < 1:
            raise InputError("SNNFX301", "the sequence has no time steps")
        return moved, T

    def _time_back(self, y: Any) -> Any:
        if not isinstance(y, Tensor) or self._output_time_dim == 0 or self.options.reduce is not None:
            return y
        return y.movedim(0, self._output_time_dim)

    def _other_net(self, leaves: list[Tensor], given: dict[str, Any]) -> Net | None:
        """A net planned for the shapes of these inputs, when the plan of this one does not cover them."""
        if self._covers(leaves):
            return None
        key = (self.training, tuple((x.dim(), tuple(x.shape)) for x in leaves))
        ranks = (self.training, tuple(x.dim() for x in leaves))
        if key not in self._nets_for_shapes:
            if self._replan is None:
                raise InputError("SNNFX306", f"inputs of shapes {[list(x.shape) for x in leaves]} do not fit the plan")
            varying = self._varying_leaves()
            example = iter([x[0] if v else x for x, v in zip(leaves, varying, strict=True)])
            values = [next(example) if leaf.placeholder else leaf.constant for leaf in self.program.input_leaves]
            args, kwargs = pytree.tree_unflatten(values, self.program.input_spec)
            kwargs |= {c.name: given[c.name] for c in self.program.carried if c.required and c.name in given}
            warn_once(
                "SNNFX102",
                f"inputs of step rank {ranks[1]} are not what the net was planned for (batched, equal batch sizes); "
                "it is planned again for them, which may map instead of fold. Pass example_inputs to plan once.",
                key=(id(self), ranks),
            )
            self._nets_for_shapes[key] = self._replan(self, args, kwargs)
        other = self._nets_for_shapes[key]
        if other.training != self.training:
            other.__dict__["training"] = self.training
        return other

    def _covers(self, leaves: list[Tensor]) -> bool:
        program = self.program
        names = [leaf.placeholder for leaf in program.input_leaves if leaf.placeholder is not None]
        size: Any = None
        for name, varying, x in zip(names, self._varying_leaves(), leaves, strict=True):
            rank = x.dim() - (1 if varying else 0)
            exact = program.input_ranks.get(name)
            if rank < program.requirements.get(name, 0) or (exact is not None and rank != exact):
                return False
            if name in program.batched_inputs:
                this = x.shape[1 if varying else 0]
                if size is not None and this != size:
                    return False
                size = this
        return True

    def _check_state(self, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        expected = {slot.name for slot in self.program.slots}
        if set(state) - expected or (set(state) != expected and not self.program.carried):
            missing, unknown = sorted(expected - set(state)), sorted(set(state) - expected)
            raise InputError(
                "SNNFX308",
                "the state does not have the slots of the net",
                why=f"missing {missing}, unknown {unknown}.",
                hint="Pass on what net.run returned, or None for the reset state.",
            )

    # -- chunks ---------------------------------------------------------------------------------------------------

    def _chunk_length(self, leaves: list[Tensor], T: int) -> int | None:
        """How many steps to run at once, None for all: inference in evaluation mode only, never while compiling."""
        if self.options.chunk is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or self.training:
            return None
        if isinstance(self.options.chunk, int):
            return self.options.chunk
        return self.chunk_plan(*leaves).length

    def chunk_plan(self, *sequences: Tensor) -> ChunkPlan:
        """The chunk plan for inputs of these shapes (time first), see `snnfx.passes.chunk`."""
        varying = self._varying_leaves()
        steps = [x[0] if v else x for x, v in zip(sequences, varying, strict=True)]
        key = tuple((tuple(x.shape), x.dtype) for x in steps)
        if key not in self._chunk_plans:
            self._chunk_plans[key] = plan_chunks(self._programs[False], steps, self.options.chunk)
        return self._chunk_plans[key]

    # -- recording ------------------------------------------------------------------------------------------------

    def _recorder(self, names: tuple[str, ...]) -> Callable[..., Any]:
        """A form of the graph that also returns values over time."""
        key = (self.training, names)
        if key not in self._recordings:
            program = self.program
            nodes = [self._recorded_node(program, name) for name in names]
            label = f"record_{len(self._recordings)}"
            if any(node.meta.get("sunk") for node in nodes if isinstance(node, Node)):
                raise InputError(
                    "SNNFX311",
                    f"one of {', '.join(names)} runs on the {self.options.reduce} over time",
                    why=f"with reduce={self.options.reduce!r} it has no value at each step.",
                    hint="Convert without reduce= to record it.",
                )
            emitted = emit_multi_step(
                program, f"{_REGIONS}.{label}", self._target_name, nodes, reduce=self.options.reduce
            )
            self._install(emitted, label)
            self._recordings[key] = self._compile(emitted.graph)
        return self._recordings[key]

    @staticmethod
    def _recorded_node(program: StepProgram, name: str) -> Any:
        for slot, following in zip(program.slots, program.next_states, strict=True):
            if slot.name == name:
                return following
        known = {slot.name for slot in program.slots}
        found = None
        for node in program.graph.nodes:
            returned = node.meta.get("returned_by", ())
            known.update(returned)
            found = node if name in returned else found
        if found is None:
            raise InputError(
                "SNNFX311",
                f"there is nothing called `{name}` to record",
                why=f"known are {', '.join(sorted(k for k in known if k))}.",
            )
        return found

    # -- state carried from call to call -----------------------------------------------------------------------------

    def reset_carried_state(self) -> None:
        """Forget the state carried between calls (`snnfx.functional.reset_net`)."""
        self._carried = None

    def detach_carried_state(self) -> None:
        """Cut the history of the state carried between calls (`snnfx.functional.detach_net`)."""
        if self._carried is not None:
            self._carried = {k: v.detach() if isinstance(v, Tensor) else v for k, v in self._carried.items()}

    # -- life of the module -----------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Net:
        """Set the mode of the net and of the model that it shares its modules with."""
        super().train(mode)
        self.source.training = mode
        return self

    def convert_to(self, step_mode: str) -> Net:
        """The same programs in another step mode; modules are shared."""
        if step_mode == self.options.step_mode:
            return self
        options = replace(self.options, step_mode=step_mode)
        return Net(self.source, self._programs, options, self.history, self._replan)

    def __deepcopy__(self, memo: dict[int, Any]) -> Net:
        source = _deepcopy_module(self.source, memo)
        clone = _rebuild(source, self._packed(memo), self.options, self.history, self._replan)
        clone.__dict__["training"] = self.training
        memo[id(self)] = clone
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        # GraphModule would trace again; the program is packed as it is, with the model beside it.
        return (
            _rebuild,
            (self.source, self._packed({}), self.options, self.history, self._replan),
            {"training": self.training},
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def _packed(self, memo: dict[int, Any]) -> tuple[Any, ...]:
        first = pack_program(self._programs[True])
        same = self._programs[True] is self._programs[False]
        packed = (first, None if same else pack_program(self._programs[False]))
        return copy.deepcopy(packed, memo) if memo else packed


def _forward(self: Net, args: tuple[Any, ...], kwargs: dict[str, Any], T: int | None) -> Any:
    """Run a whole sequence from the reset state (or the carried one)."""
    options = self.options
    plain = self._runners.get((self.training, "plain"))
    if plain is not None and not options.carry_state:
        leaves = self._bind(args, kwargs)
        ordered, T = self._time_first(leaves, T)
        # Chunks are only planned for inputs that this plan covers.
        if self._covers(ordered) and ((k := self._chunk_length(ordered, T)) is None or k >= T):
            carriers = any(dim is not None for dim in self._tensor_dims())
            return plain(self, *leaves) if carriers else plain(self, *leaves, torch.arange(T, device=leaves[0].device))
    state = self._carried if options.carry_state or options.step_mode == "s" else None
    if state is not None and self.program.carried and not options.carry_state:
        # In single steps the caller hands on what the model takes as arguments.
        explicit = {name for c in self.program.carried for name in c.slot_names()}
        state = {name: value for name, value in state.items() if name not in explicit} or None
    outputs, state, _ = self._execute(args, kwargs, state, (), T)
    outputs = self.final_state_in(outputs, state)
    if options.carry_state or options.step_mode == "s":
        self._carried = state
        if options.carry_state:
            self.detach_carried_state()
    return outputs


def _is_plain_structure(spec: pytree.TreeSpec) -> bool:
    """Whether outputs nested like this can be returned by a graph."""
    return spec.type in (None, tuple, list, dict) and all(map(_is_plain_structure, spec.children()))


def _rebuild(
    source: nn.Module, packed: tuple[Any, ...], options: ConvertOptions, history: Sequence[PassRecord], replan: Any
) -> Net:
    training = unpack_program(packed[0], source)
    evaluation = training if packed[1] is None else unpack_program(packed[1], source)
    return Net(source, {True: training, False: evaluation}, options, history, replan)


def _deepcopy_module(source: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy that does not fail on state with a history (it is left behind by a training step)."""
    from snnfx.state import named_stateful

    for _, module, adapter in named_stateful(source):
        for value in adapter.read(module):
            if isinstance(value, Tensor) and not value.is_leaf and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(source, memo)


def _hold_constants(constants: dict[str, Any]) -> nn.Module:
    """A module without parameters or persistent buffers that keeps the constants of a program."""
    holder = nn.Module()
    for name, value in constants.items():
        if isinstance(value, nn.Module):
            holder._modules[name] = value
        elif isinstance(value, Tensor) and not value.requires_grad:
            holder.register_buffer(name, value.detach(), persistent=False)
        else:
            holder.__dict__[name] = value
    return holder
