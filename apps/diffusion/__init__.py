"""Fixed Point Diffusion Models and the DiT baseline: commands and library.

`python -m apps.diffusion.COMMAND` reports a missing package, or an interruption (Ctrl-C), in one line instead of a
traceback, also while its modules are imported.
"""

import sys
from importlib.util import find_spec
from typing import Any

_EXTRA = ("accelerate", "diffusers", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")


def missing_packages() -> str | None:
    """A message that names the missing packages of the extra `diffusion`; None if all packages are installed."""
    missing = [name for name in _EXTRA if find_spec(name) is None]
    if not missing:
        return None
    return (
        f"apps.diffusion needs {', '.join(missing)}; install the extra: pip install 'implicit-fixed-points[diffusion]'"
    )


def report_interruption() -> None:
    """Makes Ctrl-C end the process with one line and exit code 130, also during imports."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            usual(kind, error, trace)
            return
        print("\nInterrupted.", file=sys.stderr)
        raise SystemExit(130)

    sys.excepthook = hook


# sys.argv[0] is "-m" while `python -m apps.diffusion.COMMAND` looks for the command's file
_remedy, _locating = missing_packages(), sys.argv[:1] == ["-m"]
if _remedy and _locating:
    print(_remedy, file=sys.stderr)
    raise SystemExit(2)
if _remedy:
    raise ModuleNotFoundError(_remedy)
if _locating:
    report_interruption()
