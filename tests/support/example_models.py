"""Models around the examples of messages: an example is a part of their code, or the call that gets them."""

from __future__ import annotations

__all__ = ["METHODS", "PARTS", "with_method"]

_LAYERS = """
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.fc_x, self.fc_h = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.bn, self.lif, self.other, self.v, self.h = nn.BatchNorm1d(4), neuron.LIFNode(), neuron.LIFNode(), 0.0, None
        self.f, self.g, self.first, self.later = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Bilinear(4, 4, 4)
        self.weight, self.start = nn.Parameter(torch.rand(4, 4)), nn.Parameter(torch.rand(4))
        self.t, self.count = 0, None
        ATTRIBUTES

    def forward(self, x):
        BODY

model = Model()
"""
_BATCH = "net = snnfx.convert(model, example_inputs=x)"
_SEQUENCE = 'net = snnfx.convert(model, takes="sequence", example_inputs=(x_seq,))'
_EXPORT = _BATCH + '.eval()\nsnnfx.export(net, "net.pt2", x_seq)'
_TRAIN = "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"


def _model(body: str, then: str = _BATCH, attributes: str = "pass") -> str:
    """A model with these statements in its forward; "EXAMPLE" stands for the example."""
    indented = body.replace("\n", "\n        ")
    return _LAYERS.replace("BODY", indented).replace("ATTRIBUTES", attributes) + then


