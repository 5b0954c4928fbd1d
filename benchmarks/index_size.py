"""What does an index of so many passages cost? Time and memory of writing, opening and searching it.

    python benchmarks/index_size.py --size 10000 --size 1000000                          # a folder
    python benchmarks/index_size.py --size 10000 --store milvus:http://localhost:19530   # and Milvus, if it runs there

Embeddings are random and passages synthetic, so nothing is embedded: what is left is what grows with the index. Each
row comes from a process of its own. Peak memory counts pages of mapped files that were touched; "own" is what it holds
at the end that is not a file's, libraries included. With milvus-lite (`milvus:PATH.db`) the server is in that process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.memory import status
from cosup_fast.data.records import Passage
from cosup_fast.data.template import TextConfig
from cosup_fast.files import sha256
from cosup_fast.index import Origin
from cosup_fast.index.changes import write_shard
from cosup_fast.index.origin import Stamp
from cosup_fast.index.shards import RECORD, Shard
from cosup_fast.index.stores import in_milvus, open_index

SHARD, QUERIES, K = 65536, 32, 20
ORIGIN = Origin(text=TextConfig(), similarity="cosine", fingerprint="random")
TEXT = "some of the words of a passage " * 20


def shards(count: int, width: int) -> Iterator[Shard]:
    """Passages with unit vectors drawn at random."""
    draw = np.random.default_rng(0)
    for start in range(0, count, SHARD):
        rows = range(start, min(start + SHARD, count))
        vectors = draw.standard_normal((len(rows), width), dtype=np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        yield Shard.of([Passage(id=f"p{row}", title=f"Title {row}", text=TEXT) for row in rows], vectors)


def write_folder(folder: Path, count: int, width: int) -> None:
    """An index in a folder."""
    names = {}
    for number, shard in enumerate(shards(count, width)):
        name = f"shard-{number:05d}"
        write_shard(folder / name, [(shard, None)])
        names[name] = sha256(folder / name / RECORD)
    stamp = Stamp(generation=0, count=count, dim=width, precision="float32", origin=ORIGIN, shards=names)
    stamp.write(folder)


def write_collection(name: str, count: int, width: int) -> None:
    """An index in Milvus."""
    from cosup_fast.index.collection import Collection, Place, StoreStamp

    collection = Collection(Place.parse(name))
    if collection.exists():
        collection.check_ours()
        collection.drop()
    stamp = StoreStamp(
        rows=count, dim=width, precision="float32", origin=ORIGIN, index="FLAT", parameters={}, state="whole", source=""
    )
    collection.create(stamp)
    for number, shard in enumerate(shards(count, width)):
        collection.upsert(shard.passages, shard.vectors, number * SHARD)


def here(name: str, count: int, width: int) -> dict[str, float]:
    """Seconds and bytes of one index, in this process, which should do nothing else."""
    if not in_milvus(name):
        Path(name).mkdir(parents=True)
    times = [time.perf_counter()]
    (write_collection if in_milvus(name) else lambda n, *sizes: write_folder(Path(n), *sizes))(name, count, width)
    times.append(time.perf_counter())
    index = open_index(name, verify=False)
    times.append(time.perf_counter())
    queries = torch.randn(QUERIES, width, generator=torch.Generator().manual_seed(1))
    index.search(queries, K)  # the first search reads what is only mapped so far
    times.append(time.perf_counter())
    index.search(queries, K)
    times.append(time.perf_counter())
    written, opened, first, again = np.diff(times).tolist()
    memory = {"peak": status("VmHWM"), "own": status("RssAnon")}
    return {"write": written, "open": opened, "first": first, "again": again, **memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="passages; repeat it for several")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument(
        "--store", action="append", help="milvus:URI[#COLLECTION], which is overwritten if it is an index"
    )
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        name, count, width = arguments.here
        print(json.dumps(here(name, int(count), int(width))))
        return
    print(f"| where | passages | write, s | open, s | first search of {QUERIES}, s | again, s | peak, MiB | own, MiB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for count in arguments.size or [10_000, 100_000]:
        with tempfile.TemporaryDirectory() as place:
            for name in [str(Path(place) / "index"), *(arguments.store or ())]:
                command = [sys.executable, __file__, "--here", name, str(count), str(arguments.width)]
                found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                times = " | ".join(f"{found[key]:.3g}" for key in ("write", "open", "first", "again"))
                memory = f"{found['peak'] >> 20} | {found['own'] >> 20}"
                print(f"| {'Milvus' if in_milvus(name) else 'folder'} | {count:,} | {times} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
