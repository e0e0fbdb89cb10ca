"""tools/docs/how_to/lightning.md: a net in a LightningModule trains like the same loop in plain PyTorch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import snnfx

if importlib.util.find_spec("lightning") is None:
    pytest.skip("lightning is not installed", allow_module_level=True)

PAGE = Path(__file__).parents[2] / "tools" / "docs" / "how_to" / "lightning.md"
T, SAMPLES = 6, 24
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the page defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    sequences = 3 * torch.rand(SAMPLES, T, 20, generator=generator)
    return list(zip(sequences, torch.randint(10, (SAMPLES,), generator=generator), strict=True))


def trained_by_stepping(model: nn.Module) -> nn.Module:
    """The same training in a plain loop over batches and time steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for x_seq, labels in torch.utils.data.DataLoader(data(), batch_size=8):  # type: ignore[arg-type]
            snnfx.functional.reset_net(model)
            y = torch.stack([model(x_seq[:, t]) for t in range(T)], 1)
            optimizer.zero_grad()
            nn.functional.cross_entropy(y.mean(1), labels).backward()
            optimizer.step()
    return model


def test_lightning_trains_like_the_stepped_model(page: dict[str, Any], tmp_path: Path) -> None:
    classifier, _ = page["fit"](data(), default_root_dir=tmp_path, **OPTIONS)
    start = page["build"]().state_dict()
    expected = trained_by_stepping(page["build"]()).state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(classifier.net.state_dict()[name], value, rtol=1e-4, atol=1e-6)
        assert not torch.equal(value, start[name])


def test_a_checkpoint_restores_the_net_and_loads_into_the_model(page: dict[str, Any], tmp_path: Path) -> None:
    classifier, trainer = page["fit"](data(), default_root_dir=tmp_path, **OPTIONS)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    x_seq = torch.stack([x for x, _ in data()])
    again = page["Classifier"].load_from_checkpoint(tmp_path / "net.ckpt", model=page["build"]())
    assert torch.equal(again.net(x_seq), classifier.net(x_seq))
    weights = torch.load(tmp_path / "net.ckpt", weights_only=True)["state_dict"]
    model = page["build"]()
    model.load_state_dict({name.removeprefix("net."): value for name, value in weights.items()})
    stepped = torch.stack([model(x_seq[:, t]) for t in range(T)], 1)
    torch.testing.assert_close(stepped, classifier.net(x_seq), rtol=1e-5, atol=1e-6)


def test_mixed_precision_trains(page: dict[str, Any], tmp_path: Path) -> None:
    classifier, _ = page["fit"](data(), default_root_dir=tmp_path, precision="bf16-mixed", **OPTIONS)
    assert all(torch.isfinite(value).all() for value in classifier.state_dict().values())


def test_two_processes_train(page: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    # The tests' settings let an unmatched torchvision, which Lightning's metrics import, be imported.
    script.write_text("\n".join(["import conftest", *blocks, _TWO_PROCESSES]))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PAGE.parents[3]), str(PAGE.parents[3] / "tests")])}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=180, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0 and "world 2" in done.stdout, done.stderr[-2000:]


_TWO_PROCESSES = """
if __name__ == "__main__":
    torch.manual_seed(1)
    data = [(torch.rand(6, 20), torch.randint(10, ())) for _ in range(16)]
    _, trainer = fit(data, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
    print("world", trainer.world_size)
"""
