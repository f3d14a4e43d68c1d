"""The two switches still reach what they are meant for in the installed DeepSpeed."""

import subprocess
import sys

SCRIPT = """
import torch.distributed as dist
from helpers.deepspeed_setup import share_world_group, skip_cpu_collectives

skip_cpu_collectives()
share_world_group()
import deepspeed
from deepspeed.utils import groups

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed.init_distributed(dist_backend="gloo", verbose=False)
assert deepspeed.comm.comm.cdb.shm_comm_op is None
assert groups._get_data_parallel_group() is dist.group.WORLD
before = len(dist.distributed_c10d._world.pg_map)
assert groups._get_data_parallel_group() is dist.group.WORLD
assert len(dist.distributed_c10d._world.pg_map) == before == 1
assert dist.get_global_rank(dist.group.WORLD, 0) == 0
print("fine")
"""


def test_deepspeed_compiles_nothing_on_a_cpu_and_makes_no_second_world_group():
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert finished.stdout.endswith("fine\n"), finished.stderr
