"""Bugs planted in the CPU kernels, each with the program that must detect it."""

from dataclasses import dataclass

PLAIN, DOTS = "armv8-a", "armv8.2-a+dotprod"


@dataclass(frozen=True)
class Bug:
    """Replaces `old` by `new` in a file of csrc_mps."""

    name: str
    file: str
    old: str
    new: str
    program: str
    target: str = PLAIN


BUGS = [
    Bug(
        "the high half of NEON's products is left out",
        "quantized/cpu/integer_rows.h",
        "vmull_s8(vget_high_s8(a), vget_high_s8(b))",
        "vmull_s8(vget_low_s8(a), vget_low_s8(b))",
        "quantized",
    ),
    Bug(
        "NEON's dot product without the sum so far",
        "quantized/cpu/integer_rows.h",
        "vdotq_s32(sum, a, b)",
        "vdotq_s32(vsubq_s32(sum, sum), a, b)",
        "quantized",
        DOTS,
    ),
    Bug(
        "codes of eight bits keep their sign bit",
        "quantized/cpu/integer_rows.h",
        "veorq_u8(codes, vdupq_n_u8(128))",
        "codes",
        "quantized",
    ),
    Bug("bfloat16 rounds ties up", "common/convert.h", "0x7fff + ((bits >> 16) & 1)", "0x8000", "conversions"),
    Bug("float16 loses infinity", "common/convert.h", "(magnitude >= 0x7c00 ? 0x7f800000 : 0)", "0u", "conversions"),
    Bug(
        "the rest of a row is left out",
        "common/sum.h",
        "n / lanes * lanes; i < n;",
        "n / lanes * lanes; i < 0;",
        "conversions",
    ),
    Bug(
        "tied tokens in reverse",
        "sampling/ranking.h",
        ": a.index < b.index",
        ": a.index > b.index",
        "sampling",
    ),
    Bug(
        "the window is one slot too long",
        "decode/step/attention.h",
        "newest + 1 - window - begin, 0, n) : 0",
        "newest - window - begin, 0, n) : 0",
        "step",
    ),
]
