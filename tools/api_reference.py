"""Writes docs/api.md from the docstrings of the public API: python tools/api_reference.py"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEADER = """# API reference

Written by `tools/api_reference.py` from the docstrings; do not edit. The tests run the examples. Error messages name
the op and the argument, and say what is expected and what it got.
"""
MODULES = ("functional", "sampling", "nn", "optim", "hf", "demo", "metal")
"""Their public names are in `__all__`."""

RETURNED = {
    "hf": ("packing.QuantizationReport", "patch.PatchHandle"),
    "metal": ("emulation.Emulation", "emulation.Launch", "emulation.Traffic", "shader.Library", "shader.Kernel"),
}
"""Classes that users do not construct, but that public functions return."""

MEMBERS = {
    "AdamW": ("step", "load_state_dict"),
    "FusedKVCache": ("max_cache_len", "nbytes"),
    "PatchHandle": ("revert", "report", "patched"),
    "Emulation": ("launches", "clear"),
    "Kernel": ("__call__", "max_threads_per_threadgroup", "thread_execution_width"),
}
"""Methods and properties that the base class does not document."""

SECTIONS = ("Args", "Returns", "Yields", "Raises", "Example")


@dataclass(frozen=True)
class Entry:
    """A public object: `name` as in ``rms_norm`` or ``AdamW.step``."""

    name: str
    value: Any

    @property
    def parameters(self) -> list[str]:
        """The parameters of its own signature; empty for a class without its own `__init__`."""
        function = self.value
        if isinstance(function, type):
            function = function.__dict__.get("__init__")
        if not inspect.isfunction(function) or self.value in returned_classes():
            return []
        return [name for name in inspect.signature(function).parameters if name != "self"]


def returned_classes() -> list[type]:
    return [
        getattr(importlib.import_module(f"torch_fused.{module}.{path.partition('.')[0]}"), path.partition(".")[2])
        for module, paths in RETURNED.items()
        for path in paths
    ]


def public_api() -> Iterator[tuple[str, list[Entry]]]:
    """(module, its entries), with members after their class; `torch_fused.status` is last."""
    package = importlib.import_module("torch_fused")
    for name in MODULES:
        module = importlib.import_module(f"torch_fused.{name}")
        values = [(public, getattr(module, public)) for public in module.__all__]
        values += [(c.__name__, c) for c in returned_classes() if c.__module__.startswith(f"{module.__name__}.")]
        entries = []
        for public, value in values:
            entries.append(Entry(public, value))
            entries += [Entry(f"{public}.{member}", vars(value)[member]) for member in MEMBERS.get(public, ())]
        yield f"torch_fused.{name}", entries
    yield "torch_fused", [Entry("status", package.status)]


def render() -> str:
    api = list(public_api())
    links = anchors(api)
    parts = [HEADER]
    for module, entries in api:
        names = ", ".join(f"[`{e.name}`](#{links[e.name]})" for e in entries if "." not in e.name)
        parts.append(wrap(f"- `{module}`: {names}"))
    for module, entries in api:
        parts.append(f"\n## {module}\n")
        if module != "torch_fused":
            parts.append(markdown(inspect.getdoc(importlib.import_module(module)) or "", links) + "\n")
        for entry in entries:
            parts.append(f"### `{entry.name}`\n\n```python\n{signature(entry)}\n```\n")
            parts.append(markdown(inspect.getdoc(entry.value) or "", links) + "\n")
    return re.sub("\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def anchors(api: list[tuple[str, list[Entry]]]) -> dict[str, str]:
    """The anchor of each entry's heading; GitHub numbers repeated ones."""
    seen: Counter[str] = Counter()
    links = {}
    for module, entries in api:
        seen[anchor(module)] += 1
        for entry in entries:
            name = anchor(entry.name)
            links[entry.name] = f"{name}-{seen[name]}" if seen[name] else name
            seen[name] += 1
    return links


