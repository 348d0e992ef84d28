"""Writes .tbd files: macOS libraries as lists of exported names, for the linker.

A macOS binary names the library of every symbol it imports, so torch's libraries tell a good part of what libc++,
libobjc and Foundation export. system_symbols.txt adds what torch happens not to use. libSystem comes with ziglang.
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

LIBRARIES = {
    "libc++": "/usr/lib/libc++.1.dylib",
    "libobjc": "/usr/lib/libobjc.A.dylib",
    "Foundation": "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation",
}
TBD = """\
--- !tapi-tbd
tbd-version: 4
targets: [ arm64-macos ]
install-name: '{path}'
exports:
  - targets: [ arm64-macos ]
    symbols: [ {symbols} ]
...
"""


def read_system_symbols() -> dict[str, set[str]]:
    """The names in system_symbols.txt by their provider."""
    names: dict[str, set[str]] = defaultdict(set)
    for line in Path(__file__).with_name("system_symbols.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            provider, name = line.split()
            names[provider].add(name)
    return names


def read_imports(library: Path) -> dict[str, set[str]]:
    """The names that a macOS binary imports, by library."""
    command = ["llvm-nm-19", "-m", "-u", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names: dict[str, set[str]] = defaultdict(set)
    for name, provider in re.findall(r"external (\S+) \(from ([^)]+)\)", listing):
        names[provider].add(name)
    return names


def write_link_stubs(directory: Path, torch_libraries: list[Path], zig: Path) -> None:
    """Writes libSystem.tbd, libc++.tbd, libobjc.tbd and the Foundation framework."""
    exports = read_system_symbols()
    for library in torch_libraries:
        for provider, names in read_imports(library).items():
            exports[provider] |= names
    for name, path in LIBRARIES.items():
        file = directory / (f"{name}.tbd" if name.startswith("lib") else f"{name}.framework/{name}.tbd")
        file.parent.mkdir(parents=True, exist_ok=True)
        symbols = ", ".join(f"'{symbol}'" for symbol in sorted(exports[name]))
        file.write_text(TBD.format(path=path, symbols=symbols))
    # ziglang lists libSystem for arm64e, which has the same names as arm64, and for a variant that lld-19 lacks.
    system = (zig / "lib/libc/darwin/libSystem.tbd").read_text()
    system = re.sub(r",\s*arm64e\.x1-\w+", "", system).replace("arm64e-macos", "arm64-macos")
    (directory / "libSystem.tbd").write_text(system)
