"""Checkpoints on disk: a step is committed by one atomic rename or it never happened.

    checkpoints/
      step_000040/      a committed step: its files and manifest.json with the size and SHA-256 of each
      step_000050/
      step_000060.tmp/  being written; swept when the next run starts
      latest            a symbolic link to step_000050, so that checkpoints/latest is itself a model folder

The order within ``checkpoint_transaction`` and what a reader finds after a kill at each point::

    write files -> fsync -> manifest.json -> fsync | step N was never written
    rename step_N.tmp -> step_N, fsync the folder  | step N is whole; `latest` and its step are still there
    move `latest`                                  | `latest` is step N
    purge old steps                                | an old step has all its files or no name

Files hold JSON, safetensors or what ``transformers`` writes; nothing here reads pickle.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rollouts.errors import RunError, UserError
from rollouts.failpoints import failpoint

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1
_STEP = re.compile(r"step_(\d{6,})")
_ORPHAN = re.compile(r"step_\d{6,}(\.purged)?\.tmp|latest\.tmp")
_REPLACED = ".replaced"


class CheckpointError(UserError):
    """A checkpoint that cannot be written, read or trusted; the message names the file."""


class UnwrittenCheckpointError(CheckpointError, RunError):
    """The disk did not take a checkpoint; the run goes on from the one before when there is room."""


@contextmanager
def checkpoint_transaction(root: str | Path, step: int, keep: int = 3) -> Iterator[Path]:
    """Commit what the body writes into the folder it is given as step ``step``, or leave no trace.

    The folder may be filled by other processes too (the ranks of a sharded checkpoint): every file in it when the
    body ends is fsynced, hashed and listed. They must have closed their files by then. A step that exists already is
    replaced.

    Cost: the files are read once more for the hash, about 0.7 s a GB on one core with files hashed side by side, and
    the run waits for the disk.

    Args:
        root: the ``checkpoints`` folder; made when absent.
        step: the number of optimizer steps done.
        keep: newest steps kept, this one included; 0 keeps all. With a limit, steps above ``step`` go first: they
            belong to a history that the run left when it went back.

    Raises:
        UnwrittenCheckpointError: the disk is full or fails. Steps committed before are untouched.
    """
    if step < 0 or keep < 0:
        raise ValueError(f"step and keep must be 0 or more, got step={step}, keep={keep}")
    root = Path(root)
    final = root / f"step_{step:06d}"
    partial = root / f"{final.name}.tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        yield partial
        _seal(partial)
        _rename(partial, final)
        failpoint("checkpoint.before_latest")
        _point_latest(final)
        _purge(root, step, keep)
    except (OSError, SafetensorError) as error:
        raise UnwrittenCheckpointError(
            f"checkpoint {final} could not be written: {error}; earlier checkpoints are untouched: "
            "make room or mend the disk and start the run again to resume"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def find_latest(root: str | Path) -> Path | None:
    """The folder of the step to resume from, verified, or None when there is none at all.

    That is the step that ``latest`` names. When it is damaged, or ``latest`` is, a warning names the file and the
    newest good step before it is taken; steps after it come last, for they may be of a history the run left.
    Reads every byte of the chosen step once.

    Raises:
        CheckpointError: there are steps and none is good.
    """
    root = Path(root)
    steps = list_steps(root)
    named = _read_latest(root)
    if named not in steps:
        if steps:
            logger.warning("%s names no step; looking for the newest good one", root / "latest")
        named = max(steps, default=0)
    for step in sorted(steps, key=lambda s: (s > named, -s)):
        try:
            verify_checkpoint(steps[step])
        except CheckpointError as error:
            logger.warning("%s; falling back to another step", error)
        else:
            return steps[step]
    if steps:
        raise CheckpointError(
            f"{root} holds {len(steps)} checkpoints and none is whole (see the warnings above); "
            "restore one from a copy, or remove the folder to start over"
        )
    return None


def verify_checkpoint(folder: str | Path) -> None:
    """Compare every file of a step with the manifest: sizes first, then contents.

    Files that the manifest does not list are ignored.

    Raises:
        CheckpointError: a file is missing, cut short or changed, or the manifest is; the message names it.
    """
    folder = Path(folder)
    files = _read_manifest(folder / MANIFEST)
    for name, (size, _) in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"checkpoint file {path} is missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"checkpoint file {path} has {path.stat().st_size} bytes instead of {size}")
    hashes = _hash_all([folder / name for name in files])
    for name, (_, sha256) in files.items():
        if hashes[folder / name] != sha256:
            raise CheckpointError(f"checkpoint file {folder / name} is damaged: its SHA-256 is not the manifest's")


def sweep_orphans(root: str | Path) -> list[Path]:
    """Remove what killed runs left half-written or half-purged; called once when a run starts, by one process.

    A step that was being replaced when the run was killed gets its name back. Anything else is left alone.

    Returns:
        The paths removed.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    for replaced in root.glob(f"step_*{_REPLACED}"):
        original = replaced.with_name(replaced.name.removesuffix(_REPLACED))
        if original.exists():
            _discard(replaced)
        else:
            os.rename(replaced, original)
    orphans = sorted(path for path in root.iterdir() if _ORPHAN.fullmatch(path.name))
    for path in orphans:
        _remove(path)
    if orphans:
        logger.info("swept %d unfinished checkpoint(s) from %s", len(orphans), root)
    return orphans


