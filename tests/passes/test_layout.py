"""Memory formats: channels-last inside, what the user wrote and gets outside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import snnfx
from snnfx.errors import InputError
from snnfx.lowering.choices.image_formats import forget_choices
from snnfx.ops.memory_format import channels_last, image_format, row_major, stack_in_layout, unbind_in_layout
from support.stepping import fresh_copy, step_model


def lif() -> nn.Module:
    return snnfx.neuron.LIFNode(tau=2.0)


class Residual(nn.Module):
    """Convolutions with a residual connection; the head looks at strides (`view`)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.lif1 = lif()
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.lif2 = lif()
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        s = self.lif1(self.bn(self.conv1(x)))
        s = self.pool(self.lif2(self.conv2(s)) + s)
        return self.head(s.view(x.shape[0], -1))


def formats_seen(module: nn.Module) -> list[bool]:
    """Whether what the module is called with is channels-last, filled in at each call."""
    seen: list[bool] = []
    module.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
    )
    return seen


def test_images_between_convolutions_are_channels_last() -> None:
    model = Residual().eval()
    seen = formats_seen(model.pool)
    net = snnfx.convert(model)
    net(torch.rand(3, 2, 1, 8, 8))
    assert seen == [True]


def test_memory_format_none_leaves_tensors_as_the_model_makes_them() -> None:
    model = Residual().eval()
    seen = formats_seen(model.pool)
    snnfx.convert(model, memory_format=None)(torch.rand(3, 2, 1, 8, 8))
    assert seen == [False]


@pytest.mark.parametrize("training", [False, True])
def test_outputs_and_gradients_are_those_of_the_stepped_model(training: bool) -> None:
    torch.manual_seed(0)
    model = Residual().train(training)
    net = snnfx.convert(model, batch_norm="per_step")
    x_seq = torch.rand(4, 3, 1, 8, 8)
    expected = step_model(model, x_seq)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = net(x_seq)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-3, atol=1e-4)


def test_a_view_of_a_convolution_works() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)
            self.lif = lif()

        def forward(self, x: Tensor) -> Tensor:
            return self.lif(self.conv(x)).view(x.shape[0], -1)

    model = Viewed().eval()
    x_seq = torch.rand(3, 2, 3, 5, 5)
    torch.testing.assert_close(snnfx.convert(model)(x_seq), step_model(model, x_seq))


def test_outputs_that_are_images_are_row_major() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), lif())
    x_seq = torch.rand(3, 2, 2, 6, 6)
    for net in (snnfx.convert(model), snnfx.convert(model, time_dim=1)):
        assert net(x_seq).is_contiguous()
    single = snnfx.convert(model, step_mode="s")
    assert single(x_seq[0]).is_contiguous()


def test_state_that_the_caller_gets_back_is_row_major() -> None:
    class Explicit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 3, 3, padding=1)

        def forward(self, x: Tensor, mem: Tensor | None = None) -> tuple[Tensor, Tensor]:
            mem = self.conv(x) if mem is None else 0.5 * mem + self.conv(x)
            return torch.sigmoid(mem), mem

    net = snnfx.convert(Explicit(), carry={"mem": 1})
    y_seq, mem = net(torch.rand(3, 2, 2, 6, 6))
    assert y_seq.is_contiguous() and mem.is_contiguous()
    again, _ = net(torch.rand(3, 2, 2, 6, 6), mem)
    assert again.is_contiguous()


def test_an_unbatched_image_keeps_its_format() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), lif())
    x_seq = torch.rand(3, 2, 6, 6)
    torch.testing.assert_close(snnfx.convert(model)(x_seq), step_model(model, x_seq))


