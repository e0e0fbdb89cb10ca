"""Registry of message codes, with the meaning of each code and an example (see `snnfx.errors`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODES", "CodeEntry"]


@dataclass(frozen=True)
class CodeEntry:
    """Documentation of one code: title, meaning, an example that fails and one that works."""

    title: str
    meaning: str
    fails: str = ""
    works: str = ""


CODES: dict[str, CodeEntry] = {
    # 1xx: reasons why a node is not folded
    "SNNFX101": CodeEntry(
        "no rule for this operation",
        "snnfx has no rule that says how this function, method or module treats the batch dimension, so it cannot "
        "prove that T time steps may run as one large batch. The node is mapped over time with torch.vmap instead: "
        "the result is the same, and no change is necessary. For your own element-wise autograd.Function you can "
        "supply the rule.",
        "class Spike(torch.autograd.Function): ...",
        "class Spike(torch.autograd.Function):\n    snnfx_elementwise = True   # each element on its own",
    ),
    "SNNFX102": CodeEntry(
        "the step has no batch dimension here",
        "Folding needs a batch dimension before the feature dimensions, and the input of this operation at one time "
        "step has too few dimensions. The node is mapped over time.",
        "net(torch.rand(T, features))",
        "net(torch.rand(T, N, features))",
    ),
    "SNNFX103": CodeEntry(
        "the operation mixes samples of the batch",
        "The operation reduces, indexes, sorts or concatenates along the batch dimension. Folding time into the batch "
        "would mix time steps, so the node is mapped over time. If the operation was meant for a feature dimension, "
        "name that dimension.",
        "x = x - x.mean(0)",
        "x = x - x.mean(1, keepdim=True)",
    ),
    "SNNFX104": CodeEntry(
        "a literal batch size",
        "A shape argument is a literal number at the batch dimension, which would be wrong with T steps folded into "
        "the batch. The node is mapped over time. Read the size from the tensor instead.",
        "x = x.view(32, -1)",
        "x = x.view(x.shape[0], -1)   # or x.flatten(1)",
    ),
    "SNNFX105": CodeEntry(
        "operands do not share the batch dimension",
        "The operands have their batch in different dimensions or with sizes that are not proven equal, or an operand "
        "varies over time but lacks a batch dimension. The node is mapped over time.",
        "y = x * x.mean(0)                # the mean over the batch has no batch dimension",
        "y = x * x.mean(1, keepdim=True)  # or keep it: the result is the same, only slower",
    ),
    "SNNFX106": CodeEntry(
        "BatchNorm with statistics per time step",
        'With batch_norm="per_step", a BatchNorm in training uses the statistics of each time step, as the stepped '
        "model does. It is vectorised over T, but not folded.",
        'snnfx.convert(model, batch_norm="per_step")',
        'snnfx.convert(model, batch_norm="fold")   # statistics over T*N',
    ),
    "SNNFX107": CodeEntry(
        "sequential: on a cycle through time",
        "The value of this node at time step t depends on its own value at an earlier step, so it runs in a loop over "
        "time. Neurons are always sequential. A layer is sequential if its input depends on its own output.",
        "self.h = torch.tanh(self.fc(torch.cat([x, self.h], 1)))       # fc is on the cycle",
        "self.h = torch.tanh(self.fc_x(x) + self.fc_h(self.h))         # fc_x is not on the cycle and is folded",
    ),
    "SNNFX108": CodeEntry(
        "opaque: could not be traced",
        "The module could not be traced into a graph, for example because its control flow depends on tensor values. "
        "snnfx calls it once per time step and carries its state from step to step.",
        "def forward(self, x):\n    return x if x.sum() > 0 else -x",
        "def forward(self, x):\n    return torch.where(x.sum(1, keepdim=True) > 0, x, -x)   # for each sample",
    ),
    "SNNFX109": CodeEntry(
        "torch.vmap does not support this operation",
        "The node cannot be folded, and torch.vmap has no batching rule for it, so it runs in a loop over time.",
        "h = self.gru(x)        # nn.GRU",
        "h = self.cell(x, h)    # nn.GRUCell",
    ),
    "SNNFX110": CodeEntry(
        "the batch size is used as a number",
        "The node computes with the batch size outside of a shape argument, so its result depends on the number of "
        "samples, which folding would change. The node is mapped over time.",
        "y = x / x.shape[0]",
        "y = x / x.shape[1]",
    ),
    "SNNFX111": CodeEntry(
        "an unknown number of dimensions",
        "The rule for this operation depends on the number of dimensions of its input, which is unknown without "
        "example_inputs. The node is mapped over time.",
        "net = snnfx.convert(model)",
        "net = snnfx.convert(model, example_inputs=(x,))",
    ),
    "SNNFX115": CodeEntry(
        "the forward may loop over time",
        "A loop in the forward resembles a loop over time, but it may also belong to the step, for example a recurrence "
        "over features or over the iterations of a fixed point. The net runs the loop at every time step. If it is a "
        'loop over time, convert with takes="sequence", or move its body to a method and pass its name as entry, or '
        "pass example_inputs of ONE step.",
        "def forward(self, x):\n"
        "    v, current = torch.zeros(x.shape[0]), self.fc(x)\n"
        "    for t in range(x.shape[1]):\n"
        "        v = 0.9 * v + current[:, t]\n"
        "    return v",
        "def step(self, x):\n"
        "    self.v = 0.9 * self.v + self.fc(x)\n"
        "    return self.v\n"
        "\n"
        'net = snnfx.convert(model, entry="step")',
    ),
    "SNNFX112": CodeEntry(
        "a BatchNorm that is not folded",
        'With batch_norm="fold", this BatchNorm in training still uses the statistics of each time step, while the other '
        "BatchNorms of the net use statistics over all T*N samples: it is on a cycle through time, inside a module that "
        "could not be traced, or a call of torch.nn.functional.batch_norm. snnfx.convert warns once.",
        "self.h = self.bn(self.fc(x) + self.h)   # on the cycle",
        'self.h = self.bn(self.fc(x)) + self.h   # not on the cycle; or convert with batch_norm="per_step"',
    ),
    # 2xx: capture
    "SNNFX201": CodeEntry(
        "the model cannot be traced",
        "The forward of the model has control flow that depends on tensor values, or uses a Python feature that "
        "torch.fx cannot trace. A net steps a submodule, or a model by its `forward`, untraced instead (SNNFX108), unless "
        "that is impossible.",
        'def step(self, x):                      # snnfx.convert(model, entry="step")\n'
        "    if x.sum() > 0: return x\n"
        "    return -x",
        "def step(self, x):\n    return torch.where(x.sum(1, keepdim=True) > 0, x, -x)   # for each sample",
    ),
    "SNNFX202": CodeEntry(
        "control flow on shapes needs example inputs",
        "The model's Python code reads the shape of a tensor during capture, which is unknown without example_inputs.",
        "snnfx.convert(model)",
        "snnfx.convert(model, example_inputs=(torch.rand(2, 1, 28, 28),))",
    ),
    "SNNFX203": CodeEntry(
        "the forward loops over time itself",
        "The forward reads its input element by element along a dimension, runs the same operations on each element, "
        "and carries values from one iteration to the next; or it calls a neuron on the same value again and again. So "
        'it already runs a whole sequence. Convert the whole call with takes="sequence", or move the body of the loop '
        "into a method that computes ONE time step and pass its name as entry.",
        "def forward(self, x_seq):\n"
        "    outputs = []\n"
        "    for t in range(T):\n"
        "        outputs.append(self.lif(self.fc(x_seq[t])))\n"
        "    return torch.stack(outputs)",
        'net = snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))',
    ),
    "SNNFX204": CodeEntry(
        "already in multi-step mode",
        "A module of the model takes whole sequences, and without takes=, snnfx converts models that compute ONE time "
        'step. Convert the whole call with takes="sequence".',
        'snnfx.convert(nn.Sequential(layer.Linear(4, 4, step_mode="m"), neuron.LIFNode(step_mode="m")))',
        'snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))',
    ),
    "SNNFX205": CodeEntry(
        "a module without a single-step form",
        "The module is defined for whole sequences only, so it has no step graph. Replace it with a single-step module.",
        "neuron.PSN(T=8)",
        "neuron.LIFNode(tau=2.0)",
    ),
    "SNNFX206": CodeEntry(
        "a change of a buffer or parameter that a net cannot follow",
        "A buffer that a step assigns or changes in place, and a parameter that it changes under torch.no_grad(), are "
        "state of the net: every call starts from the value in the model and writes the last value back. A net cannot "
        "follow a step that assigns .data, that creates or replaces a buffer or parameter, or that changes a tensor in "
        "place which is in a container, shares memory with another tensor, or belongs to a module that is called as a "
        "whole.",
        "self.gain.data = self.gain.data.clamp(0, 1)",
        "with torch.no_grad():\n    self.gain.clamp_(0, 1)   # or self.gain.copy_(value)",
    ),
    "SNNFX207": CodeEntry(
        "lazy modules are not initialised",
        "A lazy module has no weights before its first call. Run the model once before converting it.",
        "snnfx.convert(nn.Sequential(nn.LazyLinear(10)))",
        "model(x); snnfx.convert(model)",
    ),
    "SNNFX208": CodeEntry(
        "hooks that would be lost",
        "The model or a container module has forward hooks, which would never run in the converted net; the next call "
        "also refuses hooks that were registered after conversion. Register them on leaf modules.",
        "model.register_forward_hook(hook)",
        "model.conv1.register_forward_hook(hook)   # hooks of leaf modules run",
    ),
    "SNNFX209": CodeEntry(
        "an in-place operation on an input",
        "The step changes its own input in place, so the converted net would change the caller's sequence. Use the "
        "out-of-place operation.",
        "def forward(self, x):\n    x.mul_(2)",
        "def forward(self, x):\n    x = x * 2",
    ),
    "SNNFX210": CodeEntry(
        "the initial state depends on itself",
        "The initial value of a state is computed from a value that already needs this state. Compute it from the "
        "inputs or from constants.",
        "if self.u is None: self.u = 1.0 * self.v            # v depends on lif, and the state of lif on u",
        "if self.u is None: self.u = torch.zeros_like(x)     # depends on the input only",
    ),
    "SNNFX211": CodeEntry(
        "arguments of forward that cannot be captured",
        "Inputs must be tensors, or nested tuples, lists and dicts of tensors; other values are fixed at conversion. "
        "For a forward with *args, example_inputs gives the number of inputs.",
        "snnfx.convert(model)                            # forward(self, *xs): unknown number of inputs",
        "snnfx.convert(model, example_inputs=(x1, x2))",
    ),
    "SNNFX212": CodeEntry(
        "the first step differs from later steps",
        "The first step runs other operations than the later steps, so it runs in a separate graph (loop peeling). "
        "This is correct, but the first step cannot be fused with the others.",
        "if self.h is None: y = self.first(x)   # another layer at the first step\nelse: y = self.later(x, self.h)",
        "if self.h is None: self.h = torch.zeros_like(x)\ny = self.later(x, self.h)   # an initial value: no peeling",
    ),
    "SNNFX213": CodeEntry(
        "an undeclared state in a module that cannot be traced",
        "A module that could not be traced changes an attribute that is not registered as state, so the value would "
        "leak from one call of the net into the next. Register the attribute.",
        "class Model(nn.Module):                 # its forward branches on the value of self.mem\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.mem = torch.zeros(4, 4)",
        "class Model(snnfx.MemoryModule):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        '        self.register_memory("mem", torch.zeros(4, 4))',
    ),
    "SNNFX214": CodeEntry(
        "an in-place operation that cannot be made functional",
        "The step changes a tensor in place that shares memory with another value, or the operation has only an "
        "in-place form. Write it with out-of-place operations.",
        "x[:, 0].mul_(2)",
        "x = torch.cat([x[:, :1] * 2, x[:, 1:]], dim=1)",
    ),
    "SNNFX215": CodeEntry(
        "random numbers that the graph does not record",
        "The step draws random numbers without a node in the graph, for example by filling a new tensor in place, so "
        "every call would reuse the numbers drawn during capture. Use a function that returns random numbers.",
        "noise = torch.empty(5).normal_()",
        "noise = torch.randn_like(x)",
    ),
    "SNNFX216": CodeEntry(
        "an input or output that is not a pytree of tensors",
        "Inputs and outputs of a step must be tensors, numbers and other constants, or tuples, lists, dicts and named "
        "tuples of them (pytrees). Generators, NumPy arrays, sets, and tensors inside other objects would be fixed at "
        "conversion or lost.",
        "class Output:                           # forward returns Output(spikes)\n"
        "    def __init__(self, spikes):\n"
        "        self.spikes = spikes",
        "class Output(NamedTuple):               # or a class registered with torch.utils._pytree\n"
        "    spikes: torch.Tensor",
    ),
    "SNNFX217": CodeEntry(
        "a state is set to an unsupported value",
        "The step assigns to a neuron's state, from outside the neuron, a value other than a tensor or number, such "
        "as None. Assign a tensor.",
        "s = self.lif(x); self.lif.v = None",
        "s = self.lif(x); self.lif.v = torch.zeros_like(s)",
    ),
    "SNNFX218": CodeEntry(
        "a step changes something that cannot be carried as state",
        "snnfx carries tensors and numbers in attributes of modules, and in lists, tuples, dicts and deques there. "
        "Other changes (of a string, an attribute of a plain object, a set, a setting of a layer, a global or closure "
        "variable) would be lost after the first step, so they are refused. Store the state in an attribute of the module.",
        "self.state.v = x if self.state.v is None else self.state.v + x   # a plain object",
        "self.v = x if self.v is None else self.v + x",
    ),
    "SNNFX220": CodeEntry(
        "scripted or traced code of TorchScript",
        "A module that torch.jit.script or torch.jit.trace made, or that was loaded from a TorchScript file, runs outside "
        "of Python, so that its operations and its state cannot be recorded. Use the Python module that it was made "
        "from. A scripted function is no problem: snnfx traces its Python original.",
        "self.fc = torch.jit.script(nn.Linear(8, 8))",
        "self.fc = nn.Linear(8, 8)   # self.fc.load_state_dict(scripted.state_dict()) for its weights",
    ),
    "SNNFX221": CodeEntry(
        "a converted net that keeps its state, inside a model",
        'A net that was converted with carry_state=True or step_mode="s" keeps its state from call to call, where the '
        "net around it cannot reset it. Use the model that it was converted from. A net that starts each call from the "
        "reset state is stepped as a whole.",
        "snnfx.convert(nn.Sequential(snnfx.convert(model, carry_state=True), head))",
        "snnfx.convert(nn.Sequential(net.source, head))",
    ),
    "SNNFX222": CodeEntry(
        "a wrapper for several devices or processes",
        "DistributedDataParallel, FullyShardedDataParallel and a DataParallel with several devices distribute their "
        "input and gradients, which the graph of one step cannot contain. Convert the model inside the wrapper and wrap "
        "the net.",
        "snnfx.convert(DistributedDataParallel(model))",
        "DistributedDataParallel(snnfx.convert(model))",
    ),
    "SNNFX223": CodeEntry(
        "a version of a library without an adapter",
        "snnfx has adapters for the modules of SpikingJelly, snnTorch and Norse. The installed version of the library "
        "has another layout than the adapter expects, such as a SpikingJelly without `activation_based`. Its modules are "
        "traced like code of your own: the result is the same, but fewer nodes may be folded or lowered. Install a newer "
        "version to use the adapter.",
        "from spikingjelly.clock_driven import neuron",
        "from spikingjelly.activation_based import neuron",
    ),
    "SNNFX224": CodeEntry(
        "a first step with batch statistics of its own",
        'With batch_norm="fold", a BatchNorm in training takes its statistics over all T*N samples. If the first step '
        "runs other operations than the later steps (SNNFX212) and only states on a cycle through time depend on them, "
        "this holds as well. Otherwise the first step runs apart as a whole: the BatchNorm takes the statistics of the "
        "first step and those of the later steps separately, with one update of the running statistics for each. The "
        "net warns once at its first call in training.",
        "y = x if self.before is None else torch.maximum(x, self.before)   # y has no cycle through time\n"
        "self.before = x\n"
        "return self.bn(y)",
        "if self.before is None: self.before = torch.full_like(x, -torch.inf)   # an initial value\n"
        "y = torch.maximum(x, self.before)\n"
        "self.before = x\n"
        "return self.bn(y)",
    ),
    "SNNFX225": CodeEntry(
        "an operation fails on a memory format",
        "The operation, such as `view`, cannot take a tensor with these strides: it was permuted, or the inputs are in "
        "channels-last format. Use `reshape`, or make the tensor contiguous.",
        "y = torch.stack([x, x], dim=1).transpose(1, 2).view(x.shape[0], -1)",
        "y = torch.stack([x, x], dim=1).transpose(1, 2).reshape(x.shape[0], -1)",
    ),
    "SNNFX226": CodeEntry(
        "a step stores a tensor in a global variable that it never reads",
        "A net does not set global variables, so code outside of the model would read an old tensor. Return the tensor "
        "instead. A step may set a global variable and then read it.",
        "def forward(self, x):\n    global last\n    last = self.fc(x)\n    return x",
        "def forward(self, x):\n    return x, self.fc(x)",
    ),
    "SNNFX250": CodeEntry(
        "a branch on the number of the step",
        "Python code branches on a number that counts the steps, and later steps take different branches. A net runs "
        "the first step apart, but all later steps run the same operations. Keep the number as a tensor and choose with "
        "torch.where.",
        "self.t += 1\nif self.t % 2 == 0:\n    v = v * 0.5",
        "self.count = (torch.zeros_like(x) if self.count is None else self.count) + 1\n"
        "v = torch.where(self.count % 2 == 0, v * 0.5, v)",
    ),
    # 3xx: inputs of a call
    "SNNFX230": CodeEntry(
        "the iterations of a loop over time differ",
        'With takes="sequence", snnfx re-rolls each loop over time into one step. All iterations must compute their '
        "states by the same operations, and read the values of the previous iteration only; the first and the last "
        "iteration may differ. Modules and operations of single iterations, such as a norm of each step, run outside the "
        "loop if no later iteration depends on them through a state. The number of iterations may not depend on values, "
        "and a loop may not break.",
        "y = x_seq[0]\n"
        "for t in range(len(x_seq)):\n"
        "    y = torch.relu(self.f(y) + x_seq[t]) if t % 2 else self.g(y) * x_seq[t]\n"
        "    outputs.append(self.lif(y))",
        "for t in range(len(x_seq)):\n    outputs.append(self.lif(self.f(x_seq[t])))",
    ),
    "SNNFX231": CodeEntry(
        "an input has fewer time steps than a loop reads",
        "The number of iterations of a loop does not depend on the size of the input that it reads, and the input of "
        "this call is too short.",
        "for t in range(8):                      # the input has 5 time steps\n    outputs.append(self.lif(x_seq[t]))",
        "for t in range(len(x_seq)):\n    outputs.append(self.lif(x_seq[t]))",
    ),
    "SNNFX233": CodeEntry(
        'takes="sequence" without example_inputs',
        "The loops of a model are found by capturing a call on short sequences like example_inputs.",
        'snnfx.convert(model, takes="sequence")',
        'snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))',
    ),
    "SNNFX234": CodeEntry(
        "a call in multi-step mode that cannot be captured",
        'With takes="sequence", a neuron or layer of SpikingJelly in multi-step mode takes tensors with time in '
        "dimension 0, all with the same number of time steps.",
        "self.lif(torch.zeros(4, 2, 8))          # does not depend on an input",
        "self.lif(self.fc(x_seq))",
    ),
    "SNNFX235": CodeEntry(
        "a model without a step form is asked for single steps",
        'With takes="sequence", streaming, explicit state, recording, chunks, budgets, step_mode="s" and online rules '
        "need one step of the model. It is derived where all operations outside the loops compute each time step apart "
        "from the others, with a number of time steps that the inputs give. Operations over time, as attention over "
        "time steps, run on whole sequences only.",
        "y_seq, state = net.run(x_seq[:2])   # the model computes x_seq - x_seq.mean(0), over all time steps\n"
        "y_seq, state = net.run(x_seq[2:], state=state)",
        "y_seq = net(x_seq)",
    ),
    "SNNFX301": CodeEntry(
        "no time steps",
        "A sequence must have at least one time step.",
        "net(torch.rand(0, 2, 3))",
        "net(torch.rand(1, 2, 3))",
    ),
    "SNNFX302": CodeEntry(
        "split_size below 1",
        "A chunk must have at least one time step.",
        "chunk_multi_step_forward(0, x_seq, net)",
        "chunk_multi_step_forward(16, x_seq, net)",
    ),
    "SNNFX303": CodeEntry(
        "leading dimensions differ",
        "All sequences must have the same number of time steps T, and folded sequences also the same batch size.",
        "net(torch.rand(8, 2, 3), torch.rand(7, 2, 3))",
        "net(torch.rand(8, 2, 3), torch.rand(8, 2, 3))",
    ),
    "SNNFX304": CodeEntry(
        "neither a module nor a callable",
        "The argument must be an nn.Module, a callable, or a list or tuple of them.",
        "multi_step_forward(x_seq, 3)",
        "multi_step_forward(x_seq, nn.Linear(3, 2))",
    ),
    "SNNFX305": CodeEntry(
        "not a tensor",
        "Sequences must be tensors, or nested tuples, lists and dicts of tensors.",
        "net([1, 2, 3])",
        "net(torch.tensor([[1.0], [2.0], [3.0]]))",
    ),
    "SNNFX306": CodeEntry(
        "too few dimensions for a sequence",
        "The input lacks the time dimension or, for a folded sequence, the batch dimension.",
        "net(torch.tensor(1.0))",
        "net(torch.rand(8, 2, 3))",
    ),
    "SNNFX307": CodeEntry(
        "the arguments do not match the captured step",
        "The net was captured with another number of inputs, another nesting, or another constant. Convert the model "
        "with example_inputs like the arguments of the call.",
        "net = snnfx.convert(model, example_inputs=(x, True)); net(x_seq, False)",
        "net = snnfx.convert(model, example_inputs=(x, False)); net(x_seq, False)",
    ),
    "SNNFX308": CodeEntry(
        "unknown or missing state",
        "The keys of the state differ from the slots of the net, or its shape belongs to another batch size. "
        "net.run(x_seq) returns a state of the right form.",
        'net.run(x_seq, state={"lif.u": v})',
        'net.run(x_seq, state={"lif.v": v})',
    ),
    "SNNFX309": CodeEntry(
        "illegal value of an option",
        "The option does not accept this value; the message lists the accepted ones.",
        'snnfx.convert(model, batch_norm="frozen")',
        'snnfx.convert(model, batch_norm="per_step")',
    ),
    "SNNFX310": CodeEntry(
        "the number of time steps is unknown",
        "None of the inputs has a time dimension (time_dim=None for all), so T must be passed.",
        "net(image)",
        "net(image, T=8)",
    ),
    "SNNFX311": CodeEntry(
        "unknown name in record",
        "record= takes qualified names of modules that a step calls, or of state slots.",
        'net.run(x_seq, record=("lif9",))',
        'net.run(x_seq, record=("lif1", "lif1.v"))',
    ),
    "SNNFX312": CodeEntry(
        "a size differs from its size at capture",
        "The model's Python code used a size as a number during capture, so the net is valid for that size only. "
        "Convert the model again for another size.",
        "net = snnfx.convert(model, example_inputs=torch.rand(2, 3))   # for i in range(x.shape[1]): ...\n"
        "net(torch.rand(8, 2, 4))",
        "net = snnfx.convert(model, example_inputs=torch.rand(2, 4))\nnet(torch.rand(8, 2, 4))",
    ),
    "SNNFX313": CodeEntry(
        "the outputs do not form a sequence",
        "The outputs of a module cannot be joined over time: their batch size is not a multiple of T (the module is "
        "not batch-equivariant), their nesting changes between steps, or they are not tensors.",
        "seq_to_ann_forward(x_seq, lambda x: x.sum(0))",
        "map_forward(x_seq, lambda x: x.sum(0))",
    ),
    "SNNFX314": CodeEntry(
        "ambiguous state outputs",
        "The step has arguments that default to None and look like state, and returns several values, but their "
        "numbers or names do not match. snnfx does not guess: name the output that each argument carries.",
        "snnfx.convert(model)                             # forward(self, x, mem=None) -> (spk, aux, mem)",
        'snnfx.convert(model, carry={"mem": 2})           # carry={} if no argument is carried',
    ),
    "SNNFX315": CodeEntry(
        "something that the step depends on changed after conversion",
        "A graph contains the Python values that the model's code read at capture: attributes of modules and objects "
        "(`self.tau`, `self.cfg.k`), elements of containers, functions, globals, closure variables, and the modules "
        "themselves. When one of them changes, the next call of the net captures the model again and warns once. If "
        "that is impossible (inside torch.compile, or after the graph was replaced by hand), the call raises instead "
        "of using the old value. Neurons and layers that are one node of the graph read their own settings at every "
        "call and are not affected.",
        "self.tau = 2.0                                     # and after the conversion: model.tau = 3.0",
        'self.register_buffer("tau", torch.tensor(2.0))     # and after the conversion: model.tau.fill_(3.0)',
    ),
    "SNNFX317": CodeEntry(
        "the sequence cannot be split over time",
        'With batch_norm="fold", a BatchNorm in training takes its statistics over all time steps. Splitting the '
        "sequence (checkpoint=<steps>, net.stream) would change them to the statistics of each part. With "
        "checkpoint=<steps>, the steps of a model that changes a parameter in place cannot be recomputed either.",
        "snnfx.convert(model, checkpoint=16)",
        'snnfx.convert(model, checkpoint="regions")       # or batch_norm="per_step"; evaluation mode is not affected',
    ),
    "SNNFX318": CodeEntry(
        "the memory budget cannot be met",
        "The net exceeds the budget even with chunks of one time step (in training: with full recomputation in the "
        "backward pass). The message names the smallest sufficient budget and the region that needs it.",
        "snnfx.convert(model, memory_budget=1000)(x_seq)",
        "snnfx.convert(model, memory_budget=2 * 2**30)    # bytes; or a smaller batch",
    ),
    "SNNFX319": CodeEntry(
        "memory cannot be drawn",
        "Memory could not be predicted, neither for inference nor for training: a shape depends on tensor values, the "
        "caller supplies the initial state, or the budget is too small. The message names the reason.",
        'snnfx.explain(model, example_inputs=x, T=16, memory_budget=1000).memory.save("memory.svg")',
        'snnfx.explain(model, example_inputs=x, T=16, memory_budget="2GiB").memory.save("memory.svg")',
    ),
    "SNNFX320": CodeEntry(
        "state is carried during a backward pass",
        'A net that carries its state across calls (carry_state=True, or step_mode="s"), or that updates buffers or '
        "parameters at each step, was called while a backward pass runs, mostly by torch.utils.checkpoint, which runs its "
        "function a second time to recompute intermediates. The "
        "net already has the state after the first run, so the second run would give other values, wrong gradients and "
        "a state that is advanced twice. The error is raised before anything is changed: the net carries the state "
        "after the first run. Use the option checkpoint= of snnfx.convert, or pass the state explicitly.",
        "net = snnfx.convert(model, carry_state=True); checkpoint(net, x_seq, use_reentrant=False).sum().backward()",
        'net = snnfx.convert(model, carry_state=True, checkpoint="regions"); net(x_seq).sum().backward()',
    ),
    "SNNFX326": CodeEntry(
        "an illegal limit of the kernel cache",
        "The environment variable SNNFX_CACHE_LIMIT is the size in MiB that the folder of compiled kernels may have; the "
        "least recently used files beyond it are removed. 0 stands for no limit, and the default is 256.",
        "SNNFX_CACHE_LIMIT=1GB python train.py",
        "SNNFX_CACHE_LIMIT=1024 python train.py",
    ),
    "SNNFX327": CodeEntry(
        "the inputs have other sizes than the model expects",
        "An export runs the first step of its inputs. The model fails for their sizes, such as another number of "
        "features than its first layer has. Nothing was written.",
        'snnfx.export(snnfx.convert(nn.Linear(5, 2)).eval(), "net.pt2", torch.rand(T, N, 7))',
        'snnfx.export(snnfx.convert(nn.Linear(5, 2)).eval(), "net.pt2", torch.rand(T, N, 5))',
    ),
    "SNNFX325": CodeEntry(
        "an input has another rank than the example",
        "The net was converted with example_inputs, so its plan holds for inputs of these ranks. An input of a call has "
        "more or fewer dimensions per time step. Without example_inputs, the net is planned once for each rank.",
        "net = snnfx.convert(model, example_inputs=torch.rand(N, 4)); net(torch.rand(T, N, 3, 4))",
        "net = snnfx.convert(model, example_inputs=torch.rand(N, 3, 4)); net(torch.rand(T, N, 3, 4))",
    ),
    "SNNFX316": CodeEntry(
        "a kernel is differentiated twice",
        "A loop that runs as one generated kernel has a first derivative, but not a second one. The error is raised "
        "when the first derivative is computed with create_graph=True.",
        "net = snnfx.convert(model); (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)",
        "net = snnfx.convert(model, lower=None)   # PyTorch runs every step and supports it",
    ),
    "SNNFX321": CodeEntry(
        "a net that changes the model is called inside a transform of torch.func",
        "Each call of the net changes a buffer or a parameter of the model. Inside torch.func.vmap, grad or jvp the new "
        "value belongs to the transform and must not stay in the model. The call is refused before anything changes.",
        "torch.func.vmap(net)(x)",
        "torch.autograd.grad(net(x).sum(), x)   # or net.eval(), if only training changes the buffer",
    ),
    # 4xx: verification
    "SNNFX401": CodeEntry(
        "outputs differ",
        "The output of the net differs from the stepped model. In float32, rounding can flip a spike if a potential "
        "is at the threshold; `verify` rules this out by comparing copies in float64. If net and model belong together "
        "(the same weights and settings), report it as a bug of snnfx.",
        "net = snnfx.convert(copy.deepcopy(model))\n"
        'model.load_state_dict(torch.load("weights.pt"))   # the net has the old weights\n'
        "snnfx.verify(model, net, x_seq)",
        "net = snnfx.convert(model)                        # shares the parameters of the model\n"
        'model.load_state_dict(torch.load("weights.pt"))\n'
        "snnfx.verify(model, net, x_seq)",
    ),
    "SNNFX402": CodeEntry(
        "final states differ",
        "The state after the last step differs from the stepped model; see SNNFX401.",
        "net = snnfx.convert(copy.deepcopy(model))\n"
        "model[1].tau = 4.0                   # other potentials, and no spike yet\n"
        "snnfx.verify(model, net, x_seq)",
        "net = snnfx.convert(model)           # reads the settings of the neurons of the model\n"
        "model[1].tau = 4.0\n"
        "snnfx.verify(model, net, x_seq)",
    ),
    "SNNFX403": CodeEntry(
        "gradients differ",
        "A gradient differs from the stepped model; see SNNFX401.",
        "other = copy.deepcopy(model)\n"
        "other[1].surrogate_function = snnfx.surrogate.ATan()   # the same spikes, other gradients\n"
        "snnfx.verify(model, snnfx.convert(other), x_seq)",
        "model[1].surrogate_function = snnfx.surrogate.ATan()\nsnnfx.verify(model, snnfx.convert(model), x_seq)",
    ),
    "SNNFX404": CodeEntry(
        "buffers differ",
        "Running statistics or other buffers differ from the stepped model; see SNNFX401.",
        "net = snnfx.convert(copy.deepcopy(model))\n"
        "model[1].momentum = 0.5              # other running statistics of the BatchNorm\n"
        "snnfx.verify(model, net, x_seq)",
        "net = snnfx.convert(model)\nmodel[1].momentum = 0.5\nsnnfx.verify(model, net, x_seq)",
    ),
    "SNNFX405": CodeEntry(
        "BatchNorm statistics over time are undefined",
        'With batch_norm="fold", a BatchNorm in training takes its statistics over all time steps. These are '
        "undefined if the steps call different layers, or if the statistics depend on the layer's own output at an "
        "earlier step, so verify has no reference.",
        'snnfx.verify(model, snnfx.convert(model, batch_norm="fold"), x_seq)',
        'snnfx.verify(model, snnfx.convert(model, batch_norm="per_step"), x_seq)',
    ),
    "SNNFX410": CodeEntry(
        "parameters or attributes differ",
        "A parameter or an attribute that the steps change has another value after a call of the net than after "
        "stepping the model, or the net does not change it at all.",
        "snnfx.verify(Counting(), snnfx.convert(Model()), x_seq)   # Counting is a Model that runs self.steps += 1",
        "model = Counting()\nsnnfx.verify(model, snnfx.convert(model), x_seq)",
    ),
    "SNNFX411": CodeEntry(
        "the random numbers cannot be shared",
        "In `verify`, net and model draw the same random numbers, step by step. Here the draws of the net do not "
        "correspond to draws of the model: the net draws other shapes, fewer or more numbers, or from a distribution "
        "that verify cannot reproduce.",
        "snnfx.verify(model, net, x_seq)         # forward: spikes = torch.poisson(rate), in training",
        "snnfx.verify(model, net.eval(), x_seq)  # or pass the random numbers as an input: model(x, noise)",
    ),
    "SNNFX412": CodeEntry(
        "the model cannot run in float64",
        "With `double=True`, `verify` compares copies in float64. Casts to float32 (`.float()`, `.to(torch.float32)`, "
        "`dtype=torch.float32`) become casts to float64, but other code may insist on float32, such as a scripted "
        "function or a NumPy array. The message names the line.",
        'spike = torch.from_numpy((v.detach().numpy() > 1).astype("float32"))   # in the model',
        "spike = (v > 1).to(v.dtype)",
    ),
    "SNNFX413": CodeEntry(
        "the net of another model",
        "`verify` compares a net with the model that it was converted from, or with a model that has the same modules. "
        "Here the steps use parameters, buffers or states of a module that only the model or only the net has, so that "
        "they cannot be compared by name. Modules that no step uses may differ.",
        "snnfx.verify(other_model, snnfx.convert(model), x_seq)",
        "snnfx.verify(model, snnfx.convert(model), x_seq)",
    ),
    "SNNFX417": CodeEntry(
        "a model or an input without values",
        "`verify` compares the values of net and model. A parameter, a buffer or an input on the meta device has a shape "
        "and no values, so that every net would pass.",
        'snnfx.verify(model.to("meta"), snnfx.convert(model), x_seq.to("meta"))',
        "snnfx.verify(model, snnfx.convert(model), x_seq)",
    ),
    # 5xx: passes
    "SNNFX501": CodeEntry(
        "a pass broke the graph",
        "The verifier that runs after each pass found the graph invalid. The message names the pass and the node.",
        "node.target = 'fc9'   # in a pass: the model has no module of this name",
        "node.target = '0'",
    ),
    "SNNFX502": CodeEntry(
        "passes in an illegal order",
        "A pass was run at the wrong stage: the stage that it requires (`requires`) is not the one that the pass "
        "before it leaves (`ensures`).",
        "PassManager([Partition(), Normalize()]).run(program)",
        "PassManager([Normalize(), Partition()]).run(program)",
    ),
    "SNNFX503": CodeEntry(
        "a region no longer exists",
        "A compiled or exported program calls a loop of a net that has been deleted. Such a program refers to the "
        "net, so it runs only in the same process and while the net exists.",
        "exported = torch.export.export(net, (x_seq,)); del net; exported.module()(x_seq)",
        "exported = torch.export.export(net, (x_seq,)); exported.module()(x_seq)   # net still exists",
    ),
    "SNNFX504": CodeEntry(
        "a fallback was taken",
        "torch refused a faster form of a region at run time, so a slower one is used from now on. The result is the "
        "same.",
        "y = y - y[mask].sum()                                    # a boolean index: torch.vmap has no rule, runs step by step",
        "y = y - y.masked_fill(~mask, 0).sum(1, keepdim=True)     # for each sample: folded",
    ),
    "SNNFX506": CodeEntry(
        "a compiled net is not checkpointed",
        "torch.compile does not run this net as one operator (`snnfx.explain` says why), so the compiler's own "
        "partitioner decides which tensors are saved for backward and which are recomputed. checkpoint= and "
        "memory_budget= have no effect on its training.",
        'model.fc.register_forward_hook(print); torch.compile(snnfx.convert(model, checkpoint="regions"))(x_seq)',
        'torch.compile(snnfx.convert(model, checkpoint="regions"))(x_seq).sum().backward()',
    ),
    "SNNFX508": CodeEntry(
        "the memory budget is ignored or exceeded",
        "memory_budget= has no effect because memory use cannot be predicted from shapes (the model reads tensor "
        "values), or it is exceeded because another option (checkpoint=, record=) needs more memory. The result is "
        "the same.",
        'snnfx.convert(model, checkpoint="regions", memory_budget=1000)(x_seq)',
        'snnfx.convert(model, checkpoint="auto", memory_budget="1MiB")(x_seq)',
    ),
    "SNNFX511": CodeEntry(
        "the autograd graph of a compiled net was lost",
        "A compiled net is one operator, and a tensor that the compiled program saves for backward owns the net's "
        "autograd graph. A hook for saved tensors that returns another tensor, such as a copy on another device, "
        "loses the graph.",
        "with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.detach): y = torch.compile(net)(x_seq)",
        'y = torch.compile(snnfx.convert(model, checkpoint="regions"))(x_seq)      # less memory without hooks',
    ),
    "SNNFX507": CodeEntry(
        "out of memory",
        "An allocation failed while the net ran. The message names the region, and options that need less memory.",
        "snnfx.convert(model, chunk=None)(x_seq)",
        "snnfx.convert(model, memory_budget=0.5)(x_seq)",
    ),
    "SNNFX509": CodeEntry(
        "internal fault: a fallback was taken",
        "A part of snnfx failed with an error of its own. The result is the same, but the net may be slower or need more "
        "memory. Please report the message with its file and line; the tests of snnfx raise such an error.",
        "KeyError in snnfx/memory/meta_run.py:180",
        "nothing to do; turn off the option that the message names, e.g. convert(model, memory_budget=None)",
    ),
    "SNNFX510": CodeEntry(
        "the folder of compiled kernels cannot be written",
        "Compiled kernels are stored in a folder, SNNFX_CACHE_DIR or `snnfx` in the user's cache folder. It is read-only "
        "or full, so a process stores them in a temporary folder, and each process compiles its kernels anew. Choices "
        "that a process has measured are in the same folder: without it, each process measures them anew. The result "
        "is the same.",
        "SNNFX_CACHE_DIR=/proc python train.py",
        "SNNFX_CACHE_DIR=~/kernels python train.py",
    ),
    "SNNFX505": CodeEntry(
        "no kernel could be built",
        "A loop could run as one generated kernel, but the C++ compiler (on a GPU: Triton) is missing or failed, or "
        "SNNFX_KERNELS=0 disables kernels. PyTorch runs the loop step by step instead, which is slower with the same "
        "result.",
        "snnfx.convert(model)(x_seq)                # on a machine without g++ and clang++",
        "apt install g++   # or set CXX; or silence the warning: snnfx.convert(model, lower=None)",
    ),
    # 70x: passes of the user's own
    "SNNFX701": CodeEntry(
        "a pass changed what it does not declare",
        "After a pass, the manager compares the program and the model by value with their state before it: parameters, "
        "buffers, training flags, submodules, attributes, and the parts of the program. A change that `may_change` "
        "does not contain is put back. Fields such as `program.stage` and `program.training` stay as they are.",
        "may_change = ('graph',)   # and apply() runs program.source[0].weight.data.mul_(0.5)",
        "may_change = ('graph', 'parameters')",
    ),
    "SNNFX702": CodeEntry(
        "a pass is not well defined",
        "A pass is an instance of a class derived from snnfx.passes.Pass, with a name, an existing stage in "
        "`requires`, parts from the list of changes in `may_change`, and options that are fields of a frozen "
        "dataclass. In `convert`, it stays at its stage.",
        "requires = 'optimised'",
        "requires = 'normalized'   # or captured, partitioned, planned",
    ),
    "SNNFX703": CodeEntry(
        "a pass failed",
        "`apply` of a user's pass raised an error. The message gives its place; the program and the model were put "
        "back.",
        "program.graph.erase_node(node)   # other nodes still read the node",
        "node.replace_all_uses_with(new); program.graph.erase_node(node)",
    ),
    "SNNFX704": CodeEntry(
        "a pass returned no result",
        "`apply` returns a note, a short text for `net.history`; `rewrite` of a Rewrite returns the node that replaces "
        "the match.",
        "def apply(self, program): ...                  # no return",
        "def apply(self, program): return 'replaced 2 nodes'",
    ),
    "SNNFX705": CodeEntry(
        "the passes of a net cannot be pickled",
        "A net plans again with its passes, so they are pickled with it. Pickle stores classes and functions by name, "
        "and finds neither lambdas nor classes that a function defines. copy.deepcopy works.",
        "passes = [Scale(function=lambda x: 2 * x)]",
        "def double(x):\n    return 2 * x\n\npasses = [Scale(function=double)]",
    ),
    "SNNFX706": CodeEntry(
        "no such stage to draw",
        "snnfx.draw(net, stage=...) draws the program at the end of a stage: captured, normalized, partitioned or "
        "planned. A record of an emitted graph has no step program.",
        "snnfx.draw(net, stage='folded')",
        "snnfx.draw(net, stage='partitioned')",
    ),
    # 6xx: tools around the library
    "SNNFX601": CodeEntry(
        "graphviz is missing",
        "Drawing to .svg, .png or .pdf needs the program `dot`; pip cannot install it. A .dot file needs no graphviz.",
        'snnfx.draw(net, "net.svg")',
        "apt install graphviz                              # or write a .dot file",
    ),
    "SNNFX602": CodeEntry(
        "cannot load the model",
        "pkg.module:factory must name a model, or a class or function that returns a model when called without "
        "arguments.",
        "python -m snnfx explain models.csnn",
        "python -m snnfx explain models.csnn:build",
    ),
    "SNNFX603": CodeEntry(
        "unknown file type",
        "snnfx.draw writes .svg, .png, .pdf and .dot files; a profile is written to .html, .md or .json.",
        'snnfx.draw(net, "net.jpg")',
        'snnfx.draw(net, "net.png")',
    ),
    # 61x: online training
    "SNNFX610": CodeEntry(
        "input and target of an online rule differ in length",
        "An online rule evaluates the loss at every time step, so the target needs the time steps and the batch size "
        "of the input. For one target for all steps, pass target_dim=None.",
        "trainer.step(x_seq, labels)                                  # x_seq: [T, N, ...], labels: [N]",
        "Trainer(net, rule, optimizer, loss, target_dim=None).step(x_seq, labels)",
    ),
    "SNNFX611": CodeEntry(
        "the loss of a step is not a scalar",
        "A loss function takes the outputs and the target of one time step and must return a scalar with a gradient.",
        "loss=lambda y, target: (y - target) ** 2",
        "loss=lambda y, target: ((y - target) ** 2).mean()",
    ),
    "SNNFX612": CodeEntry(
        "the optimizer has parameters of another model",
        "All parameters of the optimizer must belong to the model; others would never get a gradient.",
        "Trainer(net, rule, torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1), loss)",
        "Trainer(net, rule, torch.optim.SGD(net.parameters(), lr=0.1), loss)",
    ),
    "SNNFX613": CodeEntry(
        "the running averages do not match the optimizer",
        "w_ra must have one tensor for each parameter of the optimizer, in the same order and of the same shape.",
        "w_ra = []",
        "w_ra = fptt_online_training_init_w_ra(optimizer)",
    ),
    "SNNFX614": CodeEntry(
        "a number of time steps is out of range",
        "Lengths of chunks, of truncation and of intervals between updates are at least one time step; the number of "
        "randomly chosen steps is at most the length of the sequence.",
        "trainer = Trainer(net, SLTT_K(8), optimizer, loss); trainer.step(x_seq[:4], target[:4])",
        "trainer = Trainer(net, SLTT_K(4), optimizer, loss); trainer.step(x_seq[:4], target[:4])",
    ),
    "SNNFX615": CodeEntry(
        "the leak of a trace is not a single number",
        "An eligibility trace decays with the leak of the neuron that the weight feeds. That leak depends on the "
        "potential or the input, the weight feeds neurons with different leaks, a fixed leak was changed to differ "
        "between neurons, or no neuron emits the operand. Pass the leak.",
        "Trainer(net, OTTT_A, optimizer, loss)                        # a weight feeds a CUBALIFNode: two leaks",
        "Trainer(net, OTTT_A(trace_leak=0.5), optimizer, loss)",
    ),
    "SNNFX616": CodeEntry(
        "the rule contradicts itself or does not apply",
        "The settings of an online rule exclude each other, or the rule cannot train this kind of model.",
        'Rule(operand="trace", temporal="keep")',
        'Rule(operand="trace", temporal="cut")',
    ),
    "SNNFX617": CodeEntry(
        "a loss is evaluated step by step",
        "torch.vmap could not evaluate the loss for all time steps of a chunk at once, so the loss is evaluated step "
        "by step. The result is the same, only slower.",
        "loss=lambda y, target: my_loss(y, target) if y.sum().item() > 0 else y.sum()",
        "loss=lambda y, target: torch.where(y.sum() > 0, my_loss(y, target), y.sum())",
    ),
    "SNNFX618": CodeEntry(
        "weights without an eligibility trace",
        "Linear layers, convolutions and products with a weight have an eligibility trace. Weights of other "
        "operations, and of modules that could not be traced, get the gradient of the current time step only, as in "
        "SLTT.",
        "torch.einsum('bi,oi->bo', spikes, self.weight)",
        "torch.nn.functional.linear(spikes, self.weight)",
    ),
    "SNNFX619": CodeEntry(
        "a learned initial state gets no gradient",
        "A rule that detaches the states between steps detaches their initial values as well, so parameters of an "
        "initial state are not trained. Restrict the cut to other states, or freeze the initial state.",
        "Trainer(net, SLTT, optimizer, loss)                      # before the first step: self.h = self.start.expand_as(x)",
        'Trainer(net, SLTT(cut=("other.v",)), optimizer, loss)   # or freeze the initial state',
    ),
    "SNNFX620": CodeEntry(
        "no trace for each neuron",
        "Each neuron has a leak of its own, so a weight needs an eligibility trace for each of its output channels. The "
        "leak must be the same for all neurons that one channel feeds: it must not differ over space, and no operation "
        "between the weight and the neurons may mix or move channels. Pass one leak, or use one leak for each channel.",
        "Trainer(net, OTTT_A, optimizer, loss)                        # a convolution feeds leaks [C, H, W]",
        "Trainer(net, OTTT_A(trace_leak=0.5), optimizer, loss)        # or leaks [C, 1, 1]",
    ),
    "SNNFX622": CodeEntry(
        "the state of a trainer does not match",
        "Trainer.load_state_dict restores FPTT's running averages and multipliers, one for each parameter of the "
        "optimizer. The saved state has another number of parameters or other shapes, or is not the state of a trainer.",
        "trainer.load_state_dict(optimizer.state_dict())",
        "trainer.load_state_dict(torch.load('trainer.pt'))  # saved with torch.save(trainer.state_dict(), 'trainer.pt')",
    ),
    # 8xx: export
    "SNNFX801": CodeEntry(
        "an option of the export is illegal",
        "The suffix of the path selects the format: .pt2, .onnx or .nir. The dynamic axes are T and N; package is None or "
        '"aot". A net whose graph was replaced by hand cannot be exported, because the export starts from its step '
        "program.",
        'snnfx.export(net, "net.pth", x_seq)',
        'snnfx.export(net, "net.pt2", x_seq)',
    ),
    "SNNFX802": CodeEntry(
        "the exported file cannot be written",
        "The folder does not exist, the path is a folder, or files may not be created there. Nothing was written.",
        'snnfx.export(net, "missing_folder/net.pt2", x_seq)',
        'snnfx.export(net, "net.pt2", x_seq)',
    ),
    "SNNFX803": CodeEntry(
        "a package for the format is missing",
        "ONNX files are written with onnx and onnxscript and checked with onnxruntime. NIR files are written and read "
        "with nir.",
        'snnfx.export(net, "net.onnx", x_seq)              # without onnxruntime',
        "pip install snnfx[onnx]",
    ),
    "SNNFX804": CodeEntry(
        "a part of the model runs as Python code",
        "A module that could not be traced is called at every step. A file cannot contain its Python code.",
        "def forward(self, x):\n    return x if x.sum() > 0 else -x",
        "def forward(self, x):\n    return torch.where(x.sum(1, keepdim=True) > 0, x, -x)   # for each sample",
    ),
    "SNNFX805": CodeEntry(
        "torch cannot trace a part of the net",
        "The code of a step reads values of tensors in Python, or calls something that has no ATen form.",
        "x = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8).dequantize()",
        "x = (x / 0.1).round() * 0.1",
    ),
    "SNNFX806": CodeEntry(
        "an axis cannot be dynamic",
        "The net is valid for one size of this axis only, because its code uses the size as a number. Export it for "
        "the size of the given inputs.",
        'snnfx.export(net, "net.pt2", x_seq)               # self.fc(x).view(4, 4) in the step',
        'snnfx.export(net, "net.pt2", x_seq, dynamic=("T",))',
    ),
    "SNNFX807": CodeEntry(
        "the format cannot express the net",
        "An AOTInductor package has at most one dynamic axis: T (loops as scan) or N (loops unrolled to the T of the "
        "inputs). For ONNX, an operation may have no translation, or none in this dtype.",
        'snnfx.export(net, "net.pt2", x_seq, package="aot")',
        'snnfx.export(net, "net.pt2", x_seq, package="aot", dynamic=("T",))',
    ),
    "SNNFX808": CodeEntry(
        "the exported file does not reproduce the net",
        "Before it is kept, an exported file runs once in a process without snnfx on the given inputs. It failed, or its "
        "results differ from those of the net. Nothing was written.",
        'snnfx.export(net, "net.onnx", x_seq)              # an operation is wrong in onnxruntime',
        'snnfx.export(net, "net.pt2", x_seq)',
    ),
    "SNNFX809": CodeEntry(
        "a few elements differ after export",
        "At most one element in a hundred of an output differs from the net. Another order of summation rounds "
        "differently, and a potential at the threshold then crosses it or not.",
        'snnfx.export(net, "net.onnx", x_seq)              # float32, potentials at the threshold',
        'snnfx.export(net.double(), "net.pt2", x_seq.double())',
    ),
    "SNNFX810": CodeEntry(
        "the exported file draws random numbers",
        "Its results differ from call to call, so only shapes and dtypes were compared.",
        "x = (torch.rand_like(x) < x).float()    # in the model",
        "x = (x > 0.5).float()                   # or encode x_seq before the call of the net",
    ),
    "SNNFX811": CodeEntry(
        "the net was in training mode",
        "An exported file computes the net in evaluation mode: BatchNorm with running statistics, no dropout.",
        'snnfx.export(net.train(), "net.pt2", x_seq)',
        'snnfx.export(net.eval(), "net.pt2", x_seq)',
    ),
    "SNNFX812": CodeEntry(
        "a buffer that calls change is constant in the file",
        "A call of the net changes a buffer or parameter of the model. A file has no memory: each call starts from the "
        "value at the time of the export, unless the state is an input.",
        'snnfx.export(net, "net.pt2", x_seq)',
        'snnfx.export(net, "net.pt2", x_seq, state=True)',
    ),
    "SNNFX813": CodeEntry(
        "a layer has no form in NIR",
        "NIR has matrices, convolutions, Flatten, average and sum pooling, factors, delays and neurons. BatchNorm in "
        "evaluation mode becomes part of the layer before it.",
        "net = snnfx.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(2))).eval()\n"
        'snnfx.export(net, "net.nir", x_seq)',
        "net = snnfx.convert(nn.Sequential(nn.Conv2d(1, 4, 3), nn.AvgPool2d(2))).eval()\n"
        'snnfx.export(net, "net.nir", x_seq)',
    ),
    "SNNFX814": CodeEntry(
        "a neuron has no form in NIR",
        "The neurons of NIR have a linear potential, a constant threshold, and a reset to a value. The neuron was run on "
        "random inputs, and it does not follow this equation: its reset subtracts, its threshold adapts, or its "
        "potential is not linear.",
        'net = snnfx.convert(snnfx.neuron.LIFNode(v_reset=None)).eval()\nsnnfx.export(net, "net.nir", x_seq)',
        'net = snnfx.convert(snnfx.neuron.LIFNode(v_reset=0.0)).eval()\nsnnfx.export(net, "net.nir", x_seq)',
    ),
    "SNNFX815": CodeEntry(
        "a neuron does not start where readers of NIR assume",
        "A NIR file has no initial potential. Readers start spiking neurons at v_reset and integrators at v_leak. "
        "snnfx.from_nir reads another initial potential from the metadata of the node.",
        'self.register_memory("v", 0.3)                    # v_reset is 0',
        'self.register_memory("v", 0.0)',
    ),
    "SNNFX816": CodeEntry(
        "a NIR graph cannot be imported",
        "A node has no form in PyTorch, a parameter has no meaning at this time step, or a cycle has no neuron and no "
        "delay.",
        'snnfx.from_nir("net.nir", dt=1.0)                 # tau is 2e-4',
        'snnfx.from_nir("net.nir", dt=1e-4)',
    ),
    "SNNFX817": CodeEntry(
        "a NIR file cannot be read",
        "The file does not exist, or it is no NIR file.",
        'snnfx.from_nir("missing.nir")',
        'snnfx.from_nir("net.nir")',
    ),
    "SNNFX818": CodeEntry(
        "a file is not checked for the smallest sizes",
        "A file with dynamic axes is also compared with the net for one time step and one sample. The net itself raises "
        "an error for these sizes, so the file may fail there, too.",
        "return x.squeeze()[:, None]             # in the model: fails for a batch of 1",
        "return x.squeeze(1)[:, None]",
    ),
    "SNNFX819": CodeEntry(
        "a model that mixes time steps cannot be exported",
        'A model converted with takes="sequence" may combine time steps outside of its loops, as attention over time '
        "does. It has no step that a file could repeat.",
        "x_seq = x_seq - x_seq.mean(0)           # over all time steps\n"
        "return torch.stack([self.step(x) for x in x_seq])",
        "return torch.stack([self.step(x) for x in x_seq])   # the caller subtracts the mean",
    ),
    "SNNFX820": CodeEntry(
        "a file cannot be loaded",
        "The file is truncated, was changed, or was not written by snnfx.save. Nothing in it was run, and the model has "
        "not changed.",
        'snnfx.load("weights.pt", model)                   # written by torch.save',
        'snnfx.load("net.safetensors", model)              # written by snnfx.save',
    ),
    "SNNFX821": CodeEntry(
        "a saved net does not match the model",
        "A parameter, buffer or state of the file is missing in the model or has another shape or dtype, or the model "
        "has one that the file lacks. The model has not changed.",
        'snnfx.load("net.safetensors", CSNN(channels=32))  # saved with 64 channels',
        'snnfx.load("net.safetensors", CSNN(channels=64))',
    ),
    "SNNFX822": CodeEntry(
        "the saved plan is not used",
        "The plan of a net depends on the code, modules and settings of the model and on the versions of snnfx and "
        "torch. One of them differs, or the file has no plan: the model was converted again with the saved options.",
        'snnfx.load("net.safetensors", model)              # the forward of the model was edited',
        'snnfx.save(net, "net.safetensors")                # save the net again',
    ),
    "SNNFX823": CodeEntry(
        "the passes of a saved conversion are missing",
        "A file has the names of the passes given to snnfx.convert, not their code.",
        'snnfx.load("net.safetensors", model)',
        'snnfx.load("net.safetensors", model, passes=[MyPass()])',
    ),
    "SNNFX824": CodeEntry(
        "a net cannot be saved",
        "The file has tensors and plain values only. A net that an online rule has edited, a graph replaced by hand, "
        "extra state in the state_dict and sparse or quantized tensors have no such form.",
        'snnfx.save(edited_net, "net.safetensors")',
        'snnfx.save(net, "net.safetensors")                # before the rule is applied',
    ),
    "SNNFX825": CodeEntry(
        "chunks and memory budgets are not exported",
        "The net runs long sequences in chunks; an exported file computes all time steps of a call at once. With "
        "state=True, a file computes long sequences in pieces.",
        'snnfx.export(snnfx.convert(model, chunk=16), "net.pt2", x_seq)',
        'snnfx.export(snnfx.convert(model), "net.pt2", x_seq, state=True)',
    ),
    "SNNFX826": CodeEntry(
        "the exported file has no batch dimension",
        "A layer takes the input of one step as one sample, without a batch dimension, and the step fails for another "
        "size of its first dimension. So this dimension is not the batch, and only T is dynamic.",
        'snnfx.export(net, "net.pt2", torch.rand(T, features))',
        'snnfx.export(net, "net.pt2", torch.rand(T, features), dynamic=("T",))',
    ),
    "SNNFX827": CodeEntry(
        "onnxruntime cannot run the exported file on a CPU",
        "onnxruntime has no CPU kernel for an operation in this dtype, such as convolutions in float64 and most "
        "operations in bfloat16. So the file could not be checked, and nothing was written.",
        'snnfx.export(net.double(), "net.onnx", x_seq.double())   # with a convolution',
        'snnfx.export(net.float(), "net.onnx", x_seq)',
    ),
    "SNNFX828": CodeEntry(
        "a package for the format is broken",
        "The package is installed, but importing it fails. The message has the error of the import.",
        'snnfx.export(net, "net.onnx", x_seq)              # import onnx fails',
        "pip install --force-reinstall onnx",
    ),
    "SNNFX829": CodeEntry(
        "a state of an exported net changes its dtype after the first step",
        "A file stores a state in the dtype of later steps. The first step gives the state values that this dtype "
        "does not have, for example a float potential where later steps store a mask.",
        "self.v = x if self.v is None else self.v + x > 1",
        "self.v = x if self.v is None else (self.v + x > 1).to(x.dtype)",
    ),
    # 9xx: pictures and progress
    "SNNFX901": CodeEntry(
        "a picture cannot have this depth or profile",
        "`depth` is the number of levels of modules that are drawn open, so it is 0 or more. `profile` is a report of "
        "snnfx.profile, which has the firing rates.",
        "snnfx.draw(net, depth=-1)",
        "snnfx.draw(net, depth=1, profile=snnfx.profile(net, x_seq))",
    ),
}
"""All codes, in groups; `snnfx.errors.describe_code` prints an entry."""
