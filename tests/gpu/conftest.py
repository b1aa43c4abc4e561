"""What needs a GPU, each test in a process of its own: a process that has used a GPU must not be forked.

``LAVIS_KVMOD_TEST_DEVICE=cpu`` runs the same bodies on the CPU, where they mean anything there: so one sees without
a GPU that they are not broken themselves.
"""

import os

import pytest
import torch
from processes import in_process, killed_before_step, runs  # noqa: F401
from whole_runs import assert_same_run, write_run  # noqa: F401

SKIPPED = 77


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "gpu":
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    """Convolutions in TF32, cuDNN's default, are the CPU's to three digits only; every forked process is without."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture()
def device():
    """The name of the device that is asked for."""
    name = os.environ.get("LAVIS_KVMOD_TEST_DEVICE")
    if name is None:
        pytest.skip("needs a GPU: make test-gpu")
    return name


@pytest.fixture()
def on_device(device, in_process):  # noqa: F811
    """A function: run something with the device in a forked process, which must end well; gives what it wrote."""

    def run(function, folder="."):
        def body():
            torch.set_num_threads(1)
            if device == "cuda" and not torch.cuda.is_available():
                raise SystemExit(SKIPPED)
            function(torch.device(device))

        code, output = in_process(body, folder)
        if code == SKIPPED:
            pytest.skip("needs a GPU, and PyTorch finds none")
        assert code == 0, output
        return output

    return run
