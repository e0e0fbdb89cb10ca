"""Online training: learning rules as graph edits, and the trainer that runs them.

A `Rule` defines which gradient is computed and when the weights are updated. It combines a few independent choices
(where gradients through time are cut, which operand forms the weight gradient, how often to update, ...). Each choice
is an edit of the step graph or a setting of the trainer; the published rules are named combinations of them. `Trainer`
runs a rule on a converted net or on a single-step model. Three functions have the signatures of SpikingJelly.

Example:
    >>> import torch, snnfx
    >>> from snnfx.online import OTTT_A, Trainer
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(8, 16), snnfx.neuron.LIFNode(tau=2.0), torch.nn.Linear(16, 4), snnfx.neuron.LIFNode(tau=2.0)
    ... )
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trainer = Trainer(model, OTTT_A, optimizer, torch.nn.functional.mse_loss)
    >>> result = trainer.step(torch.rand(12, 2, 8), torch.rand(12, 2, 4))       # x_seq, target: [T, N, *]
    >>> result.updates
    1
"""

from __future__ import annotations

from snnfx.online.learning_rules import (
    BPTT,
    FPTT,
    OSTL,
    OTTT_A,
    OTTT_O,
    SLTT,
    SLTT_K,
    TBPTT,
    EProp,
    FPTTTerm,
    Rule,
)
from snnfx.online.spikingjelly_functions import (
    fptt_online_training,
    fptt_online_training_init_w_ra,
    ottt_online_training,
)
from snnfx.online.trainer import StepResult, Trainer

__all__ = [
    "BPTT",
    "FPTT",
    "OSTL",
    "OTTT_A",
    "OTTT_O",
    "SLTT",
    "SLTT_K",
    "TBPTT",
    "EProp",
    "FPTTTerm",
    "Rule",
    "StepResult",
    "Trainer",
    "fptt_online_training",
    "fptt_online_training_init_w_ra",
    "ottt_online_training",
]
