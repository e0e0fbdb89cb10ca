"""Style sheet and script of the profile page.

The script selects a region: its rows in all tables and its frame in the picture are highlighted together. It contains
neither `<` nor `&`, so that the page is well-formed XML.
"""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f4f5f7; --card: #ffffff; --line: #e1e4e9; --ink: #16202c; --soft: #5b6675; --track: #eceff3;
  --fold: #3f78ad; --loop: #c2602b; --map: #9a7d12; --once: #7d7d75; --sequence: #3f78ad; --none: #a3acb8;
  --spike: #c2602b; --dense: #3f78ad; --good: #2f855a; --warn: #a15c00; --bad: #b3261e; --focus: #1d4ed8;
  --on: #fff3d6; --shadow: 0 1px 2px rgba(16, 24, 40, .06), 0 1px 6px rgba(16, 24, 40, .04);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f141b; --card: #171e28; --line: #2a3442; --ink: #e8edf3; --soft: #9aa7b7; --track: #232c39;
    --fold: #6aa5dc; --loop: #e88b57; --map: #d3b34a; --once: #a9a9a0; --sequence: #6aa5dc; --none: #67727f;
    --spike: #e88b57; --dense: #6aa5dc; --good: #68c398; --warn: #e5a94d; --bad: #f08a80; --focus: #8ab4ff;
    --on: #3a3118; --shadow: none;
  }
  .picture svg { filter: invert(.91) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums;
}
main { max-width: 1280px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.02em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; letter-spacing: -.01em; }
p { margin: 0; }
.soft { color: var(--soft); }
.small { font-size: 13px; }
.mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: 13px; }
header .badge { vertical-align: 5px; margin-left: 10px; }
header p { margin-top: 6px; }
.badge {
  display: inline-block; padding: 1px 9px; border-radius: 99px; font-size: 12px; font-weight: 600; line-height: 1.6;
  color: var(--soft); background: var(--track); white-space: nowrap;
}
.badge.bad { color: var(--bad); } .badge.warn { color: var(--warn); }
.tiles { display: grid; grid-template-columns: repeat(5, 1fr); gap: 14px; margin: 22px 0 14px; }
.tile, .card {
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; box-shadow: var(--shadow);
}
.tile { padding: 14px 16px; min-width: 0; }
.tile b { display: block; font-size: 24px; line-height: 1.25; letter-spacing: -.02em; margin: 2px 0; font-weight: 650; }
.tile span { display: block; color: var(--soft); font-size: 13px; line-height: 1.4; }
.columns { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 7fr); gap: 14px; align-items: start; }
.columns > .aside { position: sticky; top: 14px; max-height: calc(100vh - 14px); overflow-y: auto; }
.card { padding: 18px 20px; margin-bottom: 14px; min-width: 0; }
.card > p { margin-bottom: 12px; }
.scroll { overflow-x: auto; margin: 0 -20px; padding: 0 20px; }
table { border-collapse: collapse; width: 100%; }
th {
  text-align: left; font-size: 12px; font-weight: 600; color: var(--soft); padding: 4px 12px 6px 0; white-space: nowrap;
  border-bottom: 1px solid var(--line); vertical-align: bottom;
}
td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child { padding-left: 10px; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.name { overflow-wrap: anywhere; min-width: 150px; }
td.bar { min-width: 110px; width: 24%; }
[data-region] { cursor: pointer; }
tr[data-region]:hover td, li[data-region]:hover { background: var(--track); }
tr.on td, tr.on:hover td, li.on { background: var(--on); }
tr[data-region] td:first-child { border-left: 3px solid transparent; }
tr.on td:first-child { border-left-color: var(--loop); }
:focus-visible { outline: 2px solid var(--focus); outline-offset: -2px; border-radius: 4px; }
.track { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--track); margin-top: 6px; }
.track i { display: block; height: 100%; min-width: 0; }
.track i.back { opacity: .5; }
.kind { display: inline-block; width: 9px; height: 9px; border-radius: 3px; margin-right: 7px; }
.kind { background: var(--none); }
.fold { background: var(--fold); } .loop { background: var(--loop); } .map { background: var(--map); }
.once { background: var(--once); } .sequence { background: var(--sequence); } .between { background: var(--none); }
.spike { background: var(--spike); } .dense { background: var(--dense); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; color: var(--soft); margin-bottom: 8px; }
.sub { display: block; font-size: 13px; color: var(--soft); overflow-wrap: anywhere; }
.picture { overflow: auto; max-height: min(640px, 56vh); min-height: 260px; }
.picture { margin: 8px -20px 0; padding: 0 20px; border-top: 1px solid var(--line); }
.picture svg { display: block; margin: 0 auto; }
.picture #a_graph0 > a > polygon:first-of-type { fill: none; stroke: none; }
.picture.fit svg { width: 100%; height: auto; }
.picture g.cluster[tabindex] { cursor: pointer; }
.picture g.cluster path[fill="#ffffff"] { fill: none; }
.picture g.cluster[tabindex]:hover path, .picture g.cluster[tabindex]:hover polygon { stroke-width: 2; }
.picture g.cluster.on path, .picture g.cluster.on polygon { stroke-width: 4; }
.picture g.cluster:focus-visible { outline: 2px solid var(--focus); }
.bar-of-buttons { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; }
button {
  font: inherit; font-size: 13px; font-weight: 600; color: var(--ink); background: var(--track); cursor: pointer;
  border: 1px solid var(--line); border-radius: 8px; padding: 4px 12px; min-height: 32px;
}
button:hover { border-color: var(--soft); }
button[aria-pressed="true"] { background: var(--ink); color: var(--card); border-color: var(--ink); }
#detail { margin-top: 10px; min-height: 44px; font-size: 14px; }
#detail b { margin-right: 6px; }
svg.chart { display: block; width: 100%; height: auto; overflow: visible; }
svg.chart text { fill: var(--soft); font-size: 11px; }
.strip { display: block; width: 100%; height: 14px; border-radius: 3px; background: var(--track); }
.spark { display: block; width: 100%; height: 26px; }
.advice { list-style: none; margin: 8px 0 0; padding: 0; display: grid; gap: 8px; }
.advice li { border: 1px solid var(--line); border-radius: 10px; padding: 10px 14px; }
.advice .mono { font-weight: 600; display: block; overflow-wrap: anywhere; }
.notes { margin: 6px 0 0; padding-left: 18px; color: var(--soft); font-size: 13px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 18px; }
figure { margin: 0; min-width: 0; }
figcaption { font-size: 13px; margin-bottom: 6px; }
footer { color: var(--soft); font-size: 13px; margin-top: 8px; }
footer p { margin-bottom: 4px; }
@media (max-width: 1000px) {
  .columns { grid-template-columns: minmax(0, 1fr); }
  .columns > .aside { position: static; max-height: none; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); }
}
@media (max-width: 640px) {
  main { padding: 18px 12px 40px; }
  h1 { font-size: 23px; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 10px; margin-top: 16px; }
  .tile { padding: 11px 13px; } .tile b { font-size: 20px; }
  .tile:nth-child(5) { grid-column: 1 / -1; }
  td.name { min-width: 128px; }
  .card { padding: 14px; } .scroll, .picture { margin-left: -14px; margin-right: -14px; padding: 0 14px; }
  .wide { display: none; }
  td.bar { min-width: 64px; width: 22%; }
  .picture { max-height: 70vh; }
  svg.chart text { font-size: 20px !important; }
  td, th { padding-right: 8px; } th:first-child, td:first-child { padding-left: 6px; }
}
@media print { .bar-of-buttons, #detail { display: none; } .picture { max-height: none; } }
"""

SCRIPT = """
(function () {
  var data = JSON.parse(document.getElementById("regions").textContent);
  var detail = document.getElementById("detail"), selected = null, hint = detail ? detail.textContent : "";
  var frames = [];
  document.querySelectorAll(".picture g.cluster").forEach(function (g) {
    var title = g.querySelector("title");
    var name = title ? title.textContent.replace(/^cluster_/, "") : "";
    if (!(name in data)) { return; }
    g.setAttribute("data-region", name);
    g.setAttribute("tabindex", "0");
    g.setAttribute("role", "button");
    g.setAttribute("aria-label", "region " + name);
    frames.push(g);
  });
  document.querySelectorAll(".picture g.node").forEach(function (g) {
    var box = g.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2;
    frames.forEach(function (frame) {
      var shape = frame.querySelector("path, polygon").getBoundingClientRect();
      if (x > shape.left) { if (shape.right > x) { if (y > shape.top) { if (shape.bottom > y) {
        g.setAttribute("data-region", frame.getAttribute("data-region"));
      } } } }
    });
  });
  var all = Array.prototype.slice.call(document.querySelectorAll("[data-region]"));
  function show(name, from) {
    selected = name === selected ? null : name;
    all.forEach(function (e) {
      var on = selected !== null ? e.getAttribute("data-region") === selected : false;
      e.classList.toggle("on", on);
      if (e.hasAttribute("tabindex")) { e.setAttribute("aria-pressed", on ? "true" : "false"); }
    });
    if (detail) {
      detail.textContent = "";
      if (selected === null) { detail.textContent = hint; } else {
        var b = document.createElement("b");
        b.textContent = selected;
        detail.appendChild(b);
        detail.appendChild(document.createTextNode(data[selected]));
      }
    }
    if (selected !== null) {
      var target = from.closest(".picture") ? document.querySelector("#time [data-region='" + selected + "']")
        : frames.filter(function (g) { return g.getAttribute("data-region") === selected; })[0];
      if (target) {
        var box = target.closest(".picture");
        if (box) {
          var t = target.getBoundingClientRect(), o = box.getBoundingClientRect();
          box.scrollTop += t.top - o.top - (o.height - t.height) / 2;
          box.scrollLeft += t.left - o.left - (o.width - t.width) / 2;
        } else { target.scrollIntoView({ block: "nearest" }); }
      }
    }
  }
  document.addEventListener("click", function (e) {
    var row = e.target.closest("[data-region]");
    if (row) { show(row.getAttribute("data-region"), row); }
  });
  document.addEventListener("keydown", function (e) {
    if (e.key === "Escape") { if (selected !== null) { show(selected, document.body); } return; }
    if (e.key !== "Enter") { if (e.key !== " ") { return; } }
    if (e.target.closest("button")) { return; }
    var row = e.target.closest("[data-region]");
    if (row) { e.preventDefault(); show(row.getAttribute("data-region"), row); }
  });
  document.querySelectorAll("button[data-fit]").forEach(function (button) {
    button.addEventListener("click", function () {
      var fit = button.getAttribute("data-fit") === "1";
      document.querySelector(".picture").classList.toggle("fit", fit);
      document.querySelectorAll("button[data-fit]").forEach(function (other) {
        other.setAttribute("aria-pressed", other === button ? "true" : "false");
      });
    });
  });
})();
"""
