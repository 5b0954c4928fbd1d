"""What does a training corpus of so many passages cost a rank? Memory and start-up time, first and again.

    python benchmarks/corpus_size.py --size 100000 --size 1000000

Passages are synthetic, 670 bytes a line. Each start is a process of its own that opens the corpus as training does and
reads 10,000 passages in random order: the first one reads the file, the next finds the array that it left. Memory is
what the process holds beyond what importing took, its own (anonymous) and mapped, which ranks of a machine share.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import alone, status
from cosup_fast.data.mapped import MappedCorpus

READS = 10_000
TEXT = "some of the words of a passage " * 20


def write(path: Path, count: int) -> None:
    """A JSONL corpus."""
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            file.write(json.dumps({"id": f"p{row}", "title": f"Title {row}", "text": TEXT}) + "\n")


def start(path: Path, cache: Path) -> dict[str, float]:
    """Seconds and MiB of one start, in this process, which should do nothing else."""
    before, own, mapped, began = (*map(status, ("VmRSS", "RssAnon", "RssFile")), time.perf_counter())
    corpus = MappedCorpus(path, cache)
    seconds, peak = time.perf_counter() - began, status("VmHWM") - before
    for row in random.Random(0).choices(range(len(corpus)), k=READS):
        corpus[f"p{row}"]
    return {"seconds": seconds, "peak": peak, "own": status("RssAnon") - own, "mapped": status("RssFile") - mapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="passages; repeat it for several")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        print(json.dumps(start(*map(Path, arguments.here))))
        return
    print(
        "| passages | file, MiB | start | seconds | peak until open, MiB | own after 10,000 reads, MiB | mapped, MiB |"
    )
    print("|--:|--:|---|--:|--:|--:|--:|")
    for count in arguments.size or [100_000]:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "corpus.jsonl"
            write(path, count)
            for which in ("first", "next"):
                found = json.loads(alone("benchmarks.corpus_size", "--here", str(path), str(Path(folder) / "cache")))
                figures = " | ".join(f"{found[kind] / 2**20:.1f}" for kind in ("peak", "own", "mapped"))
                size = path.stat().st_size >> 20
                print(f"| {count:,} | {size} | {which} | {found['seconds']:.3g} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
