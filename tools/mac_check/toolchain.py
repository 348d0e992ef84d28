"""Downloads the tools once from PyPI: clang with macOS's C headers (ziglang), and torch's macOS wheel."""

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ZIGLANG = "0.17.1"
LIBRARIES = ("libtorch.dylib", "libtorch_cpu.dylib", "libtorch_python.dylib", "libc10.dylib")


@dataclass(frozen=True)
class Torch:
    """The parts of torch's macOS wheel that an extension's build needs."""

    version: str
    root: Path

    @property
    def include(self) -> list[Path]:
        return [self.root / "include", self.root / "include/torch/csrc/api/include"]

    @property
    def lib(self) -> Path:
        return self.root / "lib"

    @property
    def standard(self) -> str:
        """The oldest C++ version for torch's headers: c++17, or c++20 from torch 2.14 on."""
        return "c++20" if "202002L" in (self.root / "include/ATen/ATen.h").read_text() else "c++17"


def cache_directory() -> Path:
    """The folder for downloads: mac_check in $TORCH_FUSED_CACHE, or in torch_fused in the user's cache folder."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("TORCH_FUSED_CACHE") or user / "torch_fused") / "mac_check"


def fetch_zig() -> Path:
    """The folder of the ziglang package."""
    target = cache_directory() / f"ziglang-{ZIGLANG}"
    if not target.exists():
        print(f"downloading ziglang {ZIGLANG} (about 100 MB)", flush=True)
        with unfinished(target) as partial:
            pip("install", "--no-deps", "--target", str(partial), f"ziglang=={ZIGLANG}")
            (partial / "ziglang").rename(target)
    return target


def fetch_torch(version: str) -> Torch:
    """The headers and libraries of torch's wheel for macOS on arm64."""
    target = cache_directory() / f"torch-{version}"
    if not target.exists():
        print(f"downloading torch {version} for macOS (about 110 MB)", flush=True)
        with unfinished(target) as partial:
            platforms = ["--platform", "macosx_14_0_arm64", "--platform", "macosx_11_0_arm64"]
            pip("download", "--no-deps", "--only-binary=:all:", *platforms, "-d", str(partial), f"torch=={version}")
            (wheel,) = partial.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                wanted = [n for n in archive.namelist() if n.startswith("torch/include/") or n.endswith(LIBRARIES)]
                archive.extractall(partial, wanted)
            (partial / "torch").rename(target)
    return Torch(version, target)


@contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A temporary folder next to the target, so that an interrupted download leaves no target."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        yield Path(directory)


def pip(*arguments: str) -> None:
    if subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments]).returncode:
        sys.exit(f"mac-check: pip could not {arguments[0]} {arguments[-1]}")
