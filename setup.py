"""Builds torch_fused._C from csrc_mps, with every Metal source embedded in it. The metadata is in pyproject.toml."""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
SOURCES = Path("csrc_mps")
MACOS = platform.system() == "Darwin"

# Fall back to the ninja of the building environment, activated or not.
os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)))

# The front end is plain Python, imported without the package, which needs the extension built here.
sys.path.insert(0, str(ROOT / "torch_fused"))
from metal.flatten import flatten  # noqa: E402
from metal.translate import translate_to_cuda  # noqa: E402


def embed(metal: Path, target: Path) -> Path:
    """Writes the C++ file with one op's Metal source and its CUDA translation, unless it is unchanged."""
    text = flatten(ROOT / metal, [ROOT / SOURCES])
    cuda = "" if MACOS else translate_to_cuda(text, metal.name)
    # Compilers limit a string literal to about 64 KB; adjacent literals are joined.
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
    """The arguments of setup() for the extension; needs torch."""
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        sys.exit(
            "torch_fused is compiled against your installed torch, and no torch was found.\n"
            "Install torch first, then build without isolation:\n"
            "    pip install 'torch>=2.11' 'setuptools>=77' ninja\n"
            "    pip install --no-build-isolation ."
        )

    class Build(cpp_extension.BuildExtension):
        """Keeps object files in build/, so that editing a file rebuilds only that file, also under pip."""

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

    # Torch's headers are system headers, so that only our warnings are shown.
    system_includes = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    openmp = [] if MACOS else ["-fopenmp"]  # the libgomp.so.1 that torch has loaded, so there is one thread pool
    # Some Pythons link extensions with their own libstdc++ (-static-libstdc++), which does not work with torch's.
    libraries = ["-framework", "Foundation", "-framework", "Metal"] if MACOS else ["-l:libstdc++.so.6", *openmp]

    return dict(
        ext_modules=[
            cpp_extension.CppExtension(
                "torch_fused._C",
                sources=[str(path) for path in host_sources()],
                include_dirs=[str(ROOT / SOURCES)],
                extra_compile_args=[
                    "-O3",
                    "-g0",  # Python's flags enable debug information, which takes half of the build time
                    "-ffp-contract=off",
                    "-fno-trapping-math",  # otherwise g++ does not vectorise loops with comparisons below AVX-512
                    "-fno-math-errno",  # a sqrt that sets errno prevents vectorisation
                    "-fvisibility=hidden",
                    "-DAT_PER_OPERATOR_HEADERS",  # otherwise autograd's headers include every op of torch
                    "-Wall",
                    "-Wextra",
                    "-Wno-unknown-pragmas",
                    "-Wno-array-bounds",  # g++ 13 reports these in std::vector<bool> in torch's headers
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
# The metadata and the sdist do not need the extension or torch. The Makefile builds it while pip does the rest.
BUILDS = not DESCRIBES & set(sys.argv) and os.environ.get("TORCH_FUSED_EXTENSION") != "0"
setup(**(extension() if BUILDS else {}))