def test_what_a_kernel_makes_of_images_may_be_viewed() -> None:
    """The kernel hands its input's format on through operations that the pass knows nothing of."""

    class Scaled(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(144, 3)
            self.threshold = nn.Parameter(torch.full((1, 4, 1, 1), 0.6))
            self.register_memory("v", 0.0)

        def forward(self, x: Tensor) -> Tensor:
            v = self.v * 0.5 + self.conv(x)
            spike = torch.sigmoid(torch.true_divide(v, self.threshold) - 1.0)
            self.v = v - spike
            return self.fc(spike.view(spike.size(0), -1))

    model, x_seq = Scaled(), torch.rand(4, 2, 2, 6, 6)
    net = snnfx.convert(model, example_inputs=x_seq[0])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(net(x_seq), step_model(fresh_copy(model), x_seq), rtol=1e-4, atol=1e-5)


def test_only_float_images_of_a_cpu_are_changed() -> None:
    image = torch.rand(2, 3, 4, 5)
    assert channels_last(image).is_contiguous(memory_format=torch.channels_last)
    for other in (image[0], image.double(), image.to("meta"), image.long()):
        assert channels_last(other) is other


def test_images_with_fewer_elements_than_the_weights_are_row_major() -> None:
    image = channels_last(torch.rand(2, 8, 3, 3))
    assert image_format(image, image.numel() + 1).is_contiguous()
    assert image_format(image, image.numel()) is image
    double = torch.rand(2, 3, 3, 8, dtype=torch.float64).permute(0, 3, 1, 2)
    assert image_format(double, 10**6) is double


@pytest.mark.parametrize(("T", "row"), [(2, True), (40, False)])
def test_the_fixed_format_depends_on_the_call(T: int, row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNNFX_MEASURE", "0")
    forget_choices()
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), lif(), nn.Conv2d(8, 8, 3, padding=1)).eval()
    net = snnfx.convert(model)
    seen: list[bool] = []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous()))
    x_seq = torch.rand(T, 1, 8, 4, 4)
    torch.testing.assert_close(net(x_seq), step_model(model, x_seq), rtol=1e-4, atol=1e-5)
    assert seen[0] is row


def test_one_channel_gets_the_strides_of_channels_last() -> None:
    image = torch.rand(2, 1, 4, 5, requires_grad=True)
    changed = channels_last(image)
    assert changed.stride() == (20, 1, 5, 1) and torch.equal(changed, image)
    changed.sum().backward()
    assert torch.equal(image.grad, torch.ones_like(image))


def test_the_gradient_of_images_comes_back_in_their_format() -> None:
    image = channels_last(torch.rand(2, 3, 4, 5)).requires_grad_()
    (2 * row_major(image).flatten(1)).sum().backward()
    assert image.grad.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(image.grad, torch.full_like(image, 2))
    (weight,) = torch.autograd.grad(row_major(image).square().sum(), image, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(weight.sum(), image)[0], torch.full_like(image, 2))


def test_stacking_and_unbinding_keep_the_format() -> None:
    steps = [channels_last(torch.rand(2, 3, 4, 5)) for _ in range(6)]
    x_seq = stack_in_layout(steps)
    assert torch.equal(x_seq, torch.stack(steps))
    for step, x in zip(steps, unbind_in_layout(x_seq), strict=True):
        assert torch.equal(step, x) and x.is_contiguous(memory_format=torch.channels_last)
    assert x_seq.flatten(0, 1).is_contiguous(memory_format=torch.channels_last)
    assert row_major(x_seq).is_contiguous()


def test_a_bad_memory_format_is_refused() -> None:
    with pytest.raises(InputError, match="memory_format"):
        snnfx.convert(Residual(), memory_format="channels_last")


def test_a_state_that_starts_as_none_may_become_an_image() -> None:
    class Feedback(snnfx.MemoryModule):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.lif = nn.Conv2d(3, 3, 2, stride=2), snnfx.neuron.IFNode()
            self.register_memory("y", None)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if self.y is None:
                self.y = torch.zeros_like(x)
            self.y = self.lif(x + 0.5 * self.y)
            return self.y  # type: ignore[no-any-return]

    model, x_seq = Feedback(), torch.rand(3, 2, 3, 4, 4)
    snnfx.verify(model, snnfx.convert(model, example_inputs=x_seq[0], lower=None), x_seq)


@pytest.mark.parametrize(("pixels", "converted"), [(8, False), (64, True)])
def test_small_images_between_row_major_values_are_not_converted(pixels: int, converted: bool) -> None:
    model = nn.Conv2d(8, 8, 3, padding=1)
    seen = formats_seen(model)
    x_seq = torch.rand(4, 2, 8, pixels, pixels)
    snnfx.convert(model, example_inputs=(x_seq[0],))(x_seq)
    assert seen == [converted]
