"""Pieces of text in a picture keep the place that graphviz gave them."""

from __future__ import annotations

import re
import shutil

import pytest
from torch import nn

import snnfx
from snnfx.inspect.picture.text_lengths import with_text_lengths

SVG = (
    '<text x="1" font-weight="bold" font-size="9.00">a&#45;&gt;b</text><text x="9" font-size="9.00">a&#45;&gt;b</text>'
)
LAYOUT = """{"objects": [{"_ldraw_": [
    {"op": "F", "size": 9.0, "face": "Helvetica"}, {"op": "t", "fontchar": 1},
    {"op": "T", "pt": [0, 0], "align": "l", "width": 17.5, "text": "a->b"},
    {"op": "t", "fontchar": 0},
    {"op": "T", "pt": [9, 0], "align": "l", "width": 15.25, "text": "a->b"}]}]}"""


def test_each_weight_of_a_text_has_its_own_length() -> None:
    assert re.findall('textLength="([^"]*)"', with_text_lengths(SVG, LAYOUT)) == ["17.50", "15.25"]


def test_text_that_the_layout_does_not_have_stays_as_it_is() -> None:
    other = '<text x="1" font-size="10.00">a</text>'
    assert with_text_lengths(other, LAYOUT) == other


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs graphviz")
def test_every_text_of_a_picture_has_a_length() -> None:
    svg = snnfx.draw(nn.Sequential(nn.Linear(3, 2), snnfx.neuron.LIFNode(tau=2.0))).pipe("svg").decode()
    texts = re.findall("<text [^>]*>[^<]*", svg)
    assert texts and all("textLength=" in text for text in texts)
