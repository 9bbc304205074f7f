"""C++ functions compiled for this machine when they are first needed, and kept for later runs.

They need ``g++`` (or what ``CXX`` names) and no headers of torch: the functions take addresses, by way of ctypes.
Whoever uses them has a way of its own, in torch operators, for machines without a compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

# torch's own copy of the OpenMP runtime: a second one would bring threads of its own that fight for the cores.
OPENMP = Path(torch.__file__).parent / "lib" / "libgomp.so.1"

HEADERS = Path(__file__).parent  # which every source may include from: vectors.h, products.h

_FLAGS = "-O3 -march=native -ffp-contract=fast -fno-math-errno -fno-trapping-math -fopenmp -fPIC -std=c++20 -Wno-psabi"


@functools.cache
def native_library(source: Path) -> ctypes.CDLL | None:
    """The functions of a C++ file; None, with a warning, where they cannot be had. ROLLOUTS_NATIVE=0 forbids them."""
    if os.environ.get("ROLLOUTS_NATIVE") == "0":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not OPENMP.exists() or platform.system() != "Linux":
        warnings.warn(f"no g++ here: torch operators do what {source.name} would do faster", stacklevel=2)
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        warnings.warn(f"torch operators stand in for {source.name}, which cannot be compiled: {reason}", stacklevel=2)
        return None


def _compiled(source: Path, compiler: str) -> Path:
    """The shared library for this source, compiler and processor, made if it is not in the cache yet."""
    # -march=native means another thing on another processor, and a cache folder may be shared by several.
    target = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=True
    ).stdout
    texts = [path.read_text() for path in (source, *sorted(HEADERS.glob("*.h")))]
    key = hashlib.sha256("\0".join((*texts, _FLAGS, compiler, target, str(OPENMP))).encode()).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rollouts" / "native"
    library = folder / f"{source.stem}-{key[:16]}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # Compiled and linked apart: linking with -fopenmp would add the compiler's own runtime.
            compile_ = [compiler, *_FLAGS.split(), f"-I{HEADERS}", "-c", str(source), "-o", f"{scratch}/code.o"]
            link = [compiler, "-shared", f"{scratch}/code.o", str(OPENMP), "-o", f"{scratch}/code.so"]
            for command in (compile_, link):
                subprocess.run(command, capture_output=True, text=True, check=True)
            os.replace(f"{scratch}/code.so", library)
    return library
