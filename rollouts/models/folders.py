"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rollouts.errors import RunError, UserError


@contextmanager
def new_folder(folder: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder to write into; it takes the name ``folder`` when the block ends without an exception.

    Every file is flushed to disk before the rename. On an exception what was written is removed and ``folder`` is as it
    was. With ``overwrite`` a folder of that name is replaced; for the moment between two renames neither has the name.

    Raises:
        UserError: ``folder`` is a file, or exists, is not empty, and ``overwrite`` is not set; or it cannot be made.
        RunError: the disk does not take the weights.
    """
    folder = Path(folder).expanduser().absolute()
    check_free(folder, overwrite=overwrite)
    partial = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); give a place that you may write to") from error
    try:
        yield partial
        for path in (*partial.rglob("*"), partial):
            _flush(path)
        if folder.exists():
            old = folder.with_name(f".{folder.name}.old-{os.getpid()}")
            folder.rename(old)
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
        _flush(folder.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # the disk's errors have this name when weights are written
            raise RunError(f"{folder} could not be written: {error}; make room or mend the disk first") from error
        raise


def check_free(folder: str | Path, *, overwrite: bool = False) -> None:
    """Raise UserError if ``new_folder`` would refuse the name; worth calling before hours of work."""
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another name for the folder to write")
    if folder.is_dir() and not overwrite and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; give another name, or remove it first")
    check_place(folder)


def check_place(folder: Path) -> None:
    """Raise UserError if nothing can be made under this name, because what it would lie in is no folder or read-only.

    The superuser is told what permissions say, not what a read-only file system does: making the folder tells that.
    """
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{folder} cannot be made: {above} is no folder that you may write to; give another place")


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
