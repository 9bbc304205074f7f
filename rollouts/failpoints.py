"""Named places where a test can kill the process or make the disk fail.

``ROLLOUTS_FAILPOINT="checkpoint.before_rename@2=kill"`` acts the second time that place is reached; without ``@2``
the first time. Actions: ``kill`` (SIGKILL, nothing is cleaned up), ``raise`` (FailpointError), ``enospc`` and ``eio``
(the OSError that a full or a broken disk gives). Without the variable a failpoint costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from pathlib import Path

FAILPOINTS = {
    "train.after_optim_step": "the optimizer has stepped and nothing of it is on disk",
    "checkpoint.mid_file": "half of a file is written; reached once a file",
    "checkpoint.before_fsync": "every file is written, none is certainly on disk",
    "checkpoint.mid_manifest": "half of the manifest is written",
    "checkpoint.before_rename": "the folder is complete and still has its temporary name",
    "checkpoint.mid_replace": "a step is written again: the old one is set aside, the new one not yet in its place",
    "checkpoint.after_rename": "the folder has its name, which is not certainly on disk",
    "checkpoint.before_latest": "the step is committed and `latest` names the step before",
    "rl.before_sync": "the step is committed and no engine has its weights",
    "checkpoint.mid_purge": "an old step has lost its name and still has its files; reached once a purged step",
}

_ERRNO = {"enospc": errno.ENOSPC, "eio": errno.EIO}
_hits: Counter[str] = Counter()


class FailpointError(RuntimeError):
    """The failure asked for by ``ROLLOUTS_FAILPOINT=...=raise``."""


def failpoint(name: str, torn: Path | None = None) -> None:
    """Fail here when ``ROLLOUTS_FAILPOINT`` names this place.

    Args:
        name: a key of ``FAILPOINTS``.
        torn: a file just written, cut to half its size before acting: what a writer that stopped midway leaves.
    """
    armed = os.environ.get("ROLLOUTS_FAILPOINT")
    if not armed:
        return
    target, hit, action = _parse(armed)
    assert name in FAILPOINTS, f"{name} is not in FAILPOINTS"
    if name != target:
        return
    _hits[name] += 1
    if _hits[name] == hit:
        if torn is not None:
            os.truncate(torn, torn.stat().st_size // 2)
        _act(name, action)


def reset_failpoints() -> None:
    """Count from zero again; for tests that arm several failpoints in one process."""
    _hits.clear()


def _parse(armed: str) -> tuple[str, int, str]:
    place, _, action = armed.partition("=")
    name, _, hit = place.partition("@")
    if name not in FAILPOINTS or action not in ("kill", "raise", *_ERRNO) or not (hit or "1").isdigit():
        raise ValueError(f"ROLLOUTS_FAILPOINT={armed!r} is not name[@hit]=kill|raise|enospc|eio with a known name")
    return name, int(hit or 1), action


def _act(name: str, action: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action in _ERRNO:
        raise OSError(_ERRNO[action], os.strerror(_ERRNO[action]), name)
    raise FailpointError(name)
