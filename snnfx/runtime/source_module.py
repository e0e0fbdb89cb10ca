"""A GraphModule that shares the parameters, buffers, children and mode of the model it was converted from."""

from __future__ import annotations

from collections import OrderedDict

from torch import fx, nn

from snnfx.ir.program import SELF_TARGET

__all__ = ["SourceModule"]


class SourceModule(fx.GraphModule):
    """A GraphModule backed by a source model.

    Training one trains the other. An optimizer of the model remains valid, and the state_dict has the model's keys.

    Args:
        source: the model; emitted graphs reach it as the attribute `snnfx_source`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__(nn.Module(), fx.Graph(), class_name=type(source).__name__)
        # Not by assignment, which would register the model as a child.
        self.__dict__[SELF_TARGET] = source
        self.share_children()

    def share_children(self) -> None:
        """Take the registries of the model anew; children that only this module has are removed."""
        source = self.source
        self.__dict__.update(
            _parameters=source._parameters,
            _buffers=source._buffers,
            _non_persistent_buffers_set=source._non_persistent_buffers_set,
            _modules=OrderedDict(source._modules),
        )

    @property
    def source(self) -> nn.Module:
        """The single-step model that this module was converted from."""
        return self.__dict__[SELF_TARGET]  # type: ignore[no-any-return]

    @property
    def training(self) -> bool:
        """Whether the model is in training mode; setting it here sets it on the model."""
        source = self.__dict__.get(SELF_TARGET)
        return True if source is None else source.training

    @training.setter
    def training(self, mode: bool) -> None:
        if SELF_TARGET in self.__dict__:  # nn.Module.__init__ assigns `training` before the source is known
            self.source.training = mode
