"""An update of policy or critic on two FSDP ranks is that on one device: metrics, gradient norm and weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import policy_ranks_worker as worker
import pytest


def test_two_ranks_make_the_step_of_one(tmp_path: Path) -> None:
    script = Path(worker.__file__)
    environment = {**os.environ, "PYTHONPATH": str(script.parents[3]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    worker.main(tmp_path, 1)
    one, two = (json.loads((tmp_path / f"{ranks}.json").read_text()) for ranks in (1, 2))
    assert one.keys() == two.keys()
    for case in one:
        if case.startswith(("gspo", "ppo_clip")):
            assert one[case]["metrics"]["clip_fraction_low"] > 0, "nothing was clipped"
        if case.startswith("full kl"):
            assert one[case]["metrics"]["kl_ref"] > 1e-3, "policy and reference are the same"
        assert two[case]["metrics"] == pytest.approx(one[case]["metrics"], rel=1e-4, abs=1e-6), case
        for name, sums in one[case]["weights"].items():
            assert two[case]["weights"][name] == pytest.approx(sums, rel=1e-4, abs=1e-4), (case, name)
