"""Who started this process, and with whom; the process groups themselves: tests/runners/test_processes.py."""

import pytest

from lavis_kvmod.system.distributed import Launch, launch_of, launched_rank

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_JOB_ID": "41",
    "SLURM_STEP_ID": "1",
}


@pytest.mark.parametrize(
    "nodes, first",
    [("gpu[07-09,12],cpu1", "gpu07"), ("a1,a2", "a1"), ("rack1-n[3]", "rack1-n3"), ("node", "node")],
)
def test_a_task_of_srun_is_one_of_several(nodes, first):
    assert launch_of({**STEP, "SLURM_STEP_NODELIST": nodes}) == Launch(5, 8, 1, first, 20042)
    assert launched_rank(STEP) == 5


def test_what_the_user_sets_goes_before():
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}
    assert launch_of({**STEP, **own, "SLURM_STEP_NODELIST": "a"}) == Launch(5, 8, 1, "10.0.0.1", 29501)
    job = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert launch_of({**job, **own}) == Launch(1, 2, 0, "10.0.0.1", 29501)
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert launch_of({**STEP, **torchrun}) == Launch(3, 4, 1)


def test_alone():
    assert launch_of({}) is None
    assert launch_of({**STEP, "SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launch_of({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, without srun
