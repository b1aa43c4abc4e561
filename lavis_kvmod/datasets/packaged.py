"""What all builders of this package share, whatever they read."""

from functools import cached_property
from typing import Any, List, Type

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder
from omegaconf import DictConfig

from lavis_kvmod.datasets.settings import DataSettings
from lavis_kvmod.datasets.tiling import Tiled
from lavis_kvmod.system.paths import resource
from lavis_kvmod.system.tiles import TilesSettings

__all__ = ["PackagedBuilder"]


class PackagedBuilder(BaseDatasetBuilder):
    """A LAVIS builder whose default YAML files come with this package, and which downloads nothing.

    Attributes:
        settings_class: the keys of its section.
    """

    settings_class: Type[DataSettings] = DataSettings

    @cached_property
    def settings(self) -> Any:
        """What the section says, as its `settings_class`, with the default in place of what is wrong."""
        return self.settings_class.check(self.config)[0]

    @classmethod
    def config_problems(cls, section: DictConfig) -> List[str]:
        """All that is wrong with a data set's section and the files it names; `lavis_kvmod.config.loading` asks."""
        return cls.section_problems(section)

    @classmethod
    def section_problems(cls, section: DictConfig) -> List[str]:
        """What is wrong with the section's keys and values."""
        return cls.settings_class.check_all(section)[1]

    @classmethod
    def default_config_path(cls, type: str = "default") -> str:
        """The absolute path of the configuration of that type.

        Raises:
            ValueError: for an unknown type.
        """
        if type not in cls.DATASET_CONFIG_DICT:
            known = ", ".join(cls.DATASET_CONFIG_DICT)
            raise ValueError(f"{cls.__name__}: expected a type of {known}; got {type!r}")
        return str(resource(cls.DATASET_CONFIG_DICT[type]))

    def build_processors(self) -> None:
        """LAVIS's, which cut images into tiles where the model takes them so."""
        super().build_processors()
        for stage, section in (self.config.get("vis_processor") or {}).items():
            if section and section.get("tiles") is not None:
                tiles = TilesSettings.of(section.tiles)
                self.vis_processors[stage] = Tiled(self.vis_processors[stage], tiles, section.get("image_size", 224))

    def _download_data(self) -> None:
        """Nothing is downloaded."""
