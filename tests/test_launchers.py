"""A rank's place, from the variables of every launcher; nothing is started."""

import pytest

from helpers.errors import UserError
from helpers.finetune import train
from helpers.finetune.launchers import first_host, rank_variables
from helpers.finetune.ranks import Ranks

HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
THERE = {"MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "17"}
TWO_NODES = {"SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "gpu-[03-04]"}


def place(environ, local_rank=None):
    found = rank_variables(environ, local_rank)
    return found and tuple(found[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, {}),
        ({"LOCAL_RANK": "0"}, {}),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"} | HERE, ("1", "4", "1", "2")),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"} | THERE, ("3", "4", "1", "2")),
        ({"RANK": "1", "WORLD_SIZE": "2"} | HERE, ("1", "2", "1", "2")),
        ({"RANK": "1", "WORLD_SIZE": "2"} | THERE, ("1", "2", "0", "1")),
        ({"RANK": "0", "WORLD_SIZE": "2", "KUBERNETES_SERVICE_HOST": "10.0.0.1"} | HERE, ("0", "2", "0", "1")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ("0", "1", "0", "1")),
        (SRUN, ("3", "4", "1", "4")),
        (SRUN | TWO_NODES, ("3", "4", "1", "2")),
        (SRUN | {"ENVIRONMENT": "BATCH"}, {}),
        (SRUN | {"ENVIRONMENT": "BATCH", "SLURM_STEP_ID": "0"}, ("3", "4", "1", "4")),
        (SRUN | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"} | HERE, ("0", "2", "0", "2")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, {}),
        (
            {
                f"OMPI_COMM_WORLD_{name}": n
                for name, n in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "1212", strict=True)
            },
            ("1", "2", "1", "2"),
        ),
    ],
)
def test_every_launcher_s_variables_give_the_place(environ, expected):
    assert place(environ) == expected


def test_ranks_of_srun_meet_at_the_first_node():
    found = rank_variables(SRUN | TWO_NODES)
    assert found["MASTER_ADDR"] == "gpu-03" and 15000 <= int(found["MASTER_PORT"]) < 30000
    other_job = rank_variables(SRUN | {"SLURM_JOB_ID": "18"})
    assert other_job["MASTER_ADDR"] == "127.0.0.1" and other_job["MASTER_PORT"] != found["MASTER_PORT"]


@pytest.mark.parametrize(
    ("nodes", "first"), [("a", "a"), ("a,b", "a"), ("gpu-[03-07,9],login", "gpu-03"), ("n[7]-ib", "n7-ib")]
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set.*torchrun"),
        ({"WORLD_SIZE": "2"}, "RANK is not set.*torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "two"} | HERE, "WORLD_SIZE is 'two'"),
        ({"RANK": "2", "WORLD_SIZE": "2"} | HERE, "contradict.*RANK=2, WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"} | HERE | {"MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | THERE, "LOCAL_WORLD_SIZE is not set"),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_LOCALID is not set"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "2"}, "SLURM_TASKS_PER_NODE is '2'"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "two"}, "SLURM_TASKS_PER_NODE is 'two'"),
        (SRUN | {"SLURM_NODEID": "1", "SLURM_TASKS_PER_NODE": "2(x2)"}, "MASTER_ADDR is not set"),
    ],
)
def test_what_is_missing_is_named(environ, message):
    with pytest.raises(UserError, match=message):
        rank_variables(environ)


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=0"])
def test_the_flag_of_older_launchers_is_accepted(flag):
    before = train._arguments([flag, "D", "M", "c.yaml", "d.json"])
    after = train._arguments(["D", "M", "c.yaml", "d.json", flag])
    assert before == after and before.local_rank == 0 and before.deepspeed.name == "d.json"
    assert place({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"} | THERE, local_rank=1) == ("3", "4", "1", "2")


def test_a_single_rank_joins_nobody(monkeypatch):
    for name, value in (HERE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}).items():
        monkeypatch.setenv(name, value)
    assert Ranks.from_environment(init_single_rank_group=False) == Ranks(0, 0, 1, 1, None)
