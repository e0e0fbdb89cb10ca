"""The registry of codes: one documented entry for each message (see `snnfx.errors`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CODES", "CodeEntry"]


@dataclass(frozen=True)
class CodeEntry:
    """Documentation of one code: a title, what it means, a failing example and the fixed one."""

    title: str
    meaning: str
    fails: str = ""
    works: str = ""


CODES: dict[str, CodeEntry] = {
    # 1xx: why a node is not folded
    "SNNFX101": CodeEntry(
        "no rule for this operation",
        "The table of batch rules has no row for this function, method or module, so nothing proves that T time "
        "steps may be run as one large batch. The node is mapped over time with torch.vmap, which is always right.",
        "y = torch.fft.fft(x)          # no row",
        "nothing to do; or fold it by hand inside a module you vouch for",
    ),
    "SNNFX102": CodeEntry(
        "the step has no batch dimension here",
        "The operation needs a batch dimension in front of the feature dimensions to be folded, and the value it gets "
        "at one step has too few dimensions. It is mapped over time.",
        "net(torch.rand(T, features))",
        "net(torch.rand(T, N, features))",
    ),
    "SNNFX103": CodeEntry(
        "the operation mixes samples of the batch",
        "It reduces, indexes, sorts, or concatenates along the batch dimension. Folding time into the batch would mix "
        "time steps, so the node is mapped over time.",
        "x = x - x.mean(0)",
        "x = x - x.mean(1, keepdim=True)",
    ),
    "SNNFX104": CodeEntry(
        "a literal batch size",
        "A shape argument is a number that stands where the batch dimension is; with T steps folded in, it would be wrong. "
        "The node is mapped over time.",
        "x = x.view(32, -1)",
        "x = x.view(x.shape[0], -1)   # or x.flatten(1)",
    ),
    "SNNFX105": CodeEntry(
        "operands do not share the batch dimension",
        "The operands of this operation carry their batch in different places or with sizes that are not proven equal, "
        "or one of them varies in time without having a batch dimension. The node is mapped over time.",
        "y = x + gain_t               # x: [N, C], gain_t: [C] at each step",
        "y = x + gain_t.expand_as(x)  # or leave it: it is right, only slower",
    ),
    "SNNFX106": CodeEntry(
        "BatchNorm with statistics per time step",
        'With batch_norm="per_step" a BatchNorm in training uses the statistics of one time step at a time, exactly as the '
        "stepped model does. It is vectorised over T, but not folded.",
        'snnfx.convert(model, batch_norm="per_step")',
        'snnfx.convert(model, batch_norm="fold")   # statistics over T*N',
    ),
    "SNNFX107": CodeEntry(
        "sequential: on a cycle through time",
        "The value of this node at step t depends on its own value at an earlier step, so it has to be stepped.",
        "self.h = self.cell(self.fc(torch.cat([x, self.h], 1)))   # fc is on the cycle",
        "self.h = self.cell(self.fc_x(x) + self.fc_h(self.h))     # fc_x is not, and is folded",
    ),
    "SNNFX108": CodeEntry(
        "opaque: could not be traced",
        "The module could not be turned into a graph. It is run step by step as it is; what it keeps as state is "
        "handed from step to step.",
        "def forward(self, x):\n    if x.sum() > 0: ...",
        "def forward(self, x):\n    return torch.where(x.sum() > 0, ..., ...)",
    ),
    "SNNFX109": CodeEntry(
        "torch.vmap refused",
        "The node may not be folded and torch.vmap has no rule for it, so it is stepped.",
        "h = self.gru(x)",
        "h = self.cell(x, h)",
    ),
    "SNNFX110": CodeEntry(
        "sizes or shapes read as numbers",
        "The program computes with the size of the batch outside of a shape argument, so the result depends on how many "
        "samples there are. The node is mapped over time.",
        "y = x / x.shape[0]",
        "y = x / x.shape[1]",
    ),
    "SNNFX111": CodeEntry(
        "an unknown rank",
        "Without example_inputs the number of dimensions of this value is not known, and the rule depends on it. "
        "The node is mapped over time.",
        "net = snnfx.convert(model)",
        "net = snnfx.convert(model, example_inputs=(x,))",
    ),
    # 2xx: capture
    "SNNFX201": CodeEntry(
        "the model cannot be traced",
        "The forward of the top-level model does something that depends on the values of tensors, or uses a Python "
        "feature that torch.fx cannot record.",
        "def forward(self, x):\n    if x.sum() > 0: return x\n    return -x",
        "def forward(self, x):\n    return torch.where(x.sum() > 0, x, -x)",
    ),
    "SNNFX202": CodeEntry(
        "control flow on shapes needs example inputs",
        "The model asks for the shape of a value while it is being traced; without example_inputs there is no answer.",
        "snnfx.convert(model)",
        "snnfx.convert(model, example_inputs=(torch.rand(2, 1, 28, 28),))",
    ),
    "SNNFX203": CodeEntry(
        "the forward loops over time itself",
        "One stateful module is called many times in a chain within one forward: this is a model that already runs a "
        "whole sequence. snnfx converts the model of ONE step.",
        "def forward(self, x):\n    for step in range(25):\n        spk = self.lif(self.fc(x))",
        'def step(self, x):\n    return self.lif(self.fc(x))\n\nsnnfx.convert(model, entry="step")',
    ),
    "SNNFX204": CodeEntry(
        "already in multi-step mode",
        "A module of the model is set to process whole sequences. snnfx converts single-step models.",
        'neuron.LIFNode(step_mode="m")',
        'neuron.LIFNode(step_mode="s")',
    ),
    "SNNFX205": CodeEntry(
        "a module that has no single-step form",
        "The module is defined on whole sequences only, so there is no step graph to convert.",
        "neuron.PSN(T=8)",
        "neuron.LIFNode(tau=2.0)",
    ),
    "SNNFX206": CodeEntry(
        "a buffer is changed in place",
        "A forward that is traced changes a buffer or a parameter in place; state has to be read and written as an "
        "attribute so that it can be handed from step to step.",
        "self.count += 1   # a registered buffer",
        'self.register_memory("count", 0.0)   # in a snnfx.MemoryModule',
    ),
    "SNNFX207": CodeEntry(
        "lazy modules are not initialised",
        "A lazy module has no weights yet. Run the model once before converting it.",
        "snnfx.convert(nn.Sequential(nn.LazyLinear(10)))",
        "model(x); snnfx.convert(model)",
    ),
    "SNNFX208": CodeEntry(
        "hooks that would be lost",
        "The model itself or a container that is traced through has forward hooks. They would never run in the converted net.",
        "model.register_forward_hook(hook)",
        "model.conv1.register_forward_hook(hook)   # hooks on leaf modules are kept",
    ),
    "SNNFX209": CodeEntry(
        "an operation in place on an input",
        "The step changes its own input. In the converted net that would change the caller's sequence.",
        "def forward(self, x):\n    x.mul_(2)",
        "def forward(self, x):\n    x = x * 2",
    ),
    "SNNFX210": CodeEntry(
        "the initial state depends on the step itself",
        "The first value of a state is computed from something that needs this state already.",
        "if self.v is None: self.v = self.lif(self.w(self.v_other)); self.v_other = self.v",
        "if self.v is None: self.v = torch.zeros_like(x)",
    ),
    "SNNFX211": CodeEntry(
        "the forward takes arguments that cannot be captured",
        "Inputs have to be tensors, or nested tuples, lists and dicts of tensors. Other values are fixed at conversion.",
        "def forward(self, *xs): ...    # snnfx.convert(model): how many?",
        "snnfx.convert(model, example_inputs=(x1, x2))",
    ),
    "SNNFX212": CodeEntry(
        "tracing changed with the first step",
        "The first step and the later ones do different things; the first step is run on its own (peeled).",
        "if self.h is None: y = self.first(x)   # another layer at the first step\nelse: y = self.later(x, self.h)",
        "if self.h is None: self.h = torch.zeros_like(x)\ny = self.later(x, self.h)   # an initial value: nothing is peeled",
    ),
    "SNNFX213": CodeEntry(
        "an undeclared state in a module that cannot be traced",
        "A module that is run as it is changes one of its attributes in a step, and the attribute is not registered as "
        "a state; its value would leak from one call of the net into the next.",
        "self.mem = ...   # in a plain nn.Module with data-dependent control flow",
        'self.register_memory("mem", None)   # in a snnfx.MemoryModule',
    ),
    "SNNFX214": CodeEntry(
        "an operation in place that cannot be made functional",
        "The step changes a tensor in place that shares memory with another value, or the operation exists only in place.",
        "x[:, 0].mul_(2)",
        "x = torch.cat([x[:, :1] * 2, x[:, 1:]], dim=1)",
    ),
    "SNNFX215": CodeEntry(
        "random numbers that the graph does not record",
        "The step draws random numbers in a way that leaves no node in the graph, for instance by filling a new tensor in "
        "place; the numbers of the capture would be used in every call.",
        "noise = torch.empty(5).normal_()",
        "noise = torch.randn(5)",
    ),
    "SNNFX216": CodeEntry(
        "an input or output that is no nest of tensors",
        "What a step takes and returns are tensors, numbers and the like, or tuples, lists, dicts and named tuples of them "
        "(pytrees). Generators are used up by being looked at; tensors inside other objects, NumPy arrays and sets would be "
        "fixed at conversion, or lost.",
        "def forward(self, x): return Output(spikes=self.lif(x))   # a plain class",
        "class Output(NamedTuple): ...   # or torch.utils._pytree.register_dataclass(Output)",
    ),
    "SNNFX217": CodeEntry(
        "a state is set to what is no state of a net",
        "The step gives a neuron's state, from outside of the neuron, a value that no slot can have: None, or something that "
        "is no tensor.",
        "s = self.lif(x); self.lif.v = None",
        "s = self.lif(x); self.lif.v = torch.zeros_like(s)",
    ),
    "SNNFX218": CodeEntry(
        "a step changes something that a net cannot hand on",
        "State in tensors and numbers is found in the attributes of modules, and in lists, tuples, dicts and deques there. "
        "What a step changes elsewhere, or of another kind (a string, an attribute of a plain object, a set, a setting of a "
        "layer), would stay at its first value, so it is refused.",
        "self.state.v = x if self.state.v is None else self.state.v + x   # a plain object",
        "self.v = x if self.v is None else self.v + x",
    ),
    # 3xx: inputs of a call
    "SNNFX301": CodeEntry(
        "no time steps",
        "A sequence has to have at least one time step.",
        "net(torch.rand(0, 2, 3))",
        "net(torch.rand(1, 2, 3))",
    ),
    "SNNFX302": CodeEntry(
        "split_size below 1",
        "A chunk has at least one time step.",
        "chunk_multi_step_forward(0, x_seq, net)",
        "chunk_multi_step_forward(16, x_seq, net)",
    ),
    "SNNFX303": CodeEntry(
        "leading dimensions differ",
        "All sequences have to agree on T, and those that are folded on the batch size as well.",
        "net(torch.rand(8, 2, 3), torch.rand(7, 2, 3))",
        "net(torch.rand(8, 2, 3), torch.rand(8, 2, 3))",
    ),
    "SNNFX304": CodeEntry(
        "neither a module nor a callable",
        "Expected an nn.Module, a callable, or a list or tuple of them.",
        "multi_step_forward(x_seq, 3)",
        "multi_step_forward(x_seq, nn.Linear(3, 2))",
    ),
    "SNNFX305": CodeEntry(
        "not a tensor",
        "Sequences are tensors, or nested tuples, lists and dicts of tensors.",
        "net([1, 2, 3])",
        "net(torch.tensor([[1.0], [2.0], [3.0]]))",
    ),
    "SNNFX306": CodeEntry(
        "too few dimensions for a sequence",
        "The input has no room for the time dimension (and, where it is folded, the batch dimension).",
        "net(torch.rand(8))",
        "net(torch.rand(8, 1, 3))",
    ),
    "SNNFX307": CodeEntry(
        "the arguments do not fit the captured step",
        "The net was captured for other arguments: another number of inputs, another nesting, or another constant.",
        "net = snnfx.convert(model, example_inputs=(x, True)); net(x_seq, False)",
        "net = snnfx.convert(model, example_inputs=(x, False)); net(x_seq, False)",
    ),
    "SNNFX308": CodeEntry(
        "unknown or missing state",
        "The state passed has other keys than the slots of the net, or the shape of another batch.",
        'net.run(x_seq, state={"lif.u": v})',
        'net.run(x_seq, state={"lif.v": v})',
    ),
    "SNNFX309": CodeEntry(
        "an option has no such value",
        "The option does not take this value; the message says which it takes.",
        'snnfx.convert(model, batch_norm="frozen")',
        'snnfx.convert(model, batch_norm="per_step")',
    ),
    "SNNFX310": CodeEntry(
        "the number of time steps is not known",
        "No input carries a time dimension (time_dim=None everywhere), so T has to be said.",
        "net(image)",
        "net(image, T=8)",
    ),
    "SNNFX311": CodeEntry(
        "nothing of that name to record",
        "record= takes qualified names of modules that are called in a step, or of state slots.",
        'net.run(x_seq, record=("lif9",))',
        'net.run(x_seq, record=("lif1", "lif1.v"))',
    ),
    "SNNFX312": CodeEntry(
        "a size differs from the one the step was captured with",
        "The model's Python code used a size as a number while it was captured, so the net only holds for that size.",
        "for i in range(x.shape[1]): ...",
        "snnfx.convert(model, example_inputs=(x_of_the_new_size,))",
    ),
    "SNNFX313": CodeEntry(
        "the outputs do not form a sequence",
        "What a module returned cannot be put together over time: its batch is no multiple of T (then it is not "
        "batch-equivariant), its nesting changes from step to step, or it is not made of tensors.",
        "seq_to_ann_forward(x_seq, lambda x: x.sum(0))",
        "map_forward(x_seq, lambda x: x.sum(0))",
    ),
    "SNNFX314": CodeEntry(
        "which outputs are the state is not clear",
        "The step has arguments that default to None and look like state, and returns several values, but their numbers "
        "do not match or their names do not tell. A wrong guess would feed one value into another.",
        "snnfx.convert(model)                             # forward(self, x, mem=None) -> (spk, aux, mem)",
        'snnfx.convert(model, carry={"mem": 2})           # carry={} if no argument is carried',
    ),
    "SNNFX315": CodeEntry(
        "a plain value of the model changed after conversion",
        "A number, flag or string that the model's code reads (`self.tau`, `if self.flag`) is part of the graph. The net "
        "notices at the next call that it changed, and captures the model again; it says so once. Where it cannot (inside "
        "torch.compile, or after the graph was replaced by hand) it raises, instead of going on with the old value. "
        "Neurons and layers that stay one call read their own settings at every call, and need none of this.",
        "net = torch.compile(snnfx.convert(model), fullgraph=True); net(x_seq); model.tau = 3.0; net(x_seq)",
        'self.register_buffer("tau", torch.tensor(2.0))   # live; or call the net itself once after the change',
    ),
    "SNNFX317": CodeEntry(
        "time cannot be cut here",
        'With batch_norm="fold" a BatchNorm in training takes its statistics over all time steps together. Running some '
        "steps after the others (checkpoint=<steps>, net.stream) would give each part statistics of its own.",
        "snnfx.convert(model, checkpoint=16)",
        'snnfx.convert(model, checkpoint="regions")       # or batch_norm="per_step"; in evaluation mode there is no limit',
    ),
    "SNNFX318": CodeEntry(
        "the memory budget cannot be met",
        "Even with one time step at a time (in training: with everything computed again in the backward pass) the net "
        "allocates more. The message says the least that would do, and which region needs it.",
        "snnfx.convert(model, memory_budget=1000)(x_seq)",
        "snnfx.convert(model, memory_budget=2 * 2**30)    # bytes; or a smaller batch",
    ),
    "SNNFX319": CodeEntry(
        "no memory to draw",
        "The memory of the net could not be predicted, neither in inference nor in training: a shape depends on values, "
        "only the caller has the first state, or nothing fits the budget. The message says which.",
        'snnfx.explain(model, example_inputs=x, T=16, memory_budget=1000).memory.save("memory.svg")',
        'snnfx.explain(model, example_inputs=x, T=16, memory_budget="2GiB").memory.save("memory.svg")',
    ),
    "SNNFX316": CodeEntry(
        "a kernel is differentiated twice",
        "A loop that runs as one generated kernel has a first derivative only; the gradient of its gradient "
        "(create_graph=True) is not generated. It is said when the first derivative is taken with create_graph=True.",
        "net = snnfx.convert(model); (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)",
        "net = snnfx.convert(model, lower=None)   # PyTorch runs every step, and can",
    ),
    # 4xx: verification
    "SNNFX401": CodeEntry(
        "outputs differ",
        "The net's output is not that of the stepped model. In float32 a potential at the threshold may round to the other "
        "side, and that spike then differs: compare in float64 first. If it still differs, it is a fault of snnfx.",
        "snnfx.verify(model, net, x_seq)                # one spike in a million differs",
        "snnfx.verify(model, net, x_seq, double=True)",
    ),
    "SNNFX402": CodeEntry(
        "final states differ",
        "The state after the last step is not that of the stepped model; see SNNFX401.",
        "snnfx.verify(model, net, x_seq)",
        "snnfx.verify(model, net, x_seq, double=True)",
    ),
    "SNNFX403": CodeEntry(
        "gradients differ",
        "A gradient is not that of the stepped model; see SNNFX401.",
        "snnfx.verify(model, net, x_seq)",
        "snnfx.verify(model, net, x_seq, double=True)",
    ),
    "SNNFX404": CodeEntry(
        "buffers differ",
        "Running statistics, or other buffers, are not those of the stepped model; see SNNFX401.",
        "snnfx.verify(model, net, x_seq)",
        "snnfx.verify(model, net, x_seq, double=True)",
    ),
    "SNNFX405": CodeEntry(
        "the declared semantics does not apply",
        'With batch_norm="fold", a BatchNorm in training takes its statistics over all time steps at once. That has no '
        "meaning where the steps call different layers, or where the statistics depend on the layer's own output at an "
        "earlier step, so there is nothing to compare with.",
        'snnfx.verify(model, snnfx.convert(model, batch_norm="fold"), x_seq)',
        'snnfx.verify(model, snnfx.convert(model, batch_norm="per_step"), x_seq)',
    ),
    # 5xx: passes
    "SNNFX501": CodeEntry(
        "a pass broke the graph",
        "The verifier between passes found the graph invalid. The message names the pass and the node.",
        "program.graph.erase_node(node)   # in a pass: somebody still reads the slot",
        "node.replace_all_uses_with(new); program.graph.erase_node(node)",
    ),
    "SNNFX502": CodeEntry(
        "passes in an illegal order",
        "A pass was run at a stage that it does not take: `requires` and `ensures` of the passes do not meet.",
        "PassManager([Partition(), Normalize()]).run(program)",
        "PassManager([Normalize(), Partition()]).run(program)",
    ),
    "SNNFX503": CodeEntry(
        "a region is gone",
        "A compiled or exported program calls a region of a net that no longer exists: it refers to the loops of the "
        "living net, so it runs in the same process only, and as long as the net is there.",
        "exported = torch.export.export(net, (x_seq,)); del net; exported.module()(x_seq)",
        "exported = torch.export.export(net, (x_seq,)); exported.module()(x_seq)   # net is kept",
    ),
    "SNNFX504": CodeEntry(
        "a fallback was taken",
        "A faster form of a region was refused at run time and a slower one is used from now on; the result is the same.",
        "y[mask] = 0                  # torch.vmap has no rule for a boolean index: stepped",
        "y = y.masked_fill(mask, 0)   # mapped, or folded",
    ),
    "SNNFX506": CodeEntry(
        "a compiled net is not checkpointed",
        "Under torch.compile the compiler's own partitioner decides what is kept for the backward pass and what is computed "
        "again; checkpoint= and memory_budget= act on training only when the net is not compiled.",
        'torch.compile(snnfx.convert(model, checkpoint="regions"))(x_seq).sum().backward()',
        'snnfx.convert(model, checkpoint="regions")(x_seq).sum().backward()',
    ),
    "SNNFX508": CodeEntry(
        "a memory budget that is not kept",
        "memory_budget= could not be taken into account: the bytes of the net cannot be told from shapes, because it looks "
        "at values, or what was asked for besides (checkpoint=, record=) needs more. The result is the same.",
        "snnfx.convert(model, memory_budget=2**30)            # a part of the model calls .item()",
        'snnfx.convert(model, checkpoint="regions", chunk=16)',
    ),
    "SNNFX507": CodeEntry(
        "out of memory",
        "An allocation failed while the net ran. The message names the region and a plan that is predicted to need less.",
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
    "SNNFX505": CodeEntry(
        "no kernel could be built",
        "A loop could run as one generated kernel, but there is no C++ compiler (on a GPU: no Triton), it failed, or "
        "SNNFX_KERNELS=0 forbids it. PyTorch runs the loop step by step instead: the same result, slower.",
        "a machine without g++ and clang++",
        "apt install g++   # or set CXX; or convert(model, lower=None), which asks for no kernels",
    ),
    # 6xx: tools around the library
    "SNNFX601": CodeEntry(
        "graphviz is missing",
        "Drawing to SVG or PNG needs the program `dot` and the Python package graphviz.",
        'snnfx.draw(net, "net.svg")',
        'apt install graphviz; pip install "snnfx[draw]"   # or draw to a .dot file',
    ),
    "SNNFX602": CodeEntry(
        "cannot load the model",
        "The path pkg.module:factory does not lead to a model, or to a function that makes one without arguments.",
        "python -m snnfx explain models.csnn",
        "python -m snnfx explain models.csnn:build",
    ),
    "SNNFX603": CodeEntry(
        "unknown file type",
        "draw writes .svg, .png, .pdf and .dot.",
        'snnfx.draw(net, "net.jpg")',
        'snnfx.draw(net, "net.png")',
    ),
    # 61x: online training
    "SNNFX610": CodeEntry(
        "input and target of an online rule differ in length",
        "An online rule takes a loss at every time step, so the target has as many steps and as large a batch as the "
        "input. One target for all steps is said with target_dim=None.",
        "trainer.step(x_seq, labels)                                  # x_seq: [T, N, ...], labels: [N]",
        "Trainer(net, rule, optimizer, loss, target_dim=None).step(x_seq, labels)",
    ),
    "SNNFX611": CodeEntry(
        "the loss of a step is not a scalar",
        "A loss function takes the outputs and the target of one time step and returns one number with a gradient.",
        "loss=lambda y, target: (y - target) ** 2",
        "loss=lambda y, target: ((y - target) ** 2).mean()",
    ),
    "SNNFX612": CodeEntry(
        "the optimizer is not for this model",
        "All parameters of the optimizer have to be the model's: others would never get a gradient.",
        "Trainer(net, rule, torch.optim.SGD(copy.deepcopy(net).parameters(), lr=0.1), loss)",
        "Trainer(net, rule, torch.optim.SGD(net.parameters(), lr=0.1), loss)",
    ),
    "SNNFX613": CodeEntry(
        "the running averages do not fit the optimizer",
        "w_ra holds one tensor for each parameter of the optimizer, in its order and of its shape.",
        "w_ra = []",
        "w_ra = fptt_online_training_init_w_ra(optimizer)",
    ),
    "SNNFX614": CodeEntry(
        "a number of time steps is out of range",
        "Lengths of chunks, of truncation and of intervals between updates are at least one step; at random, at most "
        "all steps of the sequence can be chosen.",
        "trainer = Trainer(net, SLTT_K(8), optimizer, loss); trainer.step(x_seq[:4], target[:4])",
        "trainer = Trainer(net, SLTT_K(4), optimizer, loss); trainer.step(x_seq[:4], target[:4])",
    ),
    "SNNFX615": CodeEntry(
        "the leak of a trace is not one number",
        "An eligibility trace decays with the leak of a neuron. The neuron found has none that is a number (it differs "
        "from neuron to neuron or with the potential), or there are several neurons with different ones, or none.",
        "Trainer(net, OTTT_A, optimizer, loss)                        # a weight feeds a CUBALIFNode: two leaks",
        "Trainer(net, OTTT_A(trace_leak=0.5), optimizer, loss)",
    ),
    "SNNFX616": CodeEntry(
        "the rule contradicts itself or does not apply",
        "The choices of an online rule do not go together, or the model is of a kind that the rule cannot train.",
        'Rule(operand="trace", temporal="keep")',
        'Rule(operand="trace", temporal="cut")',
    ),
    "SNNFX617": CodeEntry(
        "a loss is evaluated step by step",
        "torch.vmap could not evaluate the loss for all time steps of a chunk at once. The numbers are the same, the "
        "loss takes longer.",
        "loss=lambda y, target: my_loss(y, target) if y.sum().item() > 0 else y.sum()",
        "loss=lambda y, target: torch.where(y.sum() > 0, my_loss(y, target), y.sum())",
    ),
    "SNNFX618": CodeEntry(
        "weights without an eligibility trace",
        "Linear layers, convolutions and products with a weight get a trace. Weights of other operations, and of a module "
        "that could not be traced, have the gradient of the same step alone, as in SLTT.",
        "torch.einsum('bi,oi->bo', spikes, self.weight)",
        "torch.nn.functional.linear(spikes, self.weight)",
    ),
    "SNNFX619": CodeEntry(
        "a learned first state gets no gradient",
        "A rule that cuts the states cuts what they are before the first step as well.",
        "Trainer(net, SLTT, optimizer, loss)                # self.v = self.first.expand_as(x) before the first step",
        "Trainer(net, SLTT(cut=('other.v',)), optimizer, loss)  # or freeze the first state",
    ),
}
