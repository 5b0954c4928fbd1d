"""SASS of a binary: how many instructions it has, and how few of them run between two tiles of a product."""

from __future__ import annotations

import heapq
import re
import subprocess
import tempfile


def disassemble(cubin: bytes) -> str:
    """SASS of a cubin, by the nvdisasm that Triton ships."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed: {done.stderr.strip()}")
    return done.stdout


def instruction_counts(assembly: str, core: str) -> tuple[int, int | None]:
    """Instructions of a kernel, and the fewest from the end of its last innermost loop that holds one like `core` to
    the next start of such a loop, or to the end of the kernel; None without such a loop.

    Fewest: along the branches that skip what only some tiles need. A predicated instruction counts.
    """
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in assembly.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    goals = [re.search(r"(@.*)?\bBRA\b(\.\w+ !?U?P\d+,)?.*`\((\.L_x_\d+)\)", line) for line in lines]
    loops = []
    for end, goal in enumerate(goals):
        # Conditional: what waits out of line jumps back without a condition, and closes no loop.
        start = labels[goal[3]] if goal and (goal[1] or goal[2]) else end + 1
        if start <= end and any(re.search(core, one) for one in lines[start : end + 1]):
            loops.append(range(start, end + 1))
    inner = [a for a in loops if not any(b != a and b.start >= a.start and b.stop <= a.stop for b in loops)]
    if not inner:
        return len(lines), None
    products = {i for loop in inner for i in loop}
    reached: set[int] = set()
    queue = [(0, max(loop.stop for loop in inner))]
    while queue:
        steps, i = heapq.heappop(queue)
        if i in products or i >= len(lines) or re.search(r"\*/\s+EXIT\b", lines[i]):
            return len(lines), steps
        if i not in reached:
            reached.add(i)
            goal = goals[i]
            if goal:
                heapq.heappush(queue, (steps + 1, labels[goal[3]]))
            if not goal or goal[1] or goal[2]:
                heapq.heappush(queue, (steps + 1, i + 1))
    raise RuntimeError("no way leads from a loop of tensor-core instructions to the end of the kernel")
