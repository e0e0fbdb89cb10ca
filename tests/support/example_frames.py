"""Code around the examples of messages that are calls: an example replaces the word EXAMPLE."""

from __future__ import annotations

__all__ = ["FRAMES"]

_THREE = "model = nn.Linear(3, 2); net = snnfx.convert(model); x_seq = torch.rand(5, 2, 3)\nEXAMPLE"
_NORM = "model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), neuron.LIFNode())\nEXAMPLE"
_LIBRARY = "from spikingjelly.activation_based import neuron\nmodel = nn.Sequential(EXAMPLE)\nsnnfx.convert(model)"
_NAMED = """
model = nn.Sequential()
for name, part in (("fc", nn.Linear(4, 4)), ("lif1", neuron.LIFNode()), ("lif", neuron.LIFNode())):
    model.add_module(name, part)
net, v = snnfx.convert(model), torch.zeros(N, 4)
EXAMPLE"""
_LARGE = "x_seq = torch.rand(50, 64, 4); x = x_seq[0]\nEXAMPLE"
_PASS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine(Pass):
    name = "mine"
    requires = "normalized"

    def apply(self, program):
        calls = [n for n in program.graph.nodes if n.op == "call_module"]
        node, new = calls[0], calls[0].args[0]
        EXAMPLE
        return "a note"

