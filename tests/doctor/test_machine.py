"""What is said of a machine, whatever machine this is."""

from lavis_kvmod.doctor.findings import MISSING, NOTE, OK, WARN, WRONG, Finding, Section, render, stops
from lavis_kvmod.doctor.machine import (
    GIB,
    GPU,
    Machine,
    device_findings,
    gib,
    look,
    nearest,
    optional_findings,
    place_finding,
)

A100 = GPU("A100", 80 * GIB, 79 * GIB, (8, 0))
T4 = GPU("T4", 15 * GIB, 15 * GIB, (7, 5))


def marks(machine):
    return [finding.mark for finding in device_findings(machine)]


def test_gpus_and_what_they_lack():
    found = device_findings(Machine(gpus=[A100, T4], driver="550.54.15", memory_total=64 * GIB, memory_free=GIB // 20))
    assert [finding.mark for finding in found] == [OK, WARN, OK]
    assert found[0].text == "GPU 0: A100, 80.0 GiB (79.0 GiB free), compute capability 8.0, driver 550.54.15, bf16"
    assert "no bf16" in found[1].text and "run.amp=fp16" in found[1].step
    assert "64.0 GiB of memory (51 MiB free); has no bf16" in found[2].text


def test_why_there_is_no_gpu():
    assert marks(Machine()) == [NOTE, OK]
    (hidden, _) = device_findings(Machine(environment={"CUDA_VISIBLE_DEVICES": ""}))
    assert hidden.mark == WARN and hidden.step.startswith("unset CUDA_VISIBLE_DEVICES")
    (without, _) = device_findings(Machine(driver="550.54"))
    assert without.mark == WARN and "this PyTorch has no CUDA" in without.text
    (too_old, _) = device_findings(Machine(driver="470.57", torch_cuda="13.0"))
    assert too_old.mark == WARN and "CUDA 13.0 finds no GPU" in too_old.text and "update the driver" in too_old.step


def test_how_threads_wait_beside_other_processes():
    def cpu(load, **environment):
        return device_findings(Machine(cores=2, load=load, environment=environment))[-1]

    assert cpu(0.3).text.endswith("; threads sleep while they wait") and cpu(0.3).mark == OK
    assert "other processes are busy (load 4.0)" in cpu(4.0).text and cpu(4.0).mark == OK
    assert cpu(0.3, OMP_WAIT_POLICY="active").text.endswith("as the environment says: OMP_WAIT_POLICY=active")
    spins = cpu(4.0, GOMP_SPINCOUNT="1000000")
    assert spins.mark == WARN and spins.step == "unset GOMP_SPINCOUNT, or OMP_WAIT_POLICY=PASSIVE"


def test_this_machine_is_looked_at():
    machine = look()
    assert machine.cores >= 1 and 0 < machine.memory_free <= machine.memory_total
    assert len(device_findings(machine)) == 1 + max(1, len(machine.gpus))


def test_places(tmp_path, monkeypatch):
    finding = place_finding("OPT", tmp_path / "a" / "b", "HF_HOME")
    assert finding.mark == OK and "(not there yet)" in finding.text and "HF_HOME moves it" in finding.text
    assert nearest(tmp_path / "a" / "b") == tmp_path
    monkeypatch.setattr("lavis_kvmod.doctor.machine.os.access", lambda path, mode: False)  # root may write anywhere
    finding = place_finding("OPT", tmp_path / "a", "HF_HOME")
    assert finding.mark == WARN and f"{tmp_path} cannot be written to" in finding.text
    assert finding.step == "set HF_HOME to a folder of yours"
    assert place_finding("OPT", tmp_path, "HF_HOME").mark == NOTE  # a shared cache that is only read


def test_optional_packages():
    found = optional_findings({"tensorboard": True, "wandb": False, "sklearn": False, "java": True})
    assert found[0] == Finding(OK, "tensorboard, java")
    assert {finding.step for finding in found[1:]} == {"pip install wandb", 'pip install "lavis-kvmod[demo]"'}
    assert {finding.mark for finding in found[1:]} == {NOTE}


def test_the_screen():
    long = Finding(MISSING, "word " * 40 + "/a/path/that/is/to/be/copied-whole" * 4, "pip install something")
    text = render([Section("Places", [Finding(OK, "all well"), long])])
    first, second, *rest = text.splitlines()
    assert (first, second) == ("Places", "  ok       all well")
    assert rest[0].startswith("  missing  word word") and len(rest[0]) <= 120
    assert rest[-1] == "           -> pip install something"
    assert "/a/path/that/is/to/be/copied-whole" * 4 in text
    assert stops([Section("", [Finding(OK, ""), Finding(WARN, ""), Finding(NOTE, ""), Finding(WRONG, "x"), long])]) == [
        Finding(WRONG, "x"),
        long,
    ]


def test_sizes_read_well():
    assert [gib(size) for size in (5 * 2**20, GIB // 2, 200 * GIB)] == ["5 MiB", "0.5 GiB", "200 GiB"]