PARTS: dict[str, str] = {
    "SNNFX107": _model(
        "if self.h is None: self.h = torch.zeros_like(x)\nEXAMPLE\nreturn self.h",
        attributes="self.fc = nn.Linear(8, 4)",
    ),
    "SNNFX111": _model("return self.lif(x.flatten(1).sum(1, keepdim=True) + x)", "EXAMPLE"),
    "SNNFX112": _model("if self.h is None: self.h = torch.zeros_like(x)\nEXAMPLE\nreturn self.h"),
    "SNNFX210": """
class Model(snnfx.MemoryModule):
    def __init__(self):
        super().__init__()
        self.lif = neuron.LIFNode()
        self.register_memory("v", 0.0)
        self.register_memory("u", None)

    def forward(self, x):
        s = self.lif(x)
        self.v = 0.5 * self.v + s
        EXAMPLE
        y = self.u + s
        self.u = 0.5 * y
        self.lif.v = self.lif.v + y
        return y

net = snnfx.convert(Model())""",
    "SNNFX224": _model("EXAMPLE", _BATCH + "\nnet(x_seq)", "self.before = None"),
    "SNNFX225": _model("EXAMPLE\nreturn self.lif(y)"),
    "SNNFX212": _model("EXAMPLE\nself.h = 0.5 * y\nreturn y"),
    "SNNFX213": """
EXAMPLE

    def forward(self, x):
        self.mem = self.mem + x
        return 2 * self.mem if self.mem.sum() > 3 else self.mem

net = snnfx.convert(Model(), example_inputs=x)""",
    "SNNFX216": """
from typing import NamedTuple

EXAMPLE

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.lif = neuron.LIFNode()

    def forward(self, x):
        return Output(self.lif(x))

net = snnfx.convert(Model())""",
    "SNNFX230": _model("outputs = []\nEXAMPLE\nreturn torch.stack(outputs)", _SEQUENCE).replace(
        "(self, x)", "(self, x_seq)"
    ),
    "SNNFX231": _model(
        "outputs = []\nEXAMPLE\nreturn torch.stack(outputs)",
        'net = snnfx.convert(model, takes="sequence", example_inputs=(torch.rand(9, N, 4),))\nnet(x_seq)',
    ).replace("(self, x)", "(self, x_seq)"),
    "SNNFX235": _model(
        "return torch.stack([self.lif(self.fc(x)) for x in x_seq - x_seq.mean(0)])", _SEQUENCE + "\nEXAMPLE"
    ).replace("(self, x)", "(self, x_seq)"),
    "SNNFX250": _model("v = self.fc(x)\nEXAMPLE\nreturn v"),
    "SNNFX312": _model("for i in range(x.shape[1]):\n    x = x + i\nreturn x", "EXAMPLE"),
    "SNNFX315": _model(
        "return x * self.tau",
        _BATCH
        + "\nif isinstance(model.tau, torch.Tensor):\n    model.tau.fill_(3.0)\nelse:\n    model.tau = 3.0\nnet(x_seq)",
        attributes="EXAMPLE",
    ),
    "SNNFX321": _model(
        "if self.training:\n    self.total = self.total + 1\nreturn x * self.total",
        "net, x = snnfx.convert(model), torch.rand(3, T, N, 4, requires_grad=True)\nEXAMPLE",
        attributes='self.register_buffer("total", torch.tensor(0.0))',
    ),
    "SNNFX504": _model("y = self.fc(x)\nmask = y > 0\nEXAMPLE\nreturn self.lif(y)", _BATCH + "\nnet(x_seq)"),
    "SNNFX615": """
model = nn.Sequential(neuron.LIFNode(), nn.Linear(4, 4), neuron.CUBALIFNode(c_decay=0.5, v_decay=0.75))
net, optimizer = snnfx.convert(model), torch.optim.SGD(model.parameters(), lr=0.1)
trainer = EXAMPLE
trainer.step(x_seq, target)""",
    "SNNFX618": _model(
        "spikes = self.lif(x)\ncurrent = EXAMPLE\nreturn self.other(current)",
        _BATCH + "\n" + _TRAIN + "Trainer(net, online.OTTT_A, optimizer, loss).step(x_seq, target)",
    ),
    "SNNFX619": _model(
        "y = self.other(self.fc(x))\nself.h = 0.5 * (self.start.expand_as(x) if self.h is None else self.h) + y\n"
        "return self.h",
        _BATCH + "\n" + _TRAIN + "trainer = EXAMPLE\ntrainer.step(x_seq, target)",
    ),
    "SNNFX620": """
class Leaky(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.v = nn.Parameter(torch.rand(2, 6, 6)), 0.0

    def forward(self, x):
        self.v = torch.sigmoid(self.w) * self.v + x
        return torch.sigmoid(self.v)

model = nn.Sequential(neuron.LIFNode(), nn.Conv2d(1, 2, 3, padding=1), Leaky())
x_seq, target = torch.rand(T, N, 1, 6, 6), torch.rand(T, N, 2, 6, 6)
net, optimizer = snnfx.convert(model), torch.optim.SGD(model.parameters(), lr=0.1)
trainer = EXAMPLE
trainer.step(x_seq, target)""",
    "SNNFX805": _model("EXAMPLE\nreturn self.lif(x)", _EXPORT),
    "SNNFX806": _model("return self.fc(x).view(4, 4)", _BATCH + ".eval()\nEXAMPLE"),
    "SNNFX810": _model("EXAMPLE\nreturn self.lif(x)", _EXPORT),
    "SNNFX812": _model(
        "self.total = self.total + 1\nreturn x * self.total",
        _BATCH + ".eval()\nEXAMPLE",
        attributes='self.register_buffer("total", torch.tensor(0.0))',
    ),
    "SNNFX818": _model("x = self.fc(x).sum(1, keepdim=True)\nEXAMPLE", _EXPORT),
    "SNNFX819": _model(
        "EXAMPLE",
        _SEQUENCE + '.eval()\nsnnfx.export(net, "net.pt2", x_seq)',
        attributes="self.step = nn.Sequential(nn.Linear(4, 4), neuron.LIFNode())",
    ).replace("(self, x)", "(self, x_seq)"),
    "SNNFX829": _model("EXAMPLE\nreturn self.v + x", _EXPORT, attributes="self.v = None"),
    "SNNFX402": "model[1].v_threshold = 100.0\nEXAMPLE",
    "SNNFX404": "model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), neuron.LIFNode())\nEXAMPLE",
    "SNNFX405": _model("self.h = self.bn(x) if self.h is None else 0.5 * self.h + x\nreturn self.h", "EXAMPLE"),
    "SNNFX410": """
class Model(nn.Module):
    steps = 0

    def forward(self, x):
        return 2 * x

class Counting(Model):
    def forward(self, x):
        self.steps += 1
        return 2 * x

EXAMPLE""",
    "SNNFX411": _model(
        "rate = torch.sigmoid(x)\nreturn self.fc(torch.poisson(rate) if self.training else rate)", _BATCH + "\nEXAMPLE"
    ),
    "SNNFX412": _model(
        "v = self.fc(x)\nEXAMPLE\nreturn self.fc_x(spike)", _BATCH + "\nsnnfx.verify(model, net, x_seq, double=True)"
    ),
}
"""Code -> the model and the calls around its examples, which replace EXAMPLE."""

METHODS: dict[str, str] = {"SNNFX115": _BATCH, "SNNFX203": "snnfx.convert(model)", "SNNFX804": _EXPORT}
"""Code -> the call of a model whose examples are a method, followed by another call if it has one."""


def with_method(code: str, fails: str, text: str) -> str:
    """The model of a method example; an example without a method is another call of the model that fails."""
    method = text if text.startswith("def ") else fails
    definition, _, call = method.partition("\n\n")
    model = _LAYERS.replace("ATTRIBUTES", "pass").partition("    def forward")[0]
    end = "\nmodel = Model()\n"
    body = "".join(f"    {line}\n" for line in definition.splitlines())
    return model + body + end + (text if method is fails and text is not fails else call or METHODS[code])
