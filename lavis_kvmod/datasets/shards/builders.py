"""``wds_vqa`` and ``wds_caption``: from a data set's section in a run file to its splits in shards."""

import logging
from typing import Dict, List, Optional, Sequence

from omegaconf import DictConfig, OmegaConf

from lavis_kvmod.datasets.bad_samples import BadDataError, BadSamplePolicy
from lavis_kvmod.datasets.packaged import PackagedBuilder
from lavis_kvmod.datasets.settings import ShardSettings
from lavis_kvmod.datasets.shards.counting import count_all
from lavis_kvmod.datasets.shards.datasets import (
    ShardDataset,
    WdsCaptionEvalData,
    WdsCaptionTrainData,
    WdsVQAEvalData,
    WdsVQATrainData,
)
from lavis_kvmod.datasets.shards.files import Shard, damage_of, find_shards, read_answers
from lavis_kvmod.datasets.shards.rows import CAPTION, VQA, Kind
from lavis_kvmod.datasets.storage import strings

__all__ = ["WdsCaptionBuilder", "WdsVQABuilder"]


class _ShardBuilder(PackagedBuilder):
    """Builds the splits named under ``build_info.annotations``."""

    settings_class = ShardSettings
    kind: Kind
    target: str  # as of `AnnotationBuilder`

    @classmethod
    def splits_given(cls, section: DictConfig) -> List[str]:
        """The splits a run may use."""
        return [split for split in _patterns(section) if _patterns(section)[split]]

    @classmethod
    def config_problems(cls, section: DictConfig) -> List[str]:
        """All that can be told to be wrong without reading the shards."""
        try:
            cls(section).find()
        except BadDataError as error:
            return error.problems
        return []

    def find(self) -> Dict[str, List[Shard]]:
        """The shards of each split.

        Raises:
            BadDataError: listing what is wrong with the section, and the shards that are missing or cut short.
        """
        problems = self.section_problems(self.config)
        policy = BadSamplePolicy(self.settings.on_bad_sample, self.settings.max_bad_share)
        splits = {}
        for split, patterns in _patterns(self.config).items():
            key = f"build_info.annotations.{split}.storage"
            try:
                splits[split] = find_shards(patterns, self.kind)
            except BadDataError as error:
                problems += [f"{key}: {problem}" for problem in error.problems]
                continue
            for damage in filter(None, map(damage_of, splits[split])):
                if policy.skips and damage.is_cut_short:
                    logging.warning("%s; what is left of it is used", damage.text)
                else:
                    problems.append(damage.text)
            unknown = [shard.path.parent for shard in splits[split] if shard.contents is None]
            if split == "train" and unknown and self.settings.epoch_size is None:
                problems.append(
                    f"epoch_size: not set, and {unknown[0]} has no index that tells how many samples there are; write "
                    f"one (lavis-kvmod pack --index {patterns[0]}), or set it to the samples an epoch should have"
                )
        if not splits and not problems:
            problems.append("build_info.annotations names no shards; set build_info.annotations.train.storage to yours")
        if problems:
            raise BadDataError(problems)
        return splits

    def build(self) -> Dict[str, ShardDataset]:
        """The data sets of all splits. Shards for evaluation that have no index are read once, to count them.

        Raises:
            BadDataError: listing all that is wrong.
        """
        self.build_processors()
        found = self.find()
        policy = BadSamplePolicy(self.settings.on_bad_sample, self.settings.max_bad_share)
        datasets = {}
        for split, shards in found.items():
            for_training = split == "train"
            if not for_training:
                shards = count_all(shards, self.kind, policy, split)
            stage = "train" if for_training else "eval"
            dataset_cls = self.train_dataset_cls if for_training else self.eval_dataset_cls
            datasets[split] = dataset_cls(
                self.vis_processors[stage],
                self.text_processors[stage],
                shards,
                policy=policy,
                epoch_size=self.settings.epoch_size if for_training else None,
                shuffle_buffer=self.settings.shuffle_buffer,
                answer_list=self.answer_list(shards),
                split=split,
            )
        return datasets

    def answer_list(self, shards: Sequence[Shard]) -> Optional[List[str]]:
        """The answers to choose from, for tasks that rank them."""
        return None


class WdsVQABuilder(_ShardBuilder):
    """``wds_vqa``: questions and answers in shards."""

    kind = VQA
    target = VQA.target
    train_dataset_cls = WdsVQATrainData
    eval_dataset_cls = WdsVQAEvalData
    DATASET_CONFIG_DICT = {"default": "configs/datasets/wds/defaults_vqa.yaml"}

    def answer_list(self, shards: Sequence[Shard]) -> Optional[List[str]]:
        """Those of ``answers.json`` beside the shards, which ``lavis-kvmod pack`` writes."""
        folders = dict.fromkeys(shard.path.parent for shard in shards)
        answers = [answer for folder in folders for answer in read_answers(folder)]
        return list(dict.fromkeys(answers)) or None


class WdsCaptionBuilder(_ShardBuilder):
    """``wds_caption``: images and captions in shards."""

    kind = CAPTION
    target = CAPTION.target
    train_dataset_cls = WdsCaptionTrainData
    eval_dataset_cls = WdsCaptionEvalData
    DATASET_CONFIG_DICT = {"default": "configs/datasets/wds/defaults_caption.yaml"}


def _patterns(section: DictConfig) -> Dict[str, List[str]]:
    """The patterns of each split that names any, under ``storage`` or bare."""
    named = (section.get("build_info") or {}).get("annotations") or {}
    stored = {split: entry.get("storage") if OmegaConf.is_dict(entry) else entry for split, entry in named.items()}
    patterns = {split: strings(given) for split, given in stored.items()}
    return {split: given for split, given in patterns.items() if given}
