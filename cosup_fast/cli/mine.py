"""`cosup-fast mine`: hard negatives for a set of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cosup_fast.cli.common import Checkpoint, Device, IndexName, Stale, interruptible, load_model, say

PASSED_OVER = {"gold": "gold", "answer": "contain an answer", "score": "score too near the positive"}


def mine(
    checkpoint: Checkpoint,
    examples: Annotated[list[str], typer.Option(help="example sets; repeat the option for several")],
    output: Annotated[Path, typer.Option(help="JSONL file to write: the examples with their negatives")],
    index: IndexName = None,
    corpus: Annotated[str | None, typer.Option(help="the passages, to build the index of if there is none")] = None,
    depth: Annotated[int, typer.Option(min=1, help="passages looked at for each query")] = 100,
    per_example: Annotated[int, typer.Option(min=1, help="negatives mined for each example, at most")] = 4,
    skip_top: Annotated[int, typer.Option(min=0, help="best passages of each query that are left out unseen")] = 0,
    margin: Annotated[
        float | None, typer.Option(min=0, help="a negative scores at least this much below the positive")
    ] = None,
    max_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="a negative scores at most this share of the positive's score, as 0.95"),
    ] = None,
    device: Device = "auto",
    allow_stale: Stale = False,
) -> None:
    """Mine hard negatives: passages that rank high for a question but neither are gold nor contain an answer.

    They are in `negatives` of the examples written, which `cosup-fast train` takes as they are. Interrupted, the same
    command resumes where it was.
    """
    from cosup_fast.data.records import write_jsonl
    from cosup_fast.data.sources import load_corpus, load_examples
    from cosup_fast.files import check_writable
    from cosup_fast.index import STAMP
    from cosup_fast.index.mining import MiningConfig
    from cosup_fast.index.mining import mine as mine_negatives
    from cosup_fast.index.stores import build_index, in_milvus, index_exists, load_index

    check_writable(output)
    for option, names in (("--examples", examples), ("--corpus", [corpus] if corpus is not None else [])):
        if output.resolve() in [Path(name).resolve() for name in names]:
            raise ValueError(f"--output {output} is read as {option}, and would be lost: name another file")
    config = MiningConfig(depth=depth, per_example=per_example, skip_top=skip_top, margin=margin, max_score=max_score)
    folder = index or checkpoint / "index"
    passages = None if corpus is None else load_corpus(corpus)
    known = None if passages is None else {passage.id for passage in passages}
    chosen = [e for name in examples for e in load_examples(name, known, allow_no_retrieval=True)]
    there = index_exists(folder)
    if corpus is None and not there:
        lost = "Milvus has no such collection" if in_milvus(folder) else f"it has no {STAMP}"
        raise ValueError(f"{folder} is not an index, {lost}: give --corpus to build it, or another --index")
    model = load_model(checkpoint, device)
    journal = output.with_name(f".{output.name}.part")
    with interruptible("the same command resumes where this one stopped"):
        if corpus is not None and not there:
            count = build_index(model, corpus, folder, checkpoint)  # shard by shard, so that a kill costs little
            say(f"index: {folder} ({count} passages)")
        loaded = load_index(folder, model, allow_stale=allow_stale)
        if passages is not None and (
            len(loaded) != len(passages) or any(a != b for a, b in zip(loaded.passages, passages))
        ):
            raise ValueError(
                f"{folder} holds other passages than --corpus {corpus}: leave that out, or name another --index"
            )
        mined = mine_negatives(model, loaded, chosen, config, journal=journal, progress=True)
    write_jsonl(output, mined.examples)
    journal.unlink(missing_ok=True)
    reasons = ", ".join(f"{count} {PASSED_OVER[reason]}" for reason, count in sorted(mined.passed_over.items()))
    say(f"{output}: {mined.found} negatives for {len(mined.examples)} examples")
    say(f"fewer than {per_example}: {mined.short} examples; passed over: {reasons or 'nothing'}")