def list_steps(root: str | Path) -> dict[int, Path]:
    """Committed steps of a ``checkpoints`` folder, oldest first, good or damaged."""
    root = Path(root)
    if not root.is_dir():
        return {}
    found = ((_STEP.fullmatch(path.name), path) for path in root.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def require_same(saved: Mapping[str, Any], current: Mapping[str, Any], where: str | Path) -> None:
    """Refuse to resume when a setting that the run's continuation depends on has changed.

    Args:
        saved: the settings that the checkpoint holds, nested mappings of JSON values.
        current: the settings of this run; a key that only one of the two has counts as changed.
        where: the checkpoint, for the message.

    Raises:
        CheckpointError: the message gives the dotted key and both values.
    """
    before, now = _flatten(saved), _flatten(current)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise CheckpointError(
                f"{where} cannot be resumed: {key} was {before.get(key)!r} and is now {now.get(key)!r}; "
                "set it back, or start a new run from this checkpoint"
            )


def write_json(path: str | Path, value: Any) -> None:
    """Write one JSON value; floats round-trip exactly. The transaction fsyncs it."""
    path = Path(path)
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    failpoint("checkpoint.mid_file", torn=path)


def read_json(path: str | Path) -> Any:
    """Inverse of ``write_json``. Raises CheckpointError naming the file when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from error


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors of any dtype and device as safetensors. The transaction fsyncs the file.

    Raises:
        RuntimeError: two tensors share memory (tied weights: write one of them).
        SafetensorError: the disk is full or fails.
    """
    path = Path(path)
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})  # transformers refuses a file without "format"
    failpoint("checkpoint.mid_file", torn=path)


def read_tensors(path: str | Path, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
    """Inverse of ``write_tensors``. Raises CheckpointError naming the file when it is missing or not safetensors."""
    try:
        tensors = load_file(path, device=str(device))
        # On the CPU they are mapped from the file; a copy lets a purged step give its disk space back.
        return {name: t.clone() if t.device.type == "cpu" else t for name, t in tensors.items()}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint file {path} cannot be read: {error}") from error


def _seal(partial: Path) -> None:
    """Bring every file to the disk and write the manifest, so that the folder is ready to be renamed."""
    paths = sorted(path for path in partial.rglob("*") if path.is_file())
    assert paths, f"nothing was written into {partial}; a step without files cannot be resumed"
    failpoint("checkpoint.before_fsync")
    for path in paths:
        _fsync(path)
    hashes = _hash_all(paths)
    files = {p.relative_to(partial).as_posix(): {"size": p.stat().st_size, "sha256": hashes[p]} for p in paths}
    manifest = partial / MANIFEST
    content = {"format": MANIFEST_FORMAT, "files": files, "sha256": _sha256_of_listing(files)}
    manifest.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    failpoint("checkpoint.mid_manifest", torn=manifest)
    _fsync(manifest)
    for folder in {path.parent for path in paths} | {partial}:
        _fsync(folder)


def _rename(partial: Path, final: Path) -> None:
    """Give the sealed folder its name. A folder cannot replace a folder, so an older one steps aside first."""
    failpoint("checkpoint.before_rename")
    replaced = final.with_name(final.name + _REPLACED)
    if final.exists():
        os.rename(final, replaced)
        failpoint("checkpoint.mid_replace")
    os.rename(partial, final)
    failpoint("checkpoint.after_rename")
    _fsync(final.parent)
    if replaced.exists():
        _discard(replaced)


def _point_latest(final: Path) -> None:
    link = final.with_name("latest.tmp")
    _remove(link)
    link.symlink_to(final.name)
    os.replace(link, final.with_name("latest"))
    _fsync(final.parent)


def _read_latest(root: Path) -> int | None:
    link = root / "latest"
    match = _STEP.fullmatch(os.readlink(link)) if link.is_symlink() else None
    return int(match[1]) if match else None


def _purge(root: Path, step: int, keep: int) -> None:
    steps = list_steps(root)
    kept = [s for s in steps if s <= step][-keep:] if keep else list(steps)
    for old in sorted(steps.keys() - set(kept)):
        _discard(steps[old])


def _discard(folder: Path) -> None:
    """Remove a step: its name goes first, in one act, so that no half-removed step is ever taken for a whole one."""
    nameless = folder.with_name(folder.name.removesuffix(_REPLACED) + ".purged.tmp")
    _remove(nameless)
    os.rename(folder, nameless)
    failpoint("checkpoint.mid_purge")
    _remove(nameless)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    manifest = read_json(path)
    try:
        if manifest["format"] != MANIFEST_FORMAT:
            raise ValueError(f"format {manifest['format']!r} is not {MANIFEST_FORMAT}")
        if manifest["sha256"] != _sha256_of_listing(manifest["files"]):
            raise ValueError("its list of files is not what was written")
        return {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from error


def _hash_all(paths: list[Path]) -> dict[Path, str]:
    with ThreadPoolExecutor(max_workers=4) as pool:  # hashing releases the interpreter lock
        return dict(zip(paths, pool.map(_sha256, paths), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of_listing(files: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
