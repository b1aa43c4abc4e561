"""``lavis-kvmod app``: a page in the browser, on this machine only, to ask a model about pictures."""

import argparse
import sys
from pathlib import Path
from typing import List

from lavis_kvmod.system.paths import expanded

_PAGE = Path(__file__).parent / "page" / "script.py"
ADDRESS = "127.0.0.1"
_MOST_MEGABYTES = 10  # of an upload, as the page says


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--checkpoint",
        nargs="+",
        default=[],
        metavar="FILE",
        help="to choose from; default: the checkpoint_best.pth of the runs below output/, newest first",
    )
    parser.add_argument("--model-type", nargs="+", default=[], help="to choose from, too; default: demo")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--port", type=int, default=8501, help="default: %(default)s")


def main(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C; returns the exit status: 2 for what the user can mend."""
    try:
        chosen = choices(args.model_type, args.checkpoint)
        from streamlit.web import cli
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("error: the page needs Streamlit, which LAVIS brings: pip install streamlit", file=sys.stderr)
        return 2
    print(f"http://{ADDRESS}:{args.port}  (Ctrl-C ends it)", flush=True)
    cli.main(server_arguments(args.port, args.device, chosen), standalone_mode=False)
    return 0


def choices(model_types: List[str], checkpoints: List[str]) -> List[str]:
    """What visitors choose from: the checkpoints named, else those of the runs below ``output/``; and model types.

    Raises:
        ValueError: for an unknown model type.
        FileNotFoundError: for a checkpoint that is not there.
    """
    from lavis_kvmod.models.blip2_opt_kvmod import Blip2OPTKVMod

    for name in model_types:
        Blip2OPTKVMod.default_config_path(name)  # raises for one that is not known
    files = [expanded(name) for name in checkpoints]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"--checkpoint {file}: no such file")
    if not files:
        files = sorted(Path("output").glob("**/checkpoint_best.pth"), key=lambda p: p.stat().st_mtime, reverse=True)
    return [*map(str, files), *(model_types or ["demo"])]


def server_arguments(port: int, device: str, chosen: List[str]) -> List[str]:
    """Streamlit's arguments: this machine only, small uploads, no reports to anybody, no tracebacks to visitors."""
    options = {
        "server.address": ADDRESS,
        "server.port": str(port),
        "server.headless": "true",
        "server.maxUploadSize": str(_MOST_MEGABYTES),
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.showErrorDetails": "none",
        "client.toolbarMode": "minimal",
    }
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    return ["run", str(_PAGE), *given, "--", device, *chosen]
