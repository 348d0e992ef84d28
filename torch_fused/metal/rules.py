"""Words that Metal, the emulator or this project's rules for kernels do not allow."""

from __future__ import annotations

import re

from .errors import Diagnostics
from .lexer import Token

NO_TEXTURES = "textures and samplers are not supported: the emulator runs compute kernels on buffers"
NO_FENCES = "fences and device scope are not supported: only a later launch can read another threadgroup's values"
NO_EXIT = "a kernel cannot end the process"
NO_OTHER_LANGUAGE = "functions of other languages are not available in Metal"
NO_PACKING = "packing of normalised numbers is not supported"
NO_EXCEPTIONS = "exceptions are not supported in Metal"
FORBIDDEN = {
    "double": "type 'double' is not supported in Metal",
    "goto": "goto is not supported in Metal",
    "new": "operator new is not supported in Metal",
    "delete": "operator delete is not supported in Metal",
    "virtual": "virtual functions are not supported in Metal",
    "try": NO_EXCEPTIONS,
    "catch": NO_EXCEPTIONS,
    "throw": NO_EXCEPTIONS,
    "dynamic_cast": "dynamic_cast is not supported in Metal",
    "typeid": "typeid is not supported in Metal",
    "thread_local": "thread_local is not supported in Metal",
    "register": "register is not supported in Metal",
    "asm": "inline assembly is not supported in Metal",
    "std": "the C++ standard library is not available: use metal::",
    "atomic_thread_fence": NO_FENCES,
    "thread_scope_device": NO_FENCES,
    "memory_order_acquire": NO_FENCES,
    "memory_order_release": NO_FENCES,
    "memory_order_acq_rel": NO_FENCES,
    "memory_order_seq_cst": NO_FENCES,
    "visible_function_table": "function pointers are not supported",
    "intersection_function_table": "ray tracing is not supported",
    "acceleration_structure": "ray tracing is not supported",
    "instance_acceleration_structure": "ray tracing is not supported",
    "primitive_acceleration_structure": "ray tracing is not supported",
    "raytracing": "ray tracing is not supported",
    "imageblock": "imageblocks are not supported",
    "command_buffer": "indirect command buffers are not supported",
    "compute_command": "indirect command buffers are not supported",
    "mpp": "Metal Performance Primitives are not supported",
    "tensor_ops": "Metal Performance Primitives are not supported",
    "__builtin_abort": NO_EXIT,
    "__builtin_exit": NO_EXIT,
    "simdgroup_async_copy": "asynchronous copies are not supported",
    "simdgroup_event": "asynchronous copies are not supported",
}
PACKING = re.compile(r"(un)?pack_\w*(norm|srgb)\w*")
TEXTURE = re.compile(r"(texture|depth)(1d|2d|3d|cube|_buffer)(_ms)?(_array)?")
LINE = re.compile(r'#line (\d+) "(.*)"')
# Not used by our kernels, and not supported by the CUDA translation
PROJECT_RULES = {
    "float": "float atomics are not deterministic: reduce in a fixed order",
    "long": "64-bit atomics are not supported",
    "ulong": "64-bit atomics are not supported",
}


def check_words(tokens: list[Token], diagnostics: Diagnostics) -> None:
    """Adds an error for each forbidden word and literal. The last token is the end of the source."""
    for i, token in enumerate(tokens):
        before, after = tokens[i - 1].text, tokens[min(i + 1, len(tokens) - 1)]
        message = None
        if token.text in FORBIDDEN and before not in (".", "->"):
            defaulted = token.text == "delete" and before == "="
            if not defaulted and (token.text != "std" or after.text == "::"):
                message = FORBIDDEN[token.text]
        elif TEXTURE.fullmatch(token.text) or (token.text == "sampler" and after.kind == "name"):
            message = NO_TEXTURES
        elif PACKING.fullmatch(token.text) and after.text == "(":
            message = NO_PACKING
        elif token.text == "extern" and after.kind == "string":
            message = NO_OTHER_LANGUAGE
        literal = token.float_literal()
        if literal and literal[1] not in ("", "f", "h", "bf"):
            message = f"literal {token.text}: Metal's floating-point suffixes are f, h and bf"
        if message:
            diagnostics.error(token.file, token.line, message)


def check_ascii(text: str, name: str, diagnostics: Diagnostics) -> None:
    """Adds an error for each line that is not ASCII, including comments: the build embeds the text in C++."""
    number = 0
    for line in text.split("\n"):
        number += 1
        if place := LINE.match(line):
            number, name = int(place[1]) - 1, place[2]
        elif not line.isascii():
            diagnostics.error(name, number, "non-ASCII character " + ascii(next(c for c in line if not c.isascii())))


def check_project_rules(tokens: list[Token], diagnostics: Diagnostics) -> None:
    """Adds an error for each word that Metal allows and this project's kernels must not use."""
    for i, token in enumerate(tokens):
        element = token.text[len("atomic_") :] if token.text.startswith("atomic_") else None
        if token.text == "atomic" and tokens[i + 1].text == "<":
            element = tokens[i + 2].text
        if element in PROJECT_RULES:
            diagnostics.error(token.file, token.line, PROJECT_RULES[element])
