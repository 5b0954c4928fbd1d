"""Entry of the `cosup-fast` command: says what to install when the command line's own packages are missing."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line."""
    try:
        from cosup_fast.cli.app import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("cosup_fast"):
            raise
        sys.exit(f"cosup-fast: the command line needs {error.name}: pip install 'cosup-fast[all]'")
    run()


if __name__ == "__main__":
    main()
