"""The cache between runs: it is checked, damage is repaired, and unusable folders are named."""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from torch_fused import cache
from torch_fused.cache import CacheError, cache_dir, kept
from torch_fused.metal import compile_shader, emulate
from torch_fused.metal.preprocess import compiler

ROOT = Path(__file__).parents[1]
KERNEL = "#include <metal_stdlib>\nkernel void k(device float* x, uint i [[thread_position_in_grid]]) { x[i] *= %s; }"

# The start of the child processes. `twice(source)` compiles a kernel, or loads it from the cache, and uses it.
PRELUDE = f"""
import os, sys, time
from pathlib import Path
import torch
from torch_fused.cache import cache_dir, kept
from torch_fused.metal import compile_shader
from torch_fused.metal.host import compile_host

def twice(factor="2.0f"):
    compile_host.cache_clear()  # as in a new process
    x = torch.ones(3)
    compile_shader({KERNEL!r} % factor).k(x)
    return x.tolist() == [2.0] * 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def start(script: str, **environment) -> subprocess.Popen:
    """Runs in another folder, because Python would import unbuilt sources in the current one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script],
        env=environment,
        cwd=tempfile.gettempdir(),
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return output


def wait_for(condition) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it never came")


def write(text: str):
    return lambda folder: (folder / "file").write_text(text)


# ---- damage ---------------------------------------------------------------------------------------------------------

DAMAGES = {
    "truncated": "put(data[:3000])",
    "empty": "put(b'')",
    "foreign": "put(b'this is no library')",
    "another library": "put(Path(torch._C.__file__).read_bytes())",
    "one byte": "put(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])",
    "half a folder": "library.unlink()",
    "no folder": "library.unlink(); library.parent.rmdir()",
}
DAMAGE = """
def put(bytes):  # as another file: the one that this process has loaded is not to change
    library.with_name("new").write_bytes(bytes)
    library.with_name("new").rename(library)

assert twice()
for name, damage in DAMAGES.items():
    (library,) = cache_dir("emulator").glob("*/kernels.so")
    data = library.read_bytes()
    exec(damage)
    print(name, twice(), flush=True)
"""


def test_damaged_library_is_rebuilt(folder):
    """Each kind of damage, in a child, which could crash: the kernel runs, and nothing is left over."""
    output = finish(start(f"DAMAGES = {DAMAGES}\n{DAMAGE}"))
    assert output.splitlines() == [f"{name} True" for name in DAMAGES]
    assert len(list((folder / "emulator").glob("*/kernels.so"))) == 1


def test_kept_builds_once_and_again_after_damage(folder):
    """Any kind of folder, such as the demo's model: a missing, changed or added file is noticed."""
    built = []

    def build(new):
        built.append(new)
        (new / "below").mkdir()
        (new / "below" / "a").write_text("a")
        (new / "b").write_text("b")

    entry = kept("models", "key", build)
    assert kept("models", "key", build) == entry and len(built) == 1
    assert (folder / "models").stat().st_mode & 0o777 == 0o700

    def rename(entry):
        (entry / "b").rename(entry / "c")

    damages = (
        lambda entry: (entry / "below" / "a").unlink(),
        lambda entry: (entry / "b").write_text("B"),
        lambda entry: (entry / "more").write_text(""),
        rename,
    )
    for count, damage in enumerate(damages, 2):
        damage(entry)
        entry = kept("models", "key", build)
        assert (entry / "below" / "a").read_text() + (entry / "b").read_text() == "ab"
        assert len(built) == count
    assert [path.name for path in (folder / "models").iterdir() if path.name != ".lock"] == [entry.name]


def test_other_files_stay(folder):
    """A cache folder with other files, from a user or an older release."""
    mine = folder / "models" / "tmp" / "weights"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    kept("models", "key", write("a"))
    assert mine.read_text() == "mine"


def test_a_failed_build_leaves_nothing(folder):
    def build(new):
        (new / "half").write_text("")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        kept("models", "key", build)
    assert [path.name for path in (folder / "models").iterdir()] == [".lock"]


# ---- several processes ----------------------------------------------------------------------------------------------


def test_several_processes_compile_at_once(folder):
    """From an empty cache: each gets its kernel, and nothing unfinished is left."""
    children = [start("print(twice())") for _ in range(3)]
    assert [finish(child).strip() for child in children] == ["True"] * 3
    names = {path.name for path in (folder / "emulator").iterdir()} - {".lock"}
    assert names and not any(name.startswith(".") for name in names)
    assert finish(start("import torch_fused.metal.host as host\nhost._compile = None\nprint(twice())")) == "True\n"


