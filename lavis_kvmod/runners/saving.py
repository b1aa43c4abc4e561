"""The part of `RunnerKVMod` that saves a run and goes on with it."""

import logging
from pathlib import Path
from typing import Any, Dict, Union

import torch
from lavis.common.dist_utils import is_main_process
from torch import nn

from lavis_kvmod.runners import resuming
from lavis_kvmod.runners.parts import RunParts
from lavis_kvmod.runners.run_folder import BEST, checkpoint_problem
from lavis_kvmod.runners.training_state import RunState, get_rng_state
from lavis_kvmod.system.distributed import gather, get_rank, get_world_size, on_main
from lavis_kvmod.system.secrets import without_secrets
from lavis_kvmod.weights import files, reading
from lavis_kvmod.weights.files import CheckpointError

__all__ = ["SavesRuns"]


class SavesRuns(RunParts):
    """Between the runner's model, `optimizer`, `scaler`, `state` and `log`, and its `folder`."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self._load_what_is_evaluated()

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False, in_place: bool = False) -> None:
        """Write what is trained, and all that a resumed run needs to go on as if nothing had happened. All ranks call
        it; rank 0 writes.

        Raises:
            RunFolderError: if it cannot be written.
            FloatingPointError: if a parameter is not finite; what is on the disk stays.
        """
        randomness = gather([get_rng_state(self.device)])
        # On all ranks: asked for its state, a sharded layer lets go of what it gathered.
        weights = files.trained_state_dict(self.unwrap_dist_model(self.model))

        def write() -> None:
            _check_finite(weights)
            contents = {
                "model": weights,
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "config": self._resolved_config(),
                "epoch": cur_epoch,
                "best_agg_metric": self.state.best_agg_metric,
                "best_epoch": self.state.best_epoch,
                "state": self.state.to_dict(),
                "data": resuming.data_order(self.config.run_cfg, self.train_loader, get_world_size()),
                "rng": randomness,
                "log": self.log.text(),
            }
            if is_best:
                path = self.folder.save_best(contents)
            else:
                keep = self.settings.keep_last
                path = self.folder.save_last(contents, keep=keep, in_place=in_place)
            logging.info("saved %s (epoch %d)", path, cur_epoch)

        on_main(write)

    def _reload_best_model(self, model: nn.Module) -> nn.Module:
        """Load the best checkpoint's weights (LAVIS fails if none was saved, runner_base.py:597).

        Raises:
            CheckpointError: if it is damaged.
        """
        path = self.output_dir / BEST
        problem = on_main(lambda: checkpoint_problem(path))
        if problem is not None:
            raise CheckpointError(problem)
        self._load_trained(model, files.read(path), path)
        return model

    def _load_checkpoint(self, url_or_filename: str) -> None:
        """Resume: weights, optimizer, scaler, position, best metric, randomness and log (LAVIS loads strictly what it
        saved in part, runner_base.py:628, and forgets the rest).

        Raises:
            FileNotFoundError, CheckpointError: if it cannot be read or does not fit.
        """
        contents = files.read(url_or_filename)
        resuming.check(contents, url_or_filename)
        resuming.warn_of_changes(contents, self._resolved_config(), get_world_size())
        self._load_trained(self.unwrap_dist_model(self.model), contents, url_or_filename)
        resuming.load_optimizer(self.optimizer, contents["optimizer"], url_or_filename)
        if self.scaler is not None and contents.get("scaler"):
            self.scaler.load_state_dict(contents["scaler"])
        self.state = RunState.from_checkpoint(contents)
        order = resuming.data_order(self.config.run_cfg, self.train_loader, get_world_size())
        resuming.find_position(self.state, contents.get("data"), order)
        resuming.restore_randomness(contents.get("rng"), self.device, get_rank(), get_world_size())
        if is_main_process() and "log" in contents:
            self.log.restore(contents["log"])
        if not on_main(lambda: resuming.bring_best(self.state, Path(url_or_filename), self.output_dir / BEST)):
            self.state.best_agg_metric = self.state.best_epoch = None
            self.state.validations_since_best = 0
        self.start_epoch = self.state.epoch
        logging.info("resumed from %s at epoch %d, batch %d", url_or_filename, self.state.epoch, self.state.batch)

    def _load_what_is_evaluated(self) -> None:
        """The trained weights of ``resume_ckpt_path``, in an evaluation (LAVIS passes over it, runner_base.py:364, and
        evaluates the model that the run file names).

        Raises:
            CheckpointError: if they do not fit.
        """
        path = self.folder.checkpoint
        if self.evaluate_only and path is not None:
            self._load_trained(self._model, files.read(path), path)
            logging.info("evaluating the weights of %s (run.resume_ckpt_path)", path)

    @staticmethod
    def _load_trained(model: nn.Module, state: Dict[str, Any], source: Union[str, Path]) -> None:
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        frozen = set(model.state_dict()) - trained
        reading.load_weights(model, state["model"], source=source, may_lack=frozen)

    def _resolved_config(self) -> Dict[str, Any]:
        return without_secrets(self.config.config)


def _check_finite(weights: Dict[str, torch.Tensor]) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise FloatingPointError(f"{name} is not finite: not saved; the checkpoints on the disk stay as they were")
