"""What all builders of this package share, whatever they read."""

from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

from lavis_kvmod.system.paths import resource

__all__ = ["PackagedBuilder"]


class PackagedBuilder(BaseDatasetBuilder):
    """A LAVIS builder whose default YAML files come with this package, and which downloads nothing."""

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

    def _download_data(self) -> None:
        """Nothing is downloaded."""
