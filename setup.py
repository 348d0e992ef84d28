"""Builds torch_fused._C from csrc_mps, with every Metal source embedded in it. The metadata is in pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc_mps")
MACOS = platform.system() == "Darwin"

# Where there is no other ninja, that of the environment that builds, activated or not.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))

# The front end is plain Python; reached beside the package, whose own import needs the extension built here.
sys.path.insert(0, str(ROOT / "torch_fused"))
from metal.flatten import flatten  # noqa: E402
from metal.translate import translate_to_cuda  # noqa: E402


def embed(metal: Path, target: Path) -> Path:
    """Writes the C++ file that carries one op's Metal text and its CUDA translation; untouched if nothing changed."""
    text = flatten(ROOT / metal, [ROOT / SOURCES])
    cuda = "" if MACOS else translate_to_cuda(text, metal.name)
    # Compilers limit one string literal to 64 KB or so; neighbouring literals are joined.
    literals = ["".join(f'R"__metal({part})__metal"\n' for part in split(source)) for source in (text, cuda or " ")]
    code = (
        f'#include "runtime/source.h"\n\nstatic const torch_fused::Source source("{metal.stem}",\n'
        f"{literals[0]},\n{literals[1]});\n"
    )
    if not target.exists() or target.read_text() != code:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(code)
    return target


def split(text: str, size: int = 16000) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]


def metal_sources() -> list[Path]:
    return sorted(path for path in SOURCES.glob("*/*.metal"))


def host_sources() -> list[Path]:
    patterns = ["**/*.cpp", "**/*.mm"] if MACOS else ["**/*.cpp"]
    return sorted(path for pattern in patterns for path in SOURCES.glob(pattern))


def extension() -> dict:
    """What setup() is told of the extension; needs torch."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "torch_fused is compiled against the torch it will run with, and no torch was found.\n"
            "Install torch first, then build without isolation:\n"
            "    pip install 'torch>=2.11' 'setuptools>=77' ninja\n"
            "    pip install --no-build-isolation ."
        )

    class Build(cpp_extension.BuildExtension):
        """Keeps object files in build/, so that editing one op's file rebuilds that file only, under pip too."""

        def finalize_options(self):
            super().finalize_options()
            self.build_temp = str(
                ROOT / "build" / f"torch-{torch.__version__}-py{sys.version_info[0]}{sys.version_info[1]}"
            )

        def build_extensions(self):
            for extension in self.extensions:
                generated = [embed(path, Path("build/embedded") / f"{path.stem}_metal.cpp") for path in metal_sources()]
                extension.sources += [str(path) for path in generated]
            super().build_extensions()

    # Torch's headers as system headers: our warnings stay visible, theirs do not.
    system_includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    openmp = [] if MACOS else ["-fopenmp"]  # the same libgomp.so.1 that torch has loaded, so one thread pool
    # Some Pythons link extensions with a libstdc++ of their own (-static-libstdc++), whose streams do not fit torch's.
    libraries = ["-framework", "Foundation", "-framework", "Metal"] if MACOS else ["-l:libstdc++.so.6", *openmp]

    return dict(
        ext_modules=[
            cpp_extension.CppExtension(
                "torch_fused._C",
                sources=[str(path) for path in host_sources()],
                include_dirs=[str(ROOT / SOURCES)],
                extra_compile_args=[
                    "-O3",
                    "-g0",  # Python's own flags ask for debug information, which takes half of the time
                    "-ffp-contract=off",
                    "-fno-trapping-math",  # else g++ leaves loops with a comparison unvectorised below AVX-512
                    "-fno-math-errno",  # a sqrt that may set errno keeps its loop from vectorising
                    "-fvisibility=hidden",
                    "-Wall",
                    "-Wextra",
                    "-Wno-unknown-pragmas",
                    "-Wno-array-bounds",  # g++ 13 sees these in std::vector<bool> through torch's headers
                    "-Wno-stringop-overflow",
                    *openmp,
                    *system_includes,
                ],
                extra_link_args=libraries,
            )
        ],
        cmdclass={"build_ext": Build},
    )


DESCRIBES = {"dist_info", "egg_info", "sdist"}
# The metadata and the sdist need no extension, and so no torch.
setup(**({} if DESCRIBES & set(sys.argv) else extension()))
