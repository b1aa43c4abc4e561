"""What is told about a run file that cannot be run: all of it, at once."""

from pathlib import Path
from typing import Sequence, Union

DEMO_RUN_FILE = "projects/kvmod/demo_vqa.yaml"


class ConfigurationError(ValueError):
    """Everything that keeps a run from starting."""

    def __init__(self, cfg_path: Union[str, Path], problems: Sequence[str]):
        self.problems = list(problems)
        things = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(
            f"{cfg_path} cannot run here: {things}\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + f"\nTo see a run that needs no GPU, no download and no data: "
            f"python -m lavis.train --cfg-path {DEMO_RUN_FILE}"
        )
