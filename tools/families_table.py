"""Writes the table of families in docs/generate.md: `python tools/families_table.py`."""

from pathlib import Path

from torch_fused.hf.families import FAMILIES, Family

BEGIN, END = "<!-- families: tools/families_table.py writes this -->\n", "<!-- end of families -->"
PAGE = Path(__file__).parents[1] / "docs" / "generate.md"


def table() -> str:
    lines = ["| family | fused ops | decode step, CPU and GPU | left to transformers |", "|---|---|---|---|"]
    for family in FAMILIES:
        step = "yes" if family.has_step else "no"
        cells = (name(family), ", ".join(ops(family)), step, ", ".join(stays(family)) or "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def name(family: Family) -> str:
    return f"`{family.name('causal_lm')}`"


def ops(family: Family) -> list[str]:
    joined = "add + norm" if family.norms_before[1] else ""
    activation = "gelu x up" if family.gelu else "silu x up"
    return [op for op in ("norms", joined, "rotary positions", activation) if op]


def stays(family: Family) -> list[str]:
    """What the model computes in transformers, besides attention and matrix products."""
    left = []
    if family.experts:
        left.append("selecting and multiplying experts" + (", outside the decode step" if family.has_step else ""))
    if family.linear_attention:
        left.append("linear attention")
    if family.text != "model":
        left.append("images")
    return left


def main() -> None:
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{table()}{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main()
