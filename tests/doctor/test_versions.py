"""What is said of versions and of imports that fail; no such environment is needed for it."""

import re
from importlib import metadata
from pathlib import Path

import pytest

from lavis_kvmod.doctor.findings import MISSING, NOTE, OK, WARN, WRONG
from lavis_kvmod.doctor.versions import (
    BOUNDS,
    PYTHON,
    TESTED,
    import_finding,
    installed_versions,
    numbers,
    plugin_finding,
    version_findings,
)

ROOT = Path(__file__).resolve().parents[2]
AS_TESTED = {**TESTED, "timm": "0.4.12"}


def test_the_table_is_that_of_constraints_setup_and_lavis():
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert {"salesforce-lavis": "1.0.2", **pinned} == TESTED
    setup = (ROOT / "setup.py").read_text()
    assert '"numpy<2"' in setup and BOUNDS["numpy"].below == (2,)
    assert '"torch>=2.4"' in setup and BOUNDS["torch"].at_least == (2, 4)
    assert 'python_requires=">=3.8,<3.12"' in setup and PYTHON == ((3, 8), (3, 12))
    of_lavis = "\n".join(metadata.requires("salesforce-lavis"))
    assert re.search(r"transformers.*>=4\.25.*<4\.27|transformers.*<4\.27.*>=4\.25", of_lavis)
    assert re.search(r"timm.*==0\.4\.12", of_lavis)


def test_what_is_as_tested_is_one_line():
    (finding,) = version_findings(AS_TESTED, "3.11.7")
    assert finding.mark == OK and "Python 3.11.7" in finding.text and "numpy 1.26.4" in finding.text
    assert numbers("2.14.1+cu130") == (2, 14, 1)
    assert version_findings({**AS_TESTED, "torch": "2.14.1+cu130"}, "3.11.7")[0].mark == OK


@pytest.mark.parametrize(
    "package, version, mark, text, step",
    [
        ("numpy", "2.1.0", WRONG, "numpy 2.1.0: expected 1 up to below 2, LAVIS's opencv", 'pip install "numpy<2"'),
        ("numpy", None, MISSING, "numpy is not installed", 'pip install "numpy<2"'),
        ("torch", "2.3.1", WRONG, "torch 2.3.1: expected 2.4 or newer", 'pip install "torch>=2.4" torchvision'),
        ("torch", "2.6.0+cpu", NOTE, "torch 2.6.0+cpu (tested with 2.14.1)", ""),
        ("transformers", "4.49.0", WRONG, "expected 4.25 up to below 4.27", "pip install transformers==4.26.1"),
        ("timm", "1.0.9", WRONG, "timm 1.0.9: expected 0.4.12", "pip install timm==0.4.12"),
        ("salesforce-lavis", "1.0.1", WRONG, "expected 1.0.2", "pip install salesforce-lavis==1.0.2"),
    ],
)
def test_what_differs_has_its_line_and_step(package, version, mark, text, step):
    tested, finding = version_findings({**AS_TESTED, package: version}, "3.11.7")
    assert f"{package} " not in tested.text
    assert finding.mark == mark and text in finding.text and finding.step == step


@pytest.mark.parametrize("python", ["3.7.17", "3.12.1", "3.13.0"])
def test_a_python_without_tokenizers(python):
    wrong = [f for f in version_findings(AS_TESTED, python) if f.mark == WRONG]
    assert f"Python {python}" in wrong[0].text and wrong[0].step == "make an environment with Python 3.8 to 3.11"


def test_versions_are_read_here():
    found = installed_versions()
    assert set(found) == set(BOUNDS) and None not in found.values()


@pytest.mark.parametrize(
    "error, output, step",
    [
        (ImportError("numpy.core.multiarray failed to import"), "", 'pip install "numpy<2"'),
        (AttributeError("_ARRAY_API not found"), "", 'pip install "numpy<2"'),
        (ImportError("x"), "A module that was compiled using NumPy 1.x cannot be run", 'pip install "numpy<2"'),
        (RuntimeError("operator torchvision::nms does not exist"), "", "--force-reinstall torch torchvision"),
        (ImportError("libGL.so.1: cannot open shared object file"), "", "opencv-python-headless"),
        (ImportError("cannot import name 'apply_chunking' from 'transformers.modeling_utils'"), "", "transformers=="),
        (ModuleNotFoundError("No module named 'iopath.common'"), "", "pip install iopath"),
        (OSError("something else"), "", "reinstall"),
    ],
)
def test_an_import_that_fails_names_its_remedy(error, output, step):
    finding = import_finding("lavis", error, output)
    assert finding.mark == WRONG and str(error) in finding.text and step in finding.step


def test_the_plugin():
    def mark(**facts):
        return plugin_finding(**{"disabled": False, "hooked": True, "active": True, **facts}).mark

    assert mark() == OK
    assert mark(disabled=True, active=False) == WARN
    assert mark(hooked=False) == WRONG
    assert mark(active=False) == WRONG
    failed = plugin_finding(disabled=False, hooked=True, active=False, warning="could not be activated: KeyError")
    assert "could not be activated: KeyError" in failed.text
