"""python -m benchmarks."""

from cosup_fast.cli.common import hush

if __name__ == "__main__":
    hush()
    from benchmarks.cli import main

    main()