def test_of_several_who_want_the_same_one_builds(folder):
    built = []

    def build(new):
        built.append(new)
        time.sleep(0.3)
        (new / "a").write_text("a")

    with ThreadPoolExecutor(4) as pool:
        entries = set(pool.map(lambda _: kept("models", "key", build), range(4)))
    assert len(entries) == len(built) == 1


def test_a_killed_compilation_is_cleaned_up(folder, tmp_path):
    """But not while another process compiles, because its folder looks the same."""
    end, slow = tmp_path / "end", tmp_path / "slow"
    call = " ".join(compiler())
    slow.write_text(
        f'#!/bin/sh\ncase " $*" in *--version*|*" -E "*) exec {call} "$@";; esac\n'
        f"touch half\nwhile [ ! -e '{end}' ]; do sleep 0.1; done\n"
    )
    slow.chmod(0o700)

    def half():
        return list((folder / "emulator").glob(".building-*/half"))

    killed = start("twice()", CXX=str(slow))
    try:
        wait_for(half)
        (left,) = half()
        killed.kill()
        killed.wait()
        assert left.exists()
        script = f"""
        def build(new):
            (new / "half").touch()
            while not Path({str(end)!r}).exists():
                time.sleep(0.1)
            (new / "half").write_text("whole")
        print((kept("emulator", "slow", build) / "half").read_text())
        """
        live = start("\n".join(line[8:] for line in script.splitlines()))
        wait_for(lambda: half() and half() != [left])
        # The live process, alone at its start, has removed the killed one's folder; now it is not alone.
        (theirs,) = half()
        dead = folder / "emulator" / ".building-dead"
        dead.mkdir()
        kept("emulator", "quick", write("a"))
        assert theirs.exists() and dead.exists()
    finally:
        end.touch()
    assert finish(live) == "whole\n"
    kept("emulator", "last", write("b"))
    assert not dead.exists() and not half()


# ---- folders that cannot be used ------------------------------------------------------------------------------------


@pytest.fixture(params=["a file", "below a file", "not writable"])
def unusable(request, tmp_path) -> Path:
    (tmp_path / "file").write_text("")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "emulator").write_text("")
    return {
        "a file": tmp_path / "cache",
        "below a file": tmp_path / "file",
        "not writable": Path("/sys/torch_fused"),  # not even for root
    }[request.param]


def test_unusable_folder_is_named(unusable, monkeypatch):
    """With the reason, and what to do."""
    monkeypatch.setenv("TORCH_FUSED_CACHE", str(unusable))
    with pytest.raises(CacheError, match=f"cache folder {unusable}/emulator cannot be used: .*Set TORCH"):
        compile_shader(KERNEL % f"{id(unusable)}.0f").k(torch.ones(1))


def test_another_users_folder_is_an_error(folder, monkeypatch):
    """Its files would be run."""
    kept("emulator", "key", write("a"))
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(CacheError, match=rf"{folder}/emulator cannot be used: it belongs to user {user}, not to user"):
        cache_dir("emulator")


def test_no_home_folder(monkeypatch):
    """A user without one, as in a container: the error says what to set."""

    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH_FUSED_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "home", home)
    with pytest.raises(CacheError, match=r"Could not determine home directory.*Set TORCH_FUSED_CACHE"):
        cache_dir("emulator")


def test_a_relative_folder_after_chdir(tmp_path, monkeypatch):
    """The library is loaded from the absolute path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FUSED_CACHE", "here")
    library = compile_shader(KERNEL % "3.0f")
    library.k(torch.ones(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    x = torch.ones(1)
    with emulate(checked=False):
        library.k(x)
    assert x.item() == 3.0
    assert (tmp_path / "here" / "emulator").is_dir() or (tmp_path / "elsewhere" / "here").is_dir()


# Bytes that are not UTF-8 are not valid file names on macOS.
NAMES = ["caf\u00e9".encode()] + ([] if sys.platform == "darwin" else [b"caf\xe9"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_folder_that_the_locale_cannot_name_works(tmp_path, name, locale):
    """The loader gets the path as the system's bytes."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    settings = {"LC_ALL": locale, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert finish(start("print(twice())", TORCH_FUSED_CACHE=path, **settings)) == "True\n"
    assert len(list((Path(path) / "emulator").glob("*/kernels.so"))) == 1


