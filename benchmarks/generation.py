"""How fast is generation with retrieval? The batched decoder beside the plain one, in rounds that take turns.

    python benchmarks/generation.py batch-16                  # one question; its folder is benchmarks/results/...
    python benchmarks/generation.py batch-1 passages-400 batch-16-bf16 --rounds 2 --output runs/generation

SmolLM2-135M as it comes, which was never taught to write [NSP]: both decoders are told at which places of the output
[NSP] and [Ce] stand, choose nothing but text elsewhere, greedily, and stop after the same number of tokens. The
passages are Wikipedia leads, found by inner product with random vectors. In fp32 both must write the same text; and
the batched decoder must have read every token of prompt, output and passages once, the plain one as many as it says.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file

from benchmarks import machine, report  # noqa: E402
from benchmarks.plain_decoder import plain_decode  # noqa: E402
from cosup_fast.config.model import ModelConfig  # noqa: E402
from cosup_fast.data.records import Passage  # noqa: E402
from cosup_fast.data.sources import load_corpus  # noqa: E402
from cosup_fast.data.template import TextConfig  # noqa: E402
from cosup_fast.files import replace_file  # noqa: E402
from cosup_fast.generation import Decoder, GenerationConfig, Grammar, Request, State  # noqa: E402
from cosup_fast.model import CoSupervisionModel, linear  # noqa: E402

PLAIN, OURS, TORCH = "plain decoder", "batched decoder", "batched decoder, torch's products"


@dataclass(frozen=True)
class Case:
    """What is asked for, and how much faster it has to be."""

    requests: int
    max_batch: int
    passage_tokens: int
    generated: int
    target: float | None = None
    truncate: bool = False
    dtype: str = "float32"
    contenders: tuple[str, ...] = (PLAIN, OURS)


CASES = {
    "batch-16": Case(16, 16, 128, 36, target=3.5, contenders=(PLAIN, OURS, TORCH)),
    "batch-16-truncated": Case(16, 16, 128, 36, truncate=True),
    "batch-16-bf16": Case(16, 16, 128, 36, dtype="bfloat16"),
    "batch-1": Case(4, 1, 128, 36, target=1.1, contenders=(PLAIN, OURS, TORCH)),
    "batch-1-bf16": Case(4, 1, 128, 36, dtype="bfloat16"),
    "passages-400": Case(4, 1, 400, 24, target=1.5, contenders=(PLAIN, OURS, TORCH)),
}


class TextOnly(Grammar):
    """Text everywhere; the structure is forced."""

    def restrict(self, logits: Tensor, states: Sequence[State], may_retrieve: Sequence[bool]) -> Tensor:
        """-inf at every token that is not text, in place."""
        logits[:, self._columns] = -torch.inf
        return logits


@dataclass
class Result:
    """A case as it was measured."""

    name: str
    machine: str
    command: str
    load: str
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by round
    processed: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)  # of all requests: prompt, generated, inserted, read again
    same_text: bool = True

    def speedup(self, name: str) -> float:
        """Median over the rounds of the plain decoder's time over this one's."""
        return median(plain / mine for plain, mine in zip(self.seconds[PLAIN], self.seconds[name], strict=True))


def schedule(model: CoSupervisionModel, n: int) -> dict[int, int]:
    """Of `n` tokens of output: two retrievals, a sixth and a half of the way; each grounds a third of the output."""
    nsp, end = model.template.nsp, model.template.context_end
    return {n // 6: nsp, n // 6 + n // 3: end, n // 2 + 2: nsp, n // 2 + 2 + n // 3: end}


def passages_of(model: CoSupervisionModel, corpus: Sequence[Passage], tokens: int) -> list[Passage]:
    """Passages, joined until they are long enough; the template cuts what is beyond."""
    made, texts = [], []
    for lead in corpus:
        texts.append(lead.text)
        if len(model.template.encode(" ".join(texts))) >= tokens or tokens <= 128:
            made.append(Passage(id=lead.id, title=lead.title, text=" ".join(texts)))
            texts = []
        if len(made) == 200:
            break
    return made


def by_random_vectors(
    model: CoSupervisionModel, passages: Sequence[Passage]
) -> Callable[[Tensor, int], list[tuple[Passage, float]]]:
    """Retrieval by inner product with a vector that is drawn for each passage."""
    vectors = torch.randn(len(passages), model.width, generator=torch.Generator().manual_seed(0))
    vectors = torch.nn.functional.normalize(vectors, dim=-1).to(model.device)

    def retrieve(query: Tensor, k: int) -> list[tuple[Passage, float]]:
        scores, rows = (vectors @ query.float()).topk(k)
        return [(passages[row], score) for row, score in zip(rows.tolist(), scores.tolist(), strict=True)]

    return retrieve


def measure(
    name: str, rounds: int, say: Callable[[str], None], gen: str = "smollm2-135m", corpus: str = "wiki-leads"
) -> Result:
    """Runs a case in rounds that take turns, and compares what was written."""
    case = CASES[name]
    text = TextConfig(max_passage_tokens=case.passage_tokens, long_passages="truncate")
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen=gen, shared=True, dtype=case.dtype), text)  # type: ignore[arg-type]
    model.eval()
    passages = passages_of(model, load_corpus(corpus), case.passage_tokens)
    retrieve = by_random_vectors(model, passages)
    config = GenerationConfig(max_new_tokens=case.generated, ctx_truncate=case.truncate)
    forced = schedule(model, case.generated)
    questions = [
        f"{'Please tell me, ' * (i % 4)}what is {passages[i % len(passages)].title}?" for i in range(case.requests)
    ]
    grammar = TextOnly(model.template, model.vocabulary)
    result = Result(name, machine.line(), shlex.join(["python", *sys.argv]), machine.load())

    def plain() -> tuple[list[str], int]:
        answers = [plain_decode(model, retrieve, config, q, forced=forced, text_only=True) for q in questions]
        return [answer.text for answer in answers], sum(answer.processed for answer in answers)

    def ours() -> tuple[list[str], int]:
        decoder = Decoder(model, retrieve, config, max_batch=case.max_batch, grammar=grammar)
        tickets = [decoder.submit(Request(q, forced=forced)) for q in questions]
        for _ in decoder.run():
            pass
        answers = [ticket.result() for ticket in tickets]
        tokens = {
            "prompt": sum(answer.prompt_tokens for answer in answers),
            "generated": sum(answer.generated_tokens for answer in answers),
            "inserted": sum(answer.inserted_tokens for answer in answers),
            "read again": sum(answer.refed_tokens for answer in answers),
        }
        # The token chosen last is read by nobody.
        assert decoder.runner.processed == sum(tokens.values()) - len(answers), (decoder.runner.processed, tokens)
        assert all(len(answer.retrievals) == 2 for answer in answers)
        result.tokens = tokens
        return [answer.text for answer in answers], decoder.runner.processed

    def run(contender: str) -> tuple[float, list[str], int]:
        with mock.patch.object(linear, "X86", False) if contender == TORCH else nullcontext():
            start = time.perf_counter()
            texts, processed = (plain if contender == PLAIN else ours)()
            return time.perf_counter() - start, texts, processed

    texts: dict[str, list[str]] = {}
    for done in range(rounds):
        order = case.contenders[done % len(case.contenders) :] + case.contenders[: done % len(case.contenders)]
        for contender in order:
            seconds, texts[contender], result.processed[contender] = run(contender)
            result.seconds.setdefault(contender, []).append(round(seconds, 3))
            say(f"{name}, round {done + 1} of {rounds}: {contender} {seconds:.1f} s")
    result.same_text = all(other == texts[PLAIN] for other in texts.values())
    if case.dtype == "float32" and not result.same_text:
        raise AssertionError(f"{name}: the decoders write different texts")
    return result


def describe(results: Sequence[Result]) -> str:
    """The tables, in Markdown."""
    about = (__doc__ or "").split("\n\n")[2:]
    lines = ["# Generation with retrieval: the batched decoder beside the plain one", "", *about, ""]
    rows = []
    for result in results:
        case = CASES[result.name]
        for name, seconds in result.seconds.items():
            rows.append(
                [
                    result.name,
                    name,
                    f"{median(seconds):.2f}",
                    f"{case.requests * case.generated / median(seconds):.1f}",
                    f"{result.processed[name]}",
                    f"{result.speedup(name):.2f}",
                    "" if name != OURS or case.target is None else f"{case.target}",
                ]
            )
    lines.append(
        report.table("case | decoder | seconds | tokens/s | tokens read | speedup | at least", rows)
        + "\n\nSeconds: the median of the rounds. Tokens/s: those generated. Speedup: the median over the rounds "
        "of the plain decoder's time over this one's.\n"
    )
    for result in results:
        case = CASES[result.name]
        tokens = ", ".join(f"{count} {name}" for name, count in result.tokens.items() if count)
        lines += [
            f"## {result.name}",
            "",
            f"{case.requests} requests, {case.max_batch} at once, two retrievals each, {case.generated} tokens "
            f"generated each, passages of at most {case.passage_tokens} tokens, {case.dtype}. In all {tokens} tokens. "
            + ("All decoders wrote the same text." if result.same_text else "The decoders' texts differ by rounding."),
            "",
            f"`{result.command}` (load before: {result.load})",
            "",
            result.machine,
            "",
            *(f"- {name}, seconds by round: {', '.join(map(str, s))}" for name, s in result.seconds.items()),
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    """Measures the cases named, and writes the folder's table again from all that were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=report.ROOT / machine.folder() / "generation")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        result = measure(name, arguments.rounds, lambda text: console.print(text, highlight=False))
        with replace_file(arguments.output / f"{name}.json") as file:
            file.write(json.dumps(asdict(result), indent=1) + "\n")
    known = {name: arguments.output / f"{name}.json" for name in CASES}
    text = describe([Result(**json.loads(path.read_text())) for path in known.values() if path.is_file()])
    with replace_file(arguments.output / "README.md") as file:
        file.write(text)
    print(text)


if __name__ == "__main__":
    main()
