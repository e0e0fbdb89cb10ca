"""The page, the text and the data of a profile."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from torch import nn

import snnfx
from snnfx.errors import ToolError
from snnfx.inspect.profile.profile_report import ProfileReport
from support.nets import CSNN

T, N = 6, 3


@pytest.fixture(scope="module")
def report() -> ProfileReport:
    torch.manual_seed(0)
    x_seq = torch.rand(T, N, 1, 8, 8) * 8
    return snnfx.profile(snnfx.convert(CSNN()), x_seq, train=True, record=["features.0.2"], repeats=1)


def page_of(report: ProfileReport) -> ElementTree.Element:
    return ElementTree.fromstring(report.to_html())


def test_the_page_is_well_formed(report: ProfileReport) -> None:
    page = page_of(report)
    assert page.tag == "html" and page.find("head/title") is not None
    names = [e.attrib["id"] for e in page.iter() if "id" in e.attrib]
    assert len(names) == len(set(names))


def test_the_page_loads_no_other_file(report: ProfileReport) -> None:
    html = report.to_html()
    assert not re.search(r"https?://|@import|url\(|<link|<iframe|<img", html)
    for element in page_of(report).iter():
        assert not {"src", "href", "{http://www.w3.org/1999/xlink}href"} & set(element.attrib)


def test_every_region_is_a_row_that_the_keyboard_reaches(report: ProfileReport) -> None:
    rows = [e for e in page_of(report).iter("tr") if "data-region" in e.attrib]
    assert {row.region for row in report.regions if row.region} <= {e.attrib["data-region"] for e in rows}
    assert all(e.attrib.get("tabindex") == "0" for e in rows)


@pytest.mark.skipif(shutil.which("dot") is None, reason="the program dot is missing")
def test_the_page_contains_the_drawn_net_with_a_frame_for_each_region(report: ProfileReport) -> None:
    titles = {e.text for e in page_of(report).iter("title")}
    assert {f"cluster_{row.region}" for row in report.regions if row.region} <= titles


def test_without_dot_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    net = snnfx.convert(nn.Sequential(nn.Linear(3, 2), snnfx.neuron.LIFNode()))
    report = snnfx.profile(net, torch.rand(T, N, 3), repeats=1)
    assert report.picture == "" and "needs the program dot" in report.to_html()
    assert any("SNNFX601" in note for note in report.notes)


def test_names_of_a_user_cannot_break_the_page() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("a<b>&c</script>", nn.Linear(3, 4))
            self.lif = snnfx.neuron.LIFNode()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lif(self._modules["a<b>&c</script>"](x))  # type: ignore[misc]

    report = snnfx.profile(snnfx.convert(Odd()), torch.rand(T, N, 3), repeats=1)
    page = page_of(report)
    assert len(list(page.iter("script"))) == 2
    data = next(e for e in page.iter("script") if e.attrib.get("id") == "regions")
    assert set(json.loads(str(data.text))) == {row.region for row in report.regions if row.region}


def test_data_is_plain_and_complete(report: ProfileReport) -> None:
    data = json.loads(json.dumps(report.to_dict()))
    assert data["T"] == T and data["batch"] == N and data["train"] is True
    assert data["macs"] == sum(row["macs"] for row in data["operations"])
    assert len(data["regions"]) == len(report.regions) and "picture" not in data


def test_text_and_markdown_have_all_sections(report: ProfileReport) -> None:
    for text in (str(report), report.to_markdown()):
        for title in ("Time", "Firing rates", "Operations", "Memory", "Next steps"):
            assert title in text
    assert all(len(line) <= 100 for line in str(report).splitlines())


@pytest.mark.parametrize("name", ["p.html", "p.md", "p.json"])
def test_files_are_written_by_suffix(report: ProfileReport, name: str, tmp_path: Path) -> None:
    path = report.save(tmp_path / name)
    assert path.stat().st_size > 500


def test_another_suffix_is_refused(report: ProfileReport, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="SNNFX603"):
        report.save(tmp_path / "p.pdf")
