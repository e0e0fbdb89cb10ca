"""One page for each SNNFX code, from the registry in snnfx/_codes.py."""

from __future__ import annotations

from pathlib import Path

from snnfx.errors import CODES, CodeEntry

__all__ = ["GROUPS", "write_code_pages"]

GROUPS = {
    "SNNFX1": "Operations that are not folded",
    "SNNFX2": "Capture of a model",
    "SNNFX3": "Arguments and calls",
    "SNNFX4": "Verification",
    "SNNFX5": "Passes and running a net",
    "SNNFX7": "Passes of your own",
    "SNNFX61": "Online training",
    "SNNFX62": "Online training",
    "SNNFX6": "Command line, pictures and reports",
    "SNNFX8": "Export, save and load",
    "SNNFX9": "Pictures and progress",
}
"""The title of a group of codes, by their first characters; the first match counts."""

INTRODUCTION = """# Codes of messages

Errors, warnings and the reasons in `explain` have stable codes. `python -m snnfx explain --code SNNFX103` prints the
page of a code. In the examples, `model` is a single-step model, `net` its converted net and `x_seq` a sequence
`[T, N, ...]`.
"""


def write_code_pages(folder: Path) -> None:
    """Write a page for each code and the list of all codes."""
    folder.mkdir(parents=True, exist_ok=True)
    for code, entry in CODES.items():
        (folder / f"{code}.md").write_text(page(code, entry), encoding="utf-8")
    (folder / "index.md").write_text(overview(), encoding="utf-8")


def page(code: str, entry: CodeEntry) -> str:
    parts = [f"# {code}: {plain(entry.title)}", plain(entry.meaning)]
    for title, example in (("Fails", entry.fails), ("Works", entry.works)):
        if example:
            parts += [f"## {title}", f"```{language(example)}\n{example}\n```"]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Text in which Markdown finds no emphasis and no HTML outside of code."""
    pieces = text.split("`")
    pieces[::2] = [piece.replace("*", r"\*").replace("_", r"\_").replace("<", r"\<") for piece in pieces[::2]]
    return "`".join(pieces)


def language(example: str) -> str:
    """The language that highlights an example: Python, or a command line."""
    try:
        compile(example, "<example>", "exec")
    except SyntaxError:
        return "text"
    return "python"


def overview() -> str:
    parts = [INTRODUCTION]
    for title, codes in groups().items():
        rows = [f"| [{code}]({code}.md) | {plain(CODES[code].title)} |" for code in codes]
        parts.append("\n".join([f"## {title}", "", "| code | meaning |", "|---|---|", *rows]))
    tree = "\n".join(sorted(CODES))
    parts.append(f"```{{toctree}}\n:hidden:\n\n{tree}\n```")
    return "\n\n".join(parts) + "\n"


def groups() -> dict[str, list[str]]:
    """The codes of each group, in order."""
    found: dict[str, list[str]] = {title: [] for title in GROUPS.values()}
    for code in sorted(CODES):
        found[next(title for prefix, title in GROUPS.items() if code.startswith(prefix))].append(code)
    return found
