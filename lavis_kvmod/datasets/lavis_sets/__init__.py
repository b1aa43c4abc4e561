"""LAVIS's own benchmark builders as this package's tasks use them: the same names, files and downloads, read into our
data sets.

What that mends, with the place in LAVIS 1.0.2:

* answers that evaluation needs are on the annotations, under one key: LAVIS has ``answer`` (a list in
  ``coco_vqa_datasets.py``, a text in ``gqa_datasets.py`` and ``vg_vqa_datasets.py``), ``direct_answers``
  (``aok_vqa_datasets.py``), or leaves them in another file (``ok_vqa``);
* batches of a split without answers can be made (``gqa_datasets.py:98`` collates None), and batches of one with answers
  carry them, so that a validation loss can be computed;
* ``coco_caption_datasets.py:40`` takes ``photo_17.png`` for image ``17.pn``; NoCaps's captions are in the file of
  nocaps.org only;
* annotation files need no ``url`` where they are on the disk (``base_dataset_builder.py:121``), missing images are all
  told before training, and broken ones are met as ``on_bad_sample`` says.

LAVIS's tasks still get LAVIS's builders.
"""

from typing import Dict, Type

from lavis.common.registry import registry
from lavis.datasets.builders.base_dataset_builder import BaseDatasetBuilder

from lavis_kvmod.datasets.lavis_sets import captions, vqa

__all__ = ["builder_class"]

_BUILDERS: Dict[str, Type[BaseDatasetBuilder]] = {
    "coco_vqa": vqa.COCOVQA,
    "ok_vqa": vqa.OKVQA,
    "aok_vqa": vqa.AOKVQA,
    "gqa": vqa.GQA,
    "vg_vqa": vqa.VGVQA,
    "coco_caption": captions.COCOCaption,
    "vg_caption": captions.VGCaption,
    "nocaps": captions.NoCaps,
}


def builder_class(name: str) -> Type[BaseDatasetBuilder]:
    """The builder that our tasks use for a data set: the one registered, or, for a benchmark of LAVIS's, ours."""
    registered = registry.get_builder_class(name)
    theirs = registered is not None and registered.__module__.startswith("lavis.")
    return _BUILDERS.get(name, registered) if theirs else registered
