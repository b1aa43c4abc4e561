"""Which builders our tasks build their data sets with."""

from typing import Any, Dict

from lavis.tasks.base_task import BaseTask

from lavis_kvmod.datasets.lavis_sets import builder_class

__all__ = ["BuildsDatasets"]


class BuildsDatasets(BaseTask):
    """The end of LAVIS's ``build_datasets``, with LAVIS's benchmarks as `lavis_kvmod.datasets.lavis_sets` reads them.

    It stands behind LAVIS's task among a class's bases: ``class OurTask(Ours, VQATask, BuildsDatasets)``.
    """

    builder_class = staticmethod(builder_class)
    target: str  # what a model learns to say, as data sets name it: "answer" or "caption"

    def build_datasets(self, cfg: Any) -> Dict[str, Dict[str, Any]]:
        """Data set name -> split -> data set."""
        return {name: self.builder_class(name)(section).build_datasets() for name, section in cfg.datasets_cfg.items()}
