"""The per-user cache of compiled kernels and converted models."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_BUILDING = ".building-"
"""Prefix of the names of unfinished folders."""


class CacheError(RuntimeError):
    """The cache folder cannot be used; the message names it, the reason, and what to do."""

    def __init__(self, folder: Path | str, reason: Exception | str) -> None:
        name = str(folder).encode(errors="backslashreplace").decode()  # printable for any bytes
        reason = getattr(reason, "strerror", None) or reason
        super().__init__(
            f"torch_fused: the cache folder {name} cannot be used: {reason}. Set TORCH_FUSED_CACHE to a writable "
            "folder of your own."
        )


def cache_dir(kind: str) -> Path:
    """The user's cache folder for `kind`, created if needed, not readable by other users. Raises CacheError.

    ``$TORCH_FUSED_CACHE``, else ``torch_fused`` in ``$XDG_CACHE_HOME``, in ``~/Library/Caches`` on macOS, or in
    ``~/.cache``.
    """
    folder = _base() / kind
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise CacheError(folder, error) from error
    if owner != os.geteuid():  # its files are loaded and run
        raise CacheError(folder, f"it belongs to user {owner}, not to user {os.geteuid()}")
    return folder


def _base() -> Path:
    chosen = os.environ.get("TORCH_FUSED_CACHE")
    if chosen:
        return Path(chosen).absolute()
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]).absolute() / "torch_fused"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise CacheError("~/.cache/torch_fused", error) from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "torch_fused"


def kept(kind: str, key: str, build: Callable[[Path], None]) -> Path:
    """The cache folder for `key`, filled by `build` now or in an earlier run. Raises CacheError.

    Its name contains the digest of its contents: a damaged folder is removed and built again. It is built under a
    temporary name and then renamed, so an unfinished folder is never used. If the file system has locks, only one of
    several processes builds the same folder.
    """
    folder = cache_dir(kind)
    entry = _intact(folder, key)
    if entry is None:
        with _building(folder) as new, _alone(folder, key):
            entry = _intact(folder, key)  # another process may have built it
            if entry is None:
                build(new)
                entry = new.rename(folder / f"{key}.{_digest(new)}.{new.name.removeprefix(_BUILDING)}")
    return entry


@contextlib.contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """Waits for other processes that are building `key`."""
    path = folder / f".{key}.lock"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            fcntl.flock(stack.enter_context(open(path, "a")), fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _intact(folder: Path, key: str) -> Path | None:
    for entry in sorted(folder.glob(f"{key}.*.*")):
        if entry.name.split(".")[1] == _digest(entry):
            return entry
        shutil.rmtree(entry, ignore_errors=True)
    return None


def _digest(folder: Path) -> str:
    """Digest of names, sizes and bytes of all files; "" if they cannot be read, for example while being removed."""
    digest = hashlib.sha256()
    try:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(os.fsencode(path.relative_to(folder)) + b"\0%d\0" % path.stat().st_size)
            with path.open("rb") as file:
                while part := file.read(2**20):
                    digest.update(part)
    except OSError:
        return ""
    return digest.hexdigest()[:32]


@contextlib.contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """A new folder in `folder`, removed at the end if it is still there.

    Builders share a lock. If one gets it exclusively, all other unfinished folders belong to killed processes.
    """
    with contextlib.ExitStack() as stack:
        try:
            lock = stack.enter_context(open(folder / ".lock", "a"))
            with contextlib.suppress(OSError):  # another process is building, or the file system has no locks
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for leftover in folder.glob(f"{_BUILDING}*"):
                    shutil.rmtree(leftover, ignore_errors=True)
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_SH)
            new = tempfile.TemporaryDirectory(prefix=_BUILDING, dir=folder, ignore_cleanup_errors=True)
            name = stack.enter_context(new)
        except OSError as error:
            raise CacheError(folder, error) from error
        yield Path(name)
