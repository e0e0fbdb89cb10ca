"""Source locations in messages and in the IR."""

import os

import pytest
from torch import fx

from snnfx.ir.printing import location_of
from snnfx.sandbox.user_code import format_location


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("inside/models/net.py", "models/net.py:41"),
        ("inside/net.py", "net.py:41"),
        ("outside/models/net.py", "models/net.py:41"),
        ("net.py", None),
    ],
)
def test_location_is_relative_inside_the_working_directory_and_has_its_folder_outside(
    tmp_path, monkeypatch, path, shown
):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    where = (os.path.join(tmp_path, path), 41)
    assert format_location(where) == (shown or f"{tmp_path.name}/net.py:41")


def test_message_and_ir_show_one_location():
    node = fx.Graph().placeholder("x")
    node.meta["where"] = ("/some/where/models/net.py", 7)
    assert location_of(node) == format_location(node.meta["where"]) == "models/net.py:7"


def test_unknown_location_is_empty():
    assert format_location(None) == location_of(fx.Graph().placeholder("x")) == ""
