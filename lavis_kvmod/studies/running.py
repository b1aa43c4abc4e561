"""All trainings of a study, side by side where the machine allows; those that are finished are not done again."""

import concurrent.futures
import logging
import multiprocessing
import os
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch

from lavis_kvmod.studies.features import compute_features, read_probes
from lavis_kvmod.studies.member import read_result, train_member
from lavis_kvmod.studies.study import Member
from lavis_kvmod.system.progress import clock

__all__ = ["OUTPUT", "StudyError", "Tools", "run_members"]

OUTPUT = "output.txt"  # what a training says when several run at once


class StudyError(RuntimeError):
    """A training of a study has failed."""


class Tools(NamedTuple):
    """What a run file becomes a run with (`lavis_kvmod.commands.launch`), in whatever process."""

    load_config: Callable[..., Any]
    build_runner: Callable[[Any], Any]


def run_members(
    members: Sequence[Member], tools: Tools, folder: Path, jobs: int = 1, keep_checkpoints: bool = False
) -> List[Dict[str, Any]]:
    """The results of all members, in their order.

    Args:
        tools: importable functions, where there are several jobs.
        folder: of the study; shared features are kept in it until all is done.
        jobs: how many trainings run at once, each in a process of its own; 1 trains in this one.

    Raises:
        StudyError: naming the training that failed, and where its output is. The others' results are kept.
    """
    todo = [member for member in members if read_result(member) is None]
    if len(todo) < len(members):
        logging.info("%d of %d trainings are there already", len(members) - len(todo), len(members))
    features = folder / "features"
    first = {member.features: member for member in reversed(todo)}
    needed = [member for name, member in first.items() if not (features / f"{name}.pt").is_file()]
    of_features = [_Job(f"features of {m.arm}", _compute, (m, tools, features)) for m in needed]
    trainings = [_Job(f"{m.arm}, seed {m.seed}", _train, (m, tools, features, keep_checkpoints)) for m in todo]
    with _workers(min(jobs, len(todo))) as pool:
        _do(of_features, pool, "encoded")
        _do(trainings, pool, "trained")
    for file in features.glob("*.pt"):
        file.unlink()
    results = [read_result(member) for member in members]
    probes = {member.arm: read_probes(features / f"{member.features}.pt") for member in members}
    return [{**result, "probes": probes[result["arm"]]} for result in results if result is not None]


def _compute(member: Member, tools: Tools, features: Path) -> str:
    with _quietly(member):
        options = [*member.options, f"run.output_dir={features / member.features}", "run.resume_ckpt_path=null"]
        runner = tools.build_runner(tools.load_config(member.cfg_path, options))
        try:
            count = compute_features(runner, features / f"{member.features}.pt", member.split)
        finally:
            runner.log.close()
            runner.folder.release()
    return f"{count} images"


def _train(member: Member, tools: Tools, features: Path, keep_checkpoints: bool) -> str:
    with _quietly(member):
        result = train_member(member, *tools, features, keep_checkpoints)
    return f"overall {result['metrics'].get('overall', float('nan')):.1f} in {result['seconds']:.0f} s"


# ---------------------------------------------------------------- processes

_in_worker = False


def _start_worker(threads: int) -> None:
    global _in_worker
    _in_worker = True
    torch.set_num_threads(threads)


class _Job(NamedTuple):
    """What is called, by what name it is told, and with what."""

    name: str
    function: Callable[..., str]
    arguments: Tuple[Any, ...]


@contextmanager
def _workers(jobs: int) -> Iterator[Optional[concurrent.futures.Executor]]:
    """Processes that share this machine's cores; None where one job at a time is wanted, which this process does."""
    if jobs <= 1:
        yield None
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(threads,)
    ) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()  # a training that is asked to stop saves first
            raise


def _do(jobs: Sequence[_Job], pool: Optional[concurrent.futures.Executor], verb: str) -> None:
    """Tell of each job as it ends, and how long the others will take."""
    start = time.monotonic()
    for count, (job, finish) in enumerate(_as_they_end(jobs, pool), start=1):
        try:
            told = finish()
        except Exception as error:
            raise StudyError(f"{job.name}: {error}") from error
        left = (time.monotonic() - start) / count * (len(jobs) - count)
        logging.info("[%d/%d] %s %s: %s; about %s left", count, len(jobs), verb, job.name, told, clock(left))


def _as_they_end(
    jobs: Sequence[_Job], pool: Optional[concurrent.futures.Executor]
) -> Iterator[Tuple[_Job, Callable[[], str]]]:
    """Each job with what gives its result."""
    if pool is None:
        yield from ((job, partial(job.function, *job.arguments)) for job in jobs)
        return
    futures = {pool.submit(job.function, *job.arguments): job for job in jobs}
    yield from ((futures[future], future.result) for future in concurrent.futures.as_completed(futures))


@contextmanager
def _quietly(member: Member) -> Iterator[None]:
    """In a worker, what is printed and logged goes to the training's own file."""
    if not _in_worker:
        yield
        return
    member.folder.mkdir(parents=True, exist_ok=True)
    path = member.folder / OUTPUT
    with open(path, "a", encoding="utf-8") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(file.fileno(), stream.fileno())
        try:
            yield
        except SystemExit as asked:
            # Stopped by a signal. The pool would take it for a job that failed, and give this process the next one.
            sys.stdout.flush()
            os._exit(asked.code if isinstance(asked.code, int) else 1)
        except Exception as error:
            raise RuntimeError(f"{error} (see {path})") from error
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