snnfx.convert(model, passes=[Mine()])"""
_PASS_BODY = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Base(Pass):
    name = "mine"
    requires = "normalized"

    def apply(self, program):
        if not getattr(program.source, "is_changed", False):
            program.source[0].weight.data.mul_(0.5)
        return "a note"

@dataclass(frozen=True)
class Mine(Base):
    EXAMPLE

snnfx.convert(model, passes=[Mine()])"""
_TRAINER = "trainer = Trainer(net, rule, optimizer, loss); labels = torch.rand(N, 4)\nEXAMPLE"
_SAVED = "torch.save(model.state_dict(), 'weights.pt'); snnfx.save(net, 'net.safetensors')\n"
_IMPORTED = "snnfx.export(net.eval(), 'net.nir', x_seq)\nEXAMPLE"
_MULTI_STEP = """
from spikingjelly.activation_based import layer, neuron
model = nn.Sequential(layer.Linear(4, 4, step_mode="m"), neuron.LIFNode(step_mode="m"))
EXAMPLE"""
_FUNCTION = """
EXAMPLE
Spike.forward = staticmethod(lambda ctx, x: torch.from_numpy((x.numpy() > 0.5).astype("float32")))
Spike.backward = staticmethod(lambda ctx, gradient: gradient)

class Model(nn.Module):
    def forward(self, x):
        return Spike.apply(x)

net = snnfx.convert(Model(), example_inputs=x)"""
_RECURRENT = """
class Model(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.gru, self.cell = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.GRU(4, 4), nn.GRUCell(4, 4)
        self.register_memory("h", 0.0)

    def forward(self, x):
        h = torch.zeros_like(x) + self.h
        EXAMPLE
        self.h = 0.5 * self.h + (h[0] if isinstance(h, tuple) else h)
        return self.h

net = snnfx.convert(Model(), example_inputs=x, batch_norm="fold")"""
_STATE = """
class Holder:
    v = None

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.v, self.v_other, self.h, self.t, self.state = None, None, None, None, Holder()
        self.first, self.later = nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
        self.lif, self.w = neuron.LIFNode(), nn.Linear(4, 4)

    def forward(self, x):
        y = x
        EXAMPLE
        return AFTER

net = snnfx.convert(Model(), example_inputs=x)"""
FRAMES: dict[str, str] = {
    "SNNFX101": _FUNCTION,
    "SNNFX109": _RECURRENT,
    "SNNFX218": _STATE.replace("AFTER", "(self.v if self.v is not None else self.state.v) * 2"),
    "SNNFX413": "other_model = nn.Sequential(nn.Linear(4, 4))\nEXAMPLE",
    "SNNFX813": "x_seq = torch.rand(2, 2, 1, 8, 8)\nEXAMPLE",
    "SNNFX815": """
class Neuron(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        EXAMPLE

    def forward(self, x):
        v = 0.5 * self.v + x
        y = (v > 1.0).to(x.dtype)
        self.v = v * (1 - y)
        return y

snnfx.export(snnfx.convert(Neuron()).eval(), "net.nir", x_seq)""",
    "SNNFX816": _IMPORTED,
    "SNNFX817": _IMPORTED,
    "SNNFX820": _SAVED + "EXAMPLE",
    "SNNFX821": """
class CSNN(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.Linear(4, channels), neuron.LIFNode())

snnfx.save(snnfx.convert(CSNN(channels=64)), "net.safetensors")
EXAMPLE""",
    "SNNFX822": _SAVED + "model = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode(tau=3.0))\nEXAMPLE",
    "SNNFX823": """
class MyPass(Pass):
    name, requires = "mine", "normalized"

    def apply(self, program):
        return "a note"

snnfx.save(snnfx.convert(model, passes=[MyPass()]), "net.safetensors")
EXAMPLE""",
    "SNNFX824": "edited_net = edited_nets_of(net, online.SLTT, 'per_step', None).sequence\nEXAMPLE",
    "SNNFX106": _NORM,
    "SNNFX202": "model = model_of('def forward(self, x):\\n    return 2 * x if x.shape[0] > 3 else x')\nEXAMPLE",
    "SNNFX204": _MULTI_STEP,
    "SNNFX205": _LIBRARY,
    "SNNFX208": """
def hook(module, inputs, result): ...

model = nn.Sequential()
model.add_module("conv1", nn.Linear(4, 4))
EXAMPLE
snnfx.convert(model)""",
    "SNNFX211": "x1 = x2 = x; model = model_of('def forward(self, *xs):\\n    return xs[0] + xs[1]')\nEXAMPLE",
    "SNNFX234": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        from spikingjelly.activation_based import neuron
        self.fc, self.lif = nn.Linear(4, 8), neuron.LIFNode(step_mode="m")

    def forward(self, x_seq):
        return x_seq.sum() + EXAMPLE

snnfx.convert(Model(), takes="sequence", example_inputs=(x_seq,))""",
    "SNNFX220": """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        EXAMPLE

    def forward(self, x):
        return self.fc(x)

snnfx.convert(Model())""",
    "SNNFX301": _THREE,
    "SNNFX303": "pair = (torch.rand(2, 3), torch.rand(2, 3))\n"
    "model = model_of('def forward(self, a, b):\\n    return a + b')\n"
    "net = snnfx.convert(model, example_inputs=pair)\nEXAMPLE",
    "SNNFX304": _THREE,
    "SNNFX305": "model = nn.Identity(); net = snnfx.convert(model)\nEXAMPLE",
    "SNNFX306": _THREE,
    "SNNFX307": "model = model_of('def forward(self, x, flag):\\n    return x if flag else -x')\nEXAMPLE",
    "SNNFX308": _NAMED.replace(', ("lif1", neuron.LIFNode())', ""),
    "SNNFX310": "image = x; net = snnfx.convert(model, time_dim=None)\nEXAMPLE",
    "SNNFX311": _NAMED,
    "SNNFX314": "model = model_of('def forward(self, x, mem=None):\\n    mem = x if mem is None else mem + x\\n"
    "    return x, 2 * x, mem')\nEXAMPLE",
    "SNNFX316": "x = torch.rand(T, N, 4, requires_grad=True)\nEXAMPLE",
    "SNNFX317": _NORM,
    "SNNFX318": _LARGE,
    "SNNFX319": _LARGE,
    "SNNFX501": _PASS,
    "SNNFX701": _PASS_BODY,
    "SNNFX702": _PASS_BODY.replace('if not getattr(program.source, "is_changed", False):', "if False:"),
    "SNNFX703": _PASS,
    "SNNFX704": _PASS_BODY,
    "SNNFX610": _TRAINER,
    "SNNFX611": "EXAMPLE\nTrainer(net, rule, optimizer, loss).step(x_seq, target)",
    "SNNFX613": "EXAMPLE\nfptt_online_training(model, optimizer, x_seq.transpose(0, 1), target.transpose(0, 1), "
    "nn.functional.mse_loss, 0.5, w_ra)",
    "SNNFX617": "my_loss = nn.functional.mse_loss\nEXAMPLE\nTrainer(net, rule, optimizer, loss).step(x_seq, target)",
    "SNNFX622": "trainer = Trainer(net, FPTT(0.5), optimizer, loss)\n"
    "torch.save(trainer.state_dict(), 'trainer.pt')\nEXAMPLE",
    "SNNFX320": "x_seq = x_seq.requires_grad_()\nEXAMPLE",
    "SNNFX401": """
other = copy.deepcopy(model)
other[0].weight.data.neg_()
torch.save(other.state_dict(), "weights.pt")
model[1].v_threshold = 0.2
EXAMPLE""",
    "SNNFX403": "model[1].v_threshold = 0.2\nEXAMPLE",
    "SNNFX508": "x_seq = torch.rand(50, 64, 4, requires_grad=True)\nEXAMPLE",
    "SNNFX705": """
import pickle
from dataclasses import dataclass

@dataclass(frozen=True)
class Scale(Pass):
    name = "scale"
    requires = "normalized"
    function: object = None

    def apply(self, program):
        return "a note"

EXAMPLE
pickle.dumps(snnfx.convert(model, passes=passes))""",
    "SNNFX801": "net.eval()\nEXAMPLE",
    "SNNFX802": "net.eval()\nEXAMPLE",
    "SNNFX825": "model.eval()\nEXAMPLE",
    "SNNFX826": "net = snnfx.convert(model, example_inputs=x[0]).eval()\nEXAMPLE",
    "SNNFX811": "EXAMPLE",
}
"""Code -> the code around its examples, which replace EXAMPLE; an example without an entry is complete."""
