"""What the plugin costs: at every interpreter start, and at `import lavis`. Medians of several fresh interpreters."""

import os
import re
import statistics
import subprocess
import sys

RUNS = 7


def python(*args, **env):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=True, env={**os.environ, **env}
    )


def hook_ms() -> float:
    """Cumulative time of the hook's imports, by ``-X importtime``."""
    report = python("-X", "importtime", "-c", "pass").stderr
    return sum(
        int(match[1]) / 1000
        for match in re.finditer(r"\|\s+(\d+) \| (\s*)(lavis_kvmod\S*)", report)
        if len(match[2]) == 0 or match[3] == "lavis_kvmod._hook"
    )


def import_s(code: str, **env) -> float:
    timed = f"import time; t = time.perf_counter(); {code}; print(time.perf_counter() - t)"
    return float(python("-W", "ignore", "-c", timed, **env).stdout.split()[-1])


def main():
    print(f"hook at interpreter start  {statistics.median(hook_ms() for _ in range(RUNS)):8.2f} ms")
    runs = 3  # seconds each
    plain = statistics.median(import_s("import lavis", LAVIS_KVMOD_DISABLE="1") for _ in range(runs))
    plugged = statistics.median(import_s("import lavis") for _ in range(runs))
    beyond = statistics.median(
        import_s("import lavis; t = time.perf_counter(); import lavis_kvmod; lavis_kvmod.Blip2OPTKVMod")
        for _ in range(runs)
    )
    print(f"import lavis, plugin off   {plain:8.2f} s")
    print(f"import lavis, plugin on    {plugged:8.2f} s")
    print(f"import lavis_kvmod beyond  {beyond:8.3f} s")


if __name__ == "__main__":
    main()
