"""How fast are passages embedded for an index? Packs without pad tokens beside batches padded to their longest.

    python benchmarks/index_build.py                     # the table, on the Wikipedia leads with SmolLM2-135M
    python benchmarks/index_build.py --output FOLDER     # and a folder with it

Whole batches of neighbours are drawn from the corpus, so that lengths mix as they do in it; in random order they are
mixed again. Tokenizing counts. The providers take turns, and embed the same vectors, which is checked first.
"""

from __future__ import annotations

import argparse
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, report
from cosup_fast.config.model import ModelConfig
from cosup_fast.data.records import Passage
from cosup_fast.data.sources import load_corpus, resolve_model
from cosup_fast.data.template import TextConfig
from cosup_fast.index import embed_passages
from cosup_fast.model import CoSupervisionModel

Embed = Callable[[Sequence[Passage]], Tensor]
MODEL, CORPUS = "smollm2-135m", "wiki-leads"


def padded(model: CoSupervisionModel, batch: int, *, by_length: bool) -> Embed:
    """What is written without this library: transformers on batches of passages, padded to the longest of each."""
    backbone = AutoModel.from_pretrained(resolve_model(MODEL), attn_implementation="sdpa").eval()
    tokenizer, template = model.template.embseq_tokenizer, model.template

    @torch.inference_mode()
    def embed(passages: Sequence[Passage]) -> Tensor:
        found = torch.empty(len(passages), model.width)
        sequences = [template.sequence(passage) for passage in passages]
        order = list(range(len(passages)))
        if by_length:
            order.sort(key=lambda row: -len(sequences[row]))
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            inputs = tokenizer.pad(
                {"input_ids": [sequences[row] for row in rows]}, padding_side="right", return_tensors="pt"
            )
            hidden = backbone(**inputs, use_cache=False).last_hidden_state
            last = inputs["attention_mask"].sum(dim=1) - 1
            found[rows] = torch.nn.functional.normalize(hidden[torch.arange(len(rows)), last], dim=-1)
        return found

    return embed


def pad_share(lengths: Sequence[int], batch: int) -> float:
    """The share of pad tokens in batches in this order."""
    slots = sum(max(lengths[i : i + batch]) * len(lengths[i : i + batch]) for i in range(0, len(lengths), batch))
    return 1 - sum(lengths) / slots


def main() -> None:
    """Measures, prints and, if asked, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32, help="passages of a padded batch")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, help="folder to write, such as benchmarks/results/HARDWARE-DATE/index-build"
    )
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    if arguments.output:
        report.writable(arguments.output, arguments.overwrite)

    draw = random.Random(arguments.seed)
    corpus = load_corpus(CORPUS)
    batches = draw.sample(range(len(corpus) // arguments.batch), arguments.passages // arguments.batch)
    in_order = [p for b in sorted(batches) for p in corpus[b * arguments.batch : (b + 1) * arguments.batch]]
    mixed = draw.sample(in_order, len(in_order))
    model = CoSupervisionModel.from_pretrained(
        ModelConfig(gen=MODEL), TextConfig(max_passage_tokens=512, long_passages="truncate")
    )
    ours, plain = "packs (cosup_fast.index)", f"padded batches of {arguments.batch}"
    by_length = f"{plain}, sorted by length"
    providers: dict[str, Embed] = {
        ours: lambda passages: embed_passages(model, passages),
        plain: padded(model, arguments.batch, by_length=False),
        by_length: padded(model, arguments.batch, by_length=True),
    }
    few = mixed[: arguments.batch]
    expected = providers[ours](few)
    for name, embed in providers.items():
        difference = (embed(few) - expected).norm(dim=-1).max().item()
        assert difference < 1e-3, (name, difference)

    seconds: dict[tuple[str, str], list[float]] = {}
    for i in range(arguments.rounds):
        for order, passages in (("corpus", in_order), ("random", mixed)):
            for name, embed in providers.items():
                if name == by_length and order == "corpus":
                    continue  # it is the same in any order
                started = time.perf_counter()
                embed(passages)
                seconds.setdefault((order, name), []).append(time.perf_counter() - started)
                print(f"round {i + 1}, {order}, {name}: {seconds[order, name][-1]:.1f} s", file=sys.stderr)

    rows, records = [], []
    for (order, name), times in seconds.items():
        ratios = [other / own for other, own in zip(times, seconds[order, ours], strict=True)]
        speeds = [len(in_order) / t for t in times]
        median = statistics.median(ratios)
        rows.append(
            [f"{order} order", name, f"{statistics.median(speeds):.1f}", f"{min(speeds):.1f} to {max(speeds):.1f}",
             f"{median:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        )  # fmt: skip
        records += [{"order": order, "provider": name, "round": i, "seconds": t} for i, t in enumerate(times)]
    lengths = {"corpus": [len(s) for s in model.template.sequences(in_order)]}
    lengths["random"] = [len(s) for s in model.template.sequences(mixed)]
    quartiles = statistics.quantiles(lengths["corpus"], n=4)
    text = "\n".join(
        [
            "# Embedding passages for an index",
            "",
            machine.line(),
            "",
            f"`python benchmarks/index_build.py {shlex.join(sys.argv[1:])}`".replace(" `", "`"),
            "",
            f"Load of the machine (1 minute): {machine.load()}. {MODEL} in fp32, {len(in_order)} passages of {CORPUS}: "
            f"{sum(lengths['corpus'])} tokens, quartiles {quartiles[0]:.0f}, {quartiles[1]:.0f}, {quartiles[2]:.0f}, "
            f"longest {max(lengths['corpus'])}. Of the tokens in batches of {arguments.batch}, "
            f"{pad_share(lengths['corpus'], arguments.batch):.0%} are padding in corpus order, "
            f"{pad_share(lengths['random'], arguments.batch):.0%} in random order. {arguments.rounds} rounds, "
            "providers taking turns; medians, and the lowest and highest.",
            "",
            report.table(
                "order | provider | passages/s | passages/s, range | packs are faster by | range",
                rows,
            ),
            "",
        ]
    )
    print(text)
    if arguments.output:
        report.write(
            arguments.output, {"README.md": text, "index-build.csv": report.csv_text(records)}, arguments.overwrite
        )


if __name__ == "__main__":
    main()
