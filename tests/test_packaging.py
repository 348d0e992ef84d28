"""The sdist contains the whole source tree and is made without torch; `make package-check` builds and tests it."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the source tree without ignored files, so that nothing is written next to the sources."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    copy = tmp_path_factory.mktemp("packaging") / "tree"
    return shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", *ignored))


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """The environment of a Python that has no torch."""
    folder = tmp_path_factory.mktemp("without_torch")
    (folder / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


def setup(tree, *arguments, env=None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", "setup.py", "-q", *arguments]
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def sources(tree: Path) -> set[str]:
    """The files under version control; without it, as in an unpacked sdist, all files."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", ROOT, "ls-files"], capture_output=True, text=True)
        if git.returncode == 0:
            return set(git.stdout.splitlines()) & files_in(tree)
    return files_in(tree)


def test_sdist_has_every_source_and_needs_no_torch(tree, without_torch):
    """No file under version control is missing, and there are no build products."""
    expected = sources(tree)
    assert {"setup.py", "csrc_mps/module.cpp", "csrc_mps/runtime/metal.mm", "tests/conftest.py"} <= expected
    result = setup(tree, "sdist", env=without_torch)
    assert result.returncode == 0, result.stderr
    (archive,) = (tree / "dist").glob("torch_fused-*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {member.name.partition("/")[2] for member in tar if member.isfile()}
        scripts = {member.name.partition("/")[2] for member in tar if member.isfile() and member.mode & 0o100}
    assert expected - packed == set()
    assert not {name for name in packed if name.endswith((".so", ".pyc"))}
    assert {".ci/run", "tools/gpu_check.sh", "tools/package_check.sh"} <= scripts


@pytest.mark.parametrize("command", ["bdist_wheel", "editable_wheel", "build_ext"])
def test_build_without_torch_says_what_to_install(tree, without_torch, command):
    """One message, no traceback."""
    result = setup(tree, command, env=without_torch)
    assert result.returncode != 0
    assert "Install torch first" in result.stderr and "--no-build-isolation" in result.stderr
    assert "Traceback" not in result.stderr


def test_unbuilt_sources_say_so_when_imported(tree):
    """Python imports from its folder before installed packages. -S: an editable install would hide the error."""
    command = [sys.executable, "-B", "-S", "-c", "import torch_fused"]
    packages = os.pathsep.join(path for path in sys.path if path.endswith("-packages"))
    result = subprocess.run(
        command, cwd=tree, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": packages}
    )
    assert "the extension of the sources in" in result.stderr and "is not built" in result.stderr


def test_wheel_has_every_module_and_the_emulators_headers(tree, tmp_path):
    """All of torch_fused/ is installed with the extension."""
    result = setup(tree, "build_py", "--build-lib", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert files_in(tmp_path) == {f"torch_fused/{name}" for name in files_in(tree / "torch_fused")}
