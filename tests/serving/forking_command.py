"""`rollouts` commands as processes of their own that share one import of torch: it is forked for each.

Usage: forking_command.py MODEL_FOLDER, then a JSON list of arguments a line. The model is loaded once and dropped,
which imports all that is needed. Each line is answered by the process id of a child, whose output follows. The child
is its own session, so that whatever it starts can be found.
"""

from __future__ import annotations

import json
import os
import signal
import sys

from rollouts.cli.main import main
from rollouts.models.load import load_hf_model
from rollouts.serving import server  # noqa: F401


def run() -> None:
    load_hf_model(sys.argv[1], "cpu", "float32")
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children that end leave nothing behind
    print("ready", flush=True)
    while line := os.read(0, 1 << 16):
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.exit(main(json.loads(line)))
        print(child, flush=True)


if __name__ == "__main__":
    run()
