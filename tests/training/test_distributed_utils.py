"""The helpers in a single process; the ranks' side is in backends/test_fsdp_backend.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rollouts
from rollouts.training import distributed_utils as ranks


def test_a_single_process_is_a_world_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert ranks.init_process_group("cpu") == torch.device("cpu")
    assert (ranks.get_rank(), ranks.get_world_size(), ranks.is_main()) == (0, 1, True)
    x = torch.tensor([1.0, 2.0])
    assert ranks.all_reduce(x) is x and x.tolist() == [1.0, 2.0]
    assert ranks.all_gather("a") == ["a"] and ranks.broadcast({"b": 1}) == {"b": 1}
    assert ranks.gloo_group() is None
    ranks.barrier()
    ranks.cleanup()
    ranks.print_rank_0("hello", 1, sep="-")
    assert capsys.readouterr().out == "hello-1\n"


WAITING = """
import datetime, time
from torch.distributed import distributed_c10d
from rollouts.training import distributed_utils as ranks

ranks.init_process_group("cpu")
patient = ranks.gloo_group(3600)
ranks.barrier()
distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
if ranks.is_main():
    time.sleep(4)  # what one rank does alone
ranks.barrier(patient)
ranks.cleanup()
"""


def test_a_patient_group_waits_longer_than_the_others(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(Path(rollouts.__file__).parents[1])}
    done = subprocess.run(
        [*launch, str(tmp_path / "waiting.py")], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_uses_the_valid_entries_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, mask = torch.randn(5, 7, dtype=dtype) * 3 + 100, torch.rand(5, 7) < 0.5
    x[~mask] = 1e6
    white = ranks.distributed_masked_whiten(x, mask)
    valid = x[mask]
    torch.testing.assert_close(white[mask], (valid - valid.mean()) / valid.std(), rtol=1e-3, atol=1e-3)
    assert abs(white[mask].mean()) < 1e-4 and abs(white[mask].std() - 1) < 1e-4


def test_whitening_too_few_entries_changes_nothing() -> None:
    x = torch.tensor([3.0, 4.0, 5.0])
    for mask in ([0, 0, 0], [0, 1, 0]):
        assert torch.equal(ranks.distributed_masked_whiten(x, torch.tensor(mask)), x)
