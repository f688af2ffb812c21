"""Fixed Point Diffusion Models and the DiT baseline: commands and library."""

import sys

from apps.diffusion import cli

_remedy = cli.missing_packages()
if _remedy and sys.argv[:1] == ["-m"]:  # `python -m` is locating a command
    print(_remedy, file=sys.stderr)
    raise SystemExit(2)
if _remedy:
    raise ModuleNotFoundError(_remedy)
if sys.argv[:1] == ["-m"]:
    cli.report_interruption()