def anchor(heading: str) -> str:
    """The anchor that GitHub gives to a heading with a unique name."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# ---- signatures, as written -----------------------------------------------------------------------------------------


def signature(entry: Entry) -> str:
    value = entry.value
    if isinstance(value, property):
        return f"{entry.name}  # property"
    if not isinstance(value, type):
        return definition(inspect.unwrap(value), entry.name.removesuffix(".__call__"))
    source = inspect.getsource(value)
    line = source[source.index("class ") :].partition(":\n")[0]
    if is_dataclass(value):
        return f"{line}:\n    " + "\n    ".join(re.findall(r"^    (\w+: .*)$", source, re.MULTILINE))
    return f"{line}\n\n{definition(value.__init__, entry.name)}" if entry.parameters else line


def definition(function: Any, name: str) -> str:
    """The text between ``def`` and the body, without `self`."""
    source = textwrap.dedent(inspect.getsource(function))
    node: Any = ast.parse(source).body[0]
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    text = "\n".join(lines).partition("def ")[2].partition("(")[2].rstrip().removesuffix(":")
    text = re.sub(r"^(\s*)self(,\s*|(?=\)))", r"\1", text).removesuffix(" -> None")
    return f"{name}({text}".replace("(\n    \n", "(\n")


# ---- docstrings to Markdown -----------------------------------------------------------------------------------------


def sections(docstring: str) -> dict[str, str]:
    """The text before the first section under ``""``, then each section's body, dedented, and what follows it."""
    found: dict[str, list[str]] = {"": []}
    current = ""
    for line in docstring.splitlines():
        title = line.removesuffix(":")
        if line.endswith(":") and title in SECTIONS:
            current = title
            found[current] = []
            continue
        elif current in SECTIONS and line and not line.startswith(" "):
            current = f"after {current}"
        found.setdefault(current, []).append(line)
    return {title: textwrap.dedent("\n".join(lines)).strip("\n") for title, lines in found.items()}


def markdown(docstring: str, links: dict[str, str]) -> str:
    parts = []
    for title, body in sections(docstring).items():
        if title == "Example":
            parts.append(f"**Example**\n\n```pycon\n{body}\n```")
        elif title in SECTIONS:
            parts.append(f"**{title}**\n\n{wrap(inline(items(body), links))}")
        elif body:
            parts.append(wrap(inline(body, links)))
    return "\n\n".join(parts)


def wrap(text: str) -> str:
    """Wraps paragraphs and list items to 120 columns; keeps formulas on their own lines."""
    blocks = re.split(r"\n(?=- )|\n\s*\n", text)
    filled = [block if "```" in block else fill(block) for block in blocks]
    lists = "".join(
        block + ("\n" if block.startswith("- ") and following.startswith("- ") else "\n\n")
        for block, following in zip(filled, [*filled[1:], ""], strict=True)
    )
    return lists.rstrip("\n")


def fill(block: str) -> str:
    together = re.sub(r"`[^`]+`", lambda literal: literal[0].replace(" ", "\0"), " ".join(block.split()))
    indent = "  " if block.startswith("- ") else ""
    options: Any = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": indent}
    return textwrap.fill(together, 120, **options).replace("\0", " ")


def items(body: str) -> str:
    """``name: text`` with indented continuation lines as list items; other text stays a paragraph."""
    lines = []
    for line in body.splitlines():
        match = re.match(r"([\w*]+(?:, [\w*]+)*): (.*)", line)
        if match:
            names = ", ".join(f"`{name}`" for name in match[1].split(", "))
            lines.append(f"- {names}: {match[2]}")
        else:
            lines.append(re.sub(r"^    ", "  ", line))
    return "\n".join(lines)


def inline(text: str, links: dict[str, str]) -> str:
    """Roles, literals and formulas."""

    def role(match: re.Match) -> str:
        name = match[1].removeprefix("~")
        last = name.rpartition(".")[2]
        if last in links and (name == last or name.startswith("torch_fused.")):
            return f"[`{last}`](#{links[last]})"
        return f"`{last if match[1].startswith('~') else name}`"

    text = re.sub(r"\.\. math::\n((?:    .*\n?)+)", lambda m: f"```math\n{textwrap.dedent(m[1])}```\n", text)
    text = re.sub(r":math:`([^`]+)`", r"$`\1`$", text)
    text = re.sub(r":(?:func|class|meth):`([^`]+)`", role, text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


if __name__ == "__main__":
    PAGE.write_text(render())
    print(f"wrote {PAGE}")
