"""Swizzles, such as `v.xz`: only those a source uses, because all possible ones take too long to compile."""

from __future__ import annotations

from .program import Program

LETTERS = ("xyzw", "rgba")


def define_swizzles(program: Program) -> str:
    """The macros of vector.h for the swizzles that a source uses."""
    used = {token.text for i, token in enumerate(program.tokens) if _is_member(program, i)}
    used |= set(join_swizzles(program).values())
    lines = []
    for width in (2, 3, 4):
        members = []
        for names in LETTERS:
            letters = names[:width]
            for swizzle in sorted(used):
                if 2 <= len(swizzle) <= 4 and set(swizzle) <= set(letters):
                    places = ", ".join(str(letters.index(letter)) for letter in swizzle)
                    members.append(f"swz<T, {width}, {places}> {swizzle};")
        lines.append(f"#define MSL_SWIZZLES_{width} {' '.join(members)}\n")
    return "".join(lines)


def join_swizzles(program: Program) -> dict[int, str]:
    """Merges swizzles of swizzles: `v.wzyx.yz` becomes `v.zy`. Declared names are not swizzles."""
    tokens = program.tokens
    declared = {token.text for i, token in enumerate(tokens) if not _is_member(program, i)}
    replaced: dict[int, str] = {}
    for i in range(1, len(tokens) - 2):
        elements = replaced.get(i, tokens[i].text)
        if not _is_member(program, i) or len(elements) < 2 or tokens[i].text in declared or tokens[i + 1].text != ".":
            continue
        letters = next((names for names in LETTERS if set(tokens[i + 2].text) <= set(names)), None)
        if not letters or not any(set(elements) <= set(names) for names in LETTERS):
            continue
        places = [letters.index(letter) for letter in tokens[i + 2].text]
        if max(places) < len(elements):
            replaced |= {i: "", i + 1: "", i + 2: "".join(elements[place] for place in places)}
    return replaced


def _is_member(program: Program, i: int) -> bool:
    return program.tokens[i - 1].text in (".", "->")
