"""What does it cost to answer by HTTP? The server beside the same decoder offline, and clients that crowd or vanish.

    python benchmarks/serving.py                       # prints a table
    python benchmarks/serving.py --rounds 5 --output benchmarks/results/...

SmolLM2-135M as it comes, forced to retrieve first, over Wikipedia leads with random vectors. The clients run in a
process of their own. Rounds of offline and served batches take turns, and both must write the same text.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # run as a file

CLIENTS, TOKENS = 16, 36


async def crowd(url: str, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """The clients: what each of `plan["bodies"]` was answered, and the seconds until its first and last word."""
    import httpx2

    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)

    async def ask(http: httpx2.AsyncClient, body: dict[str, Any], delay: float) -> dict[str, Any]:
        await asyncio.sleep(delay)
        began, first, text = time.perf_counter(), None, ""
        async with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
            if reply.status_code != 200:
                return {"status": reply.status_code, "retry": reply.headers.get("Retry-After")}
            async for line in reply.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content"):
                    first = first or time.perf_counter() - began
                    text += delta["content"]
                    if plan.get("vanish"):
                        break
        return {"status": 200, "first": first, "seconds": time.perf_counter() - began, "text": text}

    async with httpx2.AsyncClient(base_url=url, limits=limits, timeout=600, trust_env=False) as http:
        delays = plan.get("delays") or [0.0] * len(plan["bodies"])
        return await asyncio.gather(
            *(ask(http, body, delay) for body, delay in zip(plan["bodies"], delays, strict=True))
        )


def in_child(url: str, bodies: list[dict[str, Any]], **plan: Any) -> list[dict[str, Any]]:
    """`crowd` in a process that shares nothing with the server."""
    done = subprocess.run(
        [sys.executable, __file__, "--crowd", url],
        input=json.dumps({"bodies": bodies, **plan}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-500:]}")
    return json.loads(done.stdout)


def body(number: int, tokens: int) -> dict[str, Any]:
    """The request of one client."""
    question = f"Which river flows through the city number {number}?"
    return {
        "model": "co-supervised",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "ret_first": True,
        "max_retrievals": 1,
    }


def resident() -> float:
    """MiB of this process in memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmRSS")


def settle(engine: Any) -> None:
    """Waits until nothing runs."""
    end = time.monotonic() + 120
    while engine.open:
        if time.monotonic() > end:
            raise RuntimeError(f"{engine.open} requests are still open after their clients left")
        time.sleep(0.05)


def measure(rounds: int) -> list[tuple[str, str]]:
    """The rows of the table."""
    import torch

    from cosup_fast.config.model import ModelConfig
    from cosup_fast.data.sources import load_corpus
    from cosup_fast.data.template import TextConfig
    from cosup_fast.generation import GenerationConfig, Generator, Request
    from cosup_fast.index import SequenceIndex
    from cosup_fast.index.origin import Origin
    from cosup_fast.model import CoSupervisionModel
    from cosup_fast.serve.app import create_app
    from cosup_fast.serve.server import listen, serve_on
    from cosup_fast.serve.settings import ServeConfig
    from cosup_fast.serve.systems import offer

    text = TextConfig(max_passage_tokens=48, long_passages="truncate")
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen="smollm2-135m", embseq_layers=1), text).eval()
    passages = load_corpus("wiki-leads")[:400]
    vectors = torch.randn(len(passages), model.width, generator=torch.Generator().manual_seed(0))
    index = SequenceIndex(passages, vectors, Origin.of(model))
    config = GenerationConfig(max_new_tokens=TOKENS, ret_first=True, max_retrievals=1)
    generator = Generator(model, index, config, max_batch=CLIENTS)
    settings = ServeConfig(port=0, max_batch=CLIENTS, max_waiting=64)
    app = create_app(generator, index, offer(model, index), config, settings)
    engine = app.state.service.engine
    urls: list[str] = []
    listening = threading.Event()

    def on_listening(url: str) -> None:
        urls.append(url)
        listening.set()

    threading.Thread(target=serve_on, args=(app, settings, listen(settings), on_listening), daemon=True).start()
    if not listening.wait(60):
        raise RuntimeError("the server did not start")
    bodies = [body(number, TOKENS) for number in range(CLIENTS)]
    questions = [one["messages"][0]["content"] for one in bodies]
    ratios, same = [], True
    for number in range(rounds + 1):  # the first one warms up
        began = time.perf_counter()
        offline = generator.generate_all([Request(question) for question in questions])
        alone = time.perf_counter() - began
        served = in_child(urls[0], bodies)
        settle(engine)
        same &= [one["text"] for one in served] == [answer.text for answer in offline]
        if number:
            ratios.append(alone / max(one["seconds"] for one in served))
    lone = median(in_child(urls[0], [body(99, TOKENS)])[0]["first"] for _ in range(rounds))
    steps = engine.metrics.step
    late = []
    for _ in range(rounds):
        before = steps._sum.get(), sum(bucket.get() for bucket in steps._buckets)
        # The last client arrives when the others, whose answers are long, are well on their way.
        crowded = in_child(
            urls[0], [*(body(n, 4 * TOKENS) for n in range(15)), body(99, 4)], delays=[0.0] * 15 + [4 * lone]
        )
        settle(engine)
        seconds, count = steps._sum.get() - before[0], sum(bucket.get() for bucket in steps._buckets) - before[1]
        late.append((crowded[-1]["first"] - lone) / (seconds / count))
    full = resident()
    counts = Counter(one["status"] for one in in_child(urls[0], [body(n, 4) for n in range(200)]))
    settle(engine)
    after = resident()
    in_child(urls[0], [body(n, 4 * TOKENS) for n in range(60)], vanish=True)
    settle(engine)
    in_child(urls[0], [body(n, 4 * TOKENS) for n in range(40)], vanish=True)
    settle(engine)
    free = len(engine._decoder._free)
    return [
        (
            f"throughput of {CLIENTS} clients / of the offline batch of {CLIENTS}",
            f"{median(ratios):.2f} ({spread(ratios)})",
        ),
        ("the same text as offline, greedy", "yes" if same else "NO"),
        ("first token beside 15 others, less alone, in steps", f"{median(late):.1f} ({spread(late)})"),
        ("200 clients at once, by status", ", ".join(f"{n} x {status}" for status, n in sorted(counts.items()))),
        ("resident memory after those 200, MiB more", f"{after - full:+.0f}"),
        ("100 clients that vanish: slots free afterwards", f"{free} of {CLIENTS}"),
        ("resident memory after those 100, MiB more", f"{resident() - after:+.0f}"),
    ]


def spread(values: list[float]) -> str:
    """Least and most."""
    return f"{min(values):.2f} to {max(values):.2f}"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--crowd", metavar="URL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.crowd:
        json.dump(asyncio.run(crowd(arguments.crowd, json.load(sys.stdin))), sys.stdout)
        return
    from benchmarks import machine
    from cosup_fast.files import replace_file

    lines = [
        machine.line(),
        "",
        "| | |",
        "|---|--:|",
        *(f"| {name} | {value} |" for name, value in measure(arguments.rounds)),
    ]
    lines += ["", f"`{shlex.join(['python', 'benchmarks/serving.py', *sys.argv[1:]])}`, {arguments.rounds} rounds"]
    print("\n".join(lines))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with replace_file(arguments.output / "serving.md") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
