"""The clients of serving.py, in a process of their own: what each was answered, and when.

They read bytes and parse them afterwards, so that what the clients cost does not count as the server's.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_TEXT = b'"delta":{"content":'


@dataclass(frozen=True)
class Reply:
    """What one client was answered."""

    status: int
    text: str = ""
    times: tuple[float, ...] = ()
    """Seconds from the request to each piece of the text."""
    seconds: float = 0.0
    """Until the connection was closed."""
    start: float = 0.0
    """Of the request, on a clock that the clients share."""


def ask(
    url: str, bodies: list[dict[str, Any]], *, late: dict[str, Any] | None = None, vanish: bool = False
) -> list[Reply]:
    """Streams chat completions, all at once.

    Args:
        url: the server.
        bodies: a request for each client.
        late: one more request, sent when each of the others has written three pieces of text. Its reply is the last.
        vanish: clients close their connection at the first piece of text.

    Raises:
        RuntimeError: a client failed.
    """
    plan = json.dumps({"url": url, "bodies": bodies, "late": late, "vanish": vanish})
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=plan, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the clients failed: {done.stderr[-500:]}")
    return [Reply(**reply) for reply in json.loads(done.stdout)]


class _Client:
    """One request."""

    def __init__(self, url: str, body: dict[str, Any], vanish: bool):
        self._address = urlsplit(url)
        self._body = json.dumps(body | {"stream": True}).encode()
        self._vanish = vanish
        self._parts: list[tuple[float, bytes]] = []
        self.writing = asyncio.Event()  # three pieces of text have come, or the reply has ended

    async def run(self) -> dict[str, Any]:
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        # By HTTP/1.0 the body comes as it is and ends with the connection.
        head = f"POST /v1/chat/completions HTTP/1.0\r\nHost: {self._address.netloc}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(self._body)}\r\n\r\n"
        writer.write(head.encode() + self._body)
        pieces = 0
        while part := await reader.read(1 << 16):
            self._parts.append((time.perf_counter() - start, part))
            pieces += part.count(_TEXT)
            if pieces >= 3:
                self.writing.set()
            if pieces and self._vanish:
                break
        self.writing.set()
        writer.close()
        return self._reply() | {"seconds": time.perf_counter() - start, "start": start}

    def _reply(self) -> dict[str, Any]:
        head, _, _ = b"".join(part for _, part in self._parts).partition(b"\r\n\r\n")
        times, text, rest = [], "", b""
        for at, part in self._parts:
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line.startswith(b"data: {") and _TEXT in line:
                    times.append(at)
                    text += json.loads(line[6:])["choices"][0]["delta"]["content"]
        return {"status": int(head.split()[1]), "text": text, "times": times}


async def _all(plan: dict[str, Any]) -> list[dict[str, Any]]:
    clients = [_Client(plan["url"], body, plan["vanish"]) for body in plan["bodies"]]
    running = [asyncio.create_task(client.run()) for client in clients]
    if plan["late"] is not None:
        for client in clients:
            await client.writing.wait()
        running.append(asyncio.create_task(_Client(plan["url"], plan["late"], False).run()))
    return await asyncio.gather(*running)


if __name__ == "__main__":
    json.dump(asyncio.run(_all(json.load(sys.stdin))), sys.stdout)
