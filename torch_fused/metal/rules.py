"""What neither Metal nor this project's rules for kernels allow, where one word tells."""

from __future__ import annotations

from .errors import Diagnostics
from .lexer import Token

NO_FLOAT_ATOMICS = "float atomics are not deterministic: reduce in a fixed order"
NO_LONG_ATOMICS = "64-bit atomics are not supported"
NO_FENCES = "a value written by one threadgroup is read by another only in a later launch: no fences, no device scope"
FORBIDDEN = {
    "double": "type 'double' is not supported in Metal",
    "goto": "goto is not supported in Metal",
    "new": "operator new is not supported in Metal",
    "delete": "operator delete is not supported in Metal",
    "virtual": "virtual functions are not supported in Metal",
    "try": "exceptions are not supported in Metal",
    "catch": "exceptions are not supported in Metal",
    "throw": "exceptions are not supported in Metal",
    "noexcept": "exceptions are not supported in Metal",
    "dynamic_cast": "dynamic_cast is not supported in Metal",
    "typeid": "typeid is not supported in Metal",
    "thread_local": "thread_local is not supported in Metal",
    "register": "register is not supported in Metal",
    "asm": "inline assembly is not supported in Metal",
    "std": "the C++ standard library is not available: use metal::",
    "atomic_float": NO_FLOAT_ATOMICS,
    "atomic_long": NO_LONG_ATOMICS,
    "atomic_ulong": NO_LONG_ATOMICS,
    "atomic_thread_fence": NO_FENCES,
    "thread_scope_device": NO_FENCES,
    "memory_order_acquire": NO_FENCES,
    "memory_order_release": NO_FENCES,
    "memory_order_acq_rel": NO_FENCES,
    "memory_order_seq_cst": NO_FENCES,
}
FORBIDDEN_ATOMICS = {"float": NO_FLOAT_ATOMICS, "long": NO_LONG_ATOMICS, "ulong": NO_LONG_ATOMICS}


def check_words(tokens: list[Token], diagnostics: Diagnostics) -> None:
    """Add an error for each forbidden word and literal. The last token is the end of the source."""
    for i, token in enumerate(tokens):
        following = [t.text for t in tokens[i + 1 : i + 3]]
        message = None
        if token.text in FORBIDDEN and tokens[i - 1].text not in (".", "->"):
            if token.text != "std" or following[0] == "::":
                message = FORBIDDEN[token.text]
        elif token.text == "atomic" and following[0] == "<":
            message = FORBIDDEN_ATOMICS.get(following[1])
        literal = token.float_literal()
        if literal and literal[1] not in ("", "f", "h", "bf"):
            message = f"literal {token.text}: Metal's floating-point suffixes are f, h and bf"
        if message:
            diagnostics.error(token.file, token.line, message)
