"""`python -m diffmask_fast.compat [--project NAME] SCRIPT ...` runs a published script on our modules."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from diffmask_fast.compat.install import PROJECTS, install


def main() -> None:
    """Run a script as `python SCRIPT ...` does, with `install`; at the end, say on stderr what was replaced."""
    parser = argparse.ArgumentParser(prog="python -m diffmask_fast.compat", description=main.__doc__)
    parser.add_argument("--project", choices=PROJECTS, default="diffmask", help="whose modules to replace")
    parser.add_argument("script", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the script")
    options = parser.parse_args()
    if not options.script.is_file():
        parser.error(f"{options.script}: there is no such script")
    sys.argv = [str(options.script), *options.arguments]
    sys.path[0] = str(options.script.resolve().parent)
    with install(options.project) as installed:
        try:
            runpy.run_path(str(options.script), run_name="__main__")
        finally:
            sys.stderr.write("".join(f"diffmask_fast.compat: {line}\n" for line in str(installed).splitlines()))


if __name__ == "__main__":
    main()
