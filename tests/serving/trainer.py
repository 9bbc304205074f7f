"""A trainer's side of a weight update, in a process of its own: rank 0 of a process group that torch makes.

Trainers that push to SGLang make their group beside the default one, from its parts; this one does, too.

Usage: trainer.py MODEL_FOLDER ROUND..., where a round is ``each`` or ``flat``. It says at which port it is to be met,
then what it sends in a line of JSON a round (names, dtypes, shapes), and sends it when it reads a line.
"""

from __future__ import annotations

import datetime
import json
import sys

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d
from safetensors.torch import load_file

GROUP = "trainer_to_servers"


def main(folder: str, *rounds: str) -> None:
    weights = load_file(f"{folder}/model.safetensors")
    half = len(weights) // 2
    minute = datetime.timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, timeout=minute, wait_for_workers=False)
    print(store.port, flush=True)
    group, _ = c10d._new_process_group_helper(
        2, 0, [], c10d.Backend("gloo"), c10d.PrefixStore(GROUP, store), group_name=GROUP, timeout=minute
    )
    c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
    for kind in rounds:
        for part in (dict(list(weights.items())[:half]), dict(list(weights.items())[half:])):
            describe = {
                "names": [*part],
                "dtypes": [str(tensor.dtype).removeprefix("torch.") for tensor in part.values()],
                "shapes": [list(tensor.shape) for tensor in part.values()],
            }
            print(json.dumps(describe), flush=True)
            sys.stdin.readline()
            if kind == "flat":
                dist.broadcast(torch.cat([tensor.flatten().view(torch.uint8) for tensor in part.values()]), 0, group)
            else:
                for tensor in part.values():
                    dist.broadcast(tensor.contiguous(), 0, group)
    sys.stdin.readline()
    dist.destroy_process_group(group)


if __name__ == "__main__":
    main(*sys.argv[1:])