def test_a_read_only_folder_can_be_read():
    """The error for a missing file names it."""
    script = """
    folder = Path(os.environ["TORCH_FUSED_CACHE"])
    assert twice()
    for path in (*folder.rglob("*"), folder):
        path.chmod(0o500)
    if os.geteuid() == 0:  # to whom modes mean nothing
        for path in (*folder.rglob("*"), folder):
            os.chown(path, 65534, -1)
        os.setuid(65534)
    assert twice()
    try:
        twice("3.0f")
    except RuntimeError as error:
        print(str(error).startswith(f"torch_fused: the cache folder {folder}/emulator cannot be used: Perm"))
    """
    with tempfile.TemporaryDirectory() as folder:
        script = "\n".join(line[4:] for line in script.splitlines())
        assert finish(start(script, TORCH_FUSED_CACHE=folder)) == "True\n"
        for path in (Path(folder), *Path(folder).rglob("*")):
            path.chmod(0o700)


# ---- cubins ---------------------------------------------------------------------------------------------------------

# The file store of CUDA kernels with its own main(): no GPU is needed to store a file.
KEEPER = """
#include <iostream>
#include "runtime/kept_file.h"
int main(int count, char** words) {
  const std::string what = words[1];
  if (what == "folder") std::cout << torch_fused::cache_folder("cubin").string();
  if (what == "load") std::cout << torch_fused::load_kept(words[2]);
  if (what == "save" && count == 4) torch_fused::save_kept(words[2], words[3]);
}
"""


@pytest.fixture(scope="module")
def keeper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keeper")
    (folder / "main.cpp").write_text(KEEPER)
    include = ROOT / "csrc_mps"
    source = include / "runtime" / "kept_file.cpp"
    flags = ["-std=c++17", "-O1", "-I", include, "main.cpp", source, "-o", "keeper"]
    subprocess.run([*compiler(), *flags], cwd=folder, check=True)

    def call(*words, **environment) -> str:
        command = [folder / "keeper", *words]
        environment = {**os.environ, **environment}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    return call


def test_damaged_cubin_is_not_loaded_and_is_written_again(keeper, tmp_path):
    path = tmp_path / "cubin" / "op-1.cubin"
    assert keeper("load", path) == ""
    keeper("save", path, "machine code")
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert keeper("load", path) == "machine code"
    whole = path.read_bytes()
    damages = (whole[:-1], whole[:10], b"", b"not ours, but a file", whole.replace(b"code", b"c0de"), whole + b"\0")
    for damage in damages:
        path.write_bytes(damage)
        assert keeper("load", path) == ""
        keeper("save", path, "machine code")
        assert keeper("load", path) == "machine code"
    assert list(path.parent.iterdir()) == [path]


def test_unfinished_cubins_of_killed_processes_are_removed(keeper, tmp_path):
    """A running process keeps its file."""
    path = tmp_path / "cubin" / "op-1.cubin"
    path.parent.mkdir()
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead = path.with_name(f"op-1.cubin.{ended.stdout.strip()}.partial")
    live = path.with_name(f"op-2.cubin.{os.getpid()}.partial")
    dead.touch()
    live.touch()
    keeper("save", path, "machine code")
    assert set(path.parent.iterdir()) == {path, live}


@pytest.mark.parametrize("path", ["file/cubin/op.cubin", "/sys/torch_fused/cubin/op.cubin", "folder/op.cubin"])
def test_an_unusable_folder_for_cubins_only_costs_time(keeper, tmp_path, path):
    (tmp_path / "file").touch()
    (tmp_path / "folder" / "op.cubin" / "full").mkdir(parents=True)
    keeper("save", tmp_path / path, "machine code")
    assert keeper("load", tmp_path / path) == ""
    assert not list((tmp_path / "folder").glob("*.partial"))


def test_cubins_are_in_the_same_cache_folder(keeper, tmp_path):
    assert keeper("folder", TORCH_FUSED_CACHE=str(tmp_path)) == f"{tmp_path}/cubin"
    empty = {"TORCH_FUSED_CACHE": "", "XDG_CACHE_HOME": ""}
    assert keeper("folder", **(empty | {"XDG_CACHE_HOME": "/x"})) == "/x/torch_fused/cubin"
    assert keeper("folder", **empty, HOME="/h") == "/h/.cache/torch_fused/cubin"
    assert keeper("folder", **empty, HOME="") == os.path.expanduser("~/.cache/torch_fused/cubin")
