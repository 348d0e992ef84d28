"""Where compiled kernels and converted models are kept between runs, per user."""

import os
import sys
from pathlib import Path


def cache_dir(kind: str) -> Path:
    """The user's cache folder for `kind`, made if need be, readable by nobody else.

    ``$TORCH_FUSED_CACHE``, else ``torch_fused`` in ``$XDG_CACHE_HOME``, in ``~/Library/Caches`` on macOS, or in
    ``~/.cache``.
    """
    chosen = os.environ.get("TORCH_FUSED_CACHE")
    if chosen:
        base = Path(chosen)
    elif os.environ.get("XDG_CACHE_HOME"):
        base = Path(os.environ["XDG_CACHE_HOME"]) / "torch_fused"
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "torch_fused"
    folder = base / kind
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
