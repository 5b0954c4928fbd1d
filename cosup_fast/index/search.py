"""Nearest neighbours by inner product: exact through FAISS or torch, or approximate through a FAISS factory string.

1. A searcher proposes more candidates than are asked for: FAISS (`faiss.knn`, the search of `IndexFlatIP`) or torch go
   over blocks of embeddings that may lie on disk; an approximate FAISS index proposes what it finds.
2. The candidates' scores are computed again in fp64 from the stored embeddings, rounded to fp32, and sorted; equal
   scores by row. So the scores are those of the passages found, whichever searcher found them, and the two exact ones
   agree with each other and with brute force.
3. Where the last candidate is so close to the k-th that the searcher's rounding could have left out a better one, more
   candidates are taken, up to 4,096.

Shapes: N queries, M passages, D Gen's width, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Engine = Literal["auto", "faiss", "torch", "approximate"]
Propose = Callable[[Tensor, int], np.ndarray]
"""From queries (N, D) fp32 and C to the rows of at most C candidates for each, -1 where there are fewer."""

IN_MEMORY = 1 << 30
"""Up to here an index is searched as one block in memory, beyond it shard by shard from the files."""
_MOST_CANDIDATES = 4096
NUMBERS_AT_ONCE = 1 << 24


def faiss_module() -> Any:
    """The faiss package.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError("this index needs faiss: pip install 'cosup-fast[index]', or engine='torch'") from error
    return faiss


def choose_engine(engine: Engine, device: torch.device | str, *, approximate: bool) -> Engine:
    """The engine that will search, after a look whether it can."""
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r}: choose from {', '.join(get_args(Engine))}")
    on_cpu = torch.device(device).type == "cpu"
    if engine == "auto":
        if approximate:
            engine = "approximate"
        elif not on_cpu:
            engine = "torch"
        else:
            try:
                faiss_module()
                engine = "faiss"
            except ImportError:
                engine = "torch"
    if engine == "approximate" and not approximate:
        raise ValueError("engine='approximate': this index has no approximate FAISS index, build it with a factory")
    if engine != "torch":
        faiss_module()
        if not on_cpu:
            raise ValueError(f"engine={engine!r} searches on the CPU, not on device={str(device)!r}: choose torch")
    return engine


def exact(blocks: list[np.ndarray], engine: Engine, device: torch.device | str) -> FaissFlat | TorchFlat:
    """The exact searcher of some embeddings, given shard by shard."""
    if len(blocks) > 1 and sum(block.nbytes for block in blocks) <= IN_MEMORY:
        blocks = [np.concatenate(blocks)]
    return TorchFlat(blocks, device) if engine == "torch" else FaissFlat(blocks)


class FaissFlat:
    """Exact search by `faiss.knn`, block after block; no embedding is copied."""

    def __init__(self, blocks: Sequence[np.ndarray]):
        self._blocks = blocks
        self._faiss = faiss_module()

    def __call__(self, queries: Tensor, count: int) -> np.ndarray:
        found = _Best(len(queries), count)
        asked = queries.cpu().numpy()
        for block in self._blocks:
            scores, rows = self._faiss.knn(
                asked, block, min(count, len(block)), metric=self._faiss.METRIC_INNER_PRODUCT
            )
            found.add(torch.from_numpy(scores), torch.from_numpy(rows), len(block))
        return found.rows.numpy()


class TorchFlat:
    """Exact search by torch on any device, block after block; what fits on a GPU stays there."""

    def __init__(self, blocks: Sequence[np.ndarray], device: torch.device | str = "cpu"):
        self._device = torch.device(device)
        self._blocks: list[Tensor] = [torch.from_numpy(block) for block in blocks]
        if self._device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self._device)
            if sum(block.nbytes for block in blocks) < free // 2:
                self._blocks = [block.to(self._device) for block in self._blocks]

    def __call__(self, queries: Tensor, count: int) -> np.ndarray:
        queries = queries.to(self._device)
        found = _Best(len(queries), count, self._device)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")  # TF32 would leave out candidates
        try:
            with torch.autocast(self._device.type, enabled=False):
                for block in self._blocks:
                    block = block.to(self._device)
                    parts = [
                        (part @ block.T).topk(min(count, len(block)), dim=1)
                        for part in queries.split(max(1, NUMBERS_AT_ONCE // len(block)))
                    ]
                    scores, rows = (torch.cat(part) for part in zip(*parts, strict=True))
                    found.add(scores, rows, len(block))
        finally:
            torch.set_float32_matmul_precision(precision)
        return found.rows.cpu().numpy()


class _Best:
    """The best candidates so far, over blocks of rows that come in order."""

    def __init__(self, queries: int, count: int, device: torch.device | str = "cpu"):
        self.rows = torch.empty(queries, 0, dtype=torch.int64, device=device)
        self._scores = torch.empty(queries, 0, device=device)
        self._count, self._start = count, 0

    def add(self, scores: Tensor, rows: Tensor, block: int) -> None:
        scores = torch.cat([self._scores, scores], dim=1)
        rows = torch.cat([self.rows, rows + self._start], dim=1)
        self._scores, order = scores.topk(min(self._count, scores.shape[1]), dim=1)
        self.rows = rows.gather(1, order)
        self._start += block


class Approximate:
    """Candidates of an approximate FAISS index, whose ids are rows.

    The lists of an IVF index that a query probes may all be empty, as they are where passages repeat and clusters
    collapse: such a query probes four times as many until something is found.
    """

    def __init__(self, index: Any):
        self._index = index

    def __call__(self, queries: Tensor, count: int) -> np.ndarray:
        asked = queries.cpu().numpy()
        _, rows = self._index.search(asked, count)
        if not (empty := (rows < 0).all(axis=1)).any():
            return rows
        try:
            lists = faiss_module().extract_index_ivf(self._index)
        except RuntimeError:  # another kind of index
            return rows
        probed = lists.nprobe
        try:
            while empty.any() and lists.nprobe < lists.nlist:
                lists.nprobe = min(4 * lists.nprobe, lists.nlist)
                _, rows[empty] = self._index.search(asked[empty], count)
                empty = (rows < 0).all(axis=1)
        finally:
            lists.nprobe = probed
        return rows


def search(
    propose: Propose, vectors: Callable[[np.ndarray], np.ndarray], queries: Tensor, k: int, count: int, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """The k best of `count` passages for each query.

    Args:
        propose: a searcher.
        vectors: the embeddings (n, D) of rows (n,).
        queries: (N, D) fp32.
        k: at most `count`.
        count: M.
        exact: the searcher proposes the best candidates, but for its rounding.

    Returns:
        Scores (N, k) fp32 and rows (N, k) int64, best first; minus infinity and -1 where nothing more was found.
    """
    scores = torch.full((len(queries), k), -torch.inf)
    rows = torch.full((len(queries), k), -1, dtype=torch.int64)
    width = min(count, 2 * k + 32)
    waiting = torch.arange(len(queries))
    while len(waiting):
        unsure: list[Tensor] = []
        for part in waiting.split(max(1, NUMBERS_AT_ONCE // (width * queries.shape[1]))):
            scores[part], rows[part], close = _ranked(propose, vectors, queries[part.to(queries.device)], k, width)
            if exact and width < count:
                unsure.append(part[close])
        if width >= min(count, _MOST_CANDIDATES) or not unsure:
            break
        waiting, width = torch.cat(unsure), min(count, _MOST_CANDIDATES, 4 * width)
    return scores, rows


def _ranked(
    propose: Propose, vectors: Callable[[np.ndarray], np.ndarray], queries: Tensor, k: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Exact scores and rows of the k best candidates (N, k), and whether a better one may have been left out (N,)."""
    found = propose(queries, width)
    asked = queries.double().cpu().numpy()
    keys = vectors(np.maximum(found, 0).reshape(-1)).astype(np.float64).reshape(*found.shape, -1)
    exact = np.einsum("nd,ncd->nc", asked, keys)
    exact[found < 0] = -np.inf
    rounded = exact.astype(np.float32)
    order = np.lexsort((found, -rounded))[:, :k]
    best = np.take_along_axis(rounded, order, axis=1)
    rows = np.take_along_axis(found, order, axis=1)
    # fp32 sums of D products are off by a few roots of D times the rounding of the largest product of norms.
    size = np.linalg.norm(asked, axis=1) * np.linalg.norm(keys, axis=2).max(axis=1)
    error = 8 * np.sqrt(asked.shape[1]) * np.finfo(np.float32).eps * size
    close = best[:, -1] <= exact.min(axis=1) + error
    pad = ((0, 0), (0, k - best.shape[1]))
    return (
        torch.from_numpy(np.pad(best, pad, constant_values=-np.inf)),
        torch.from_numpy(np.pad(rows, pad, constant_values=-1)),
        torch.from_numpy(close),
    )


def make_approximate(factory: str, width: int, count: int | None = None) -> Any:
    """An empty approximate index by inner product.

    Args:
        factory: a FAISS factory string, as `IVF1024,PQ64` or `HNSW32`.
        width: D.
        count: M, where it is known, to refuse more clusters than passages before anything is embedded.

    Raises:
        ValueError: FAISS does not know the string, or there are too few passages.
        ImportError: faiss is not installed.
    """
    faiss = faiss_module()
    try:
        index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rsplit(": ", 1)[-1]
        raise ValueError(
            f"factory={factory!r} makes no FAISS index of width {width} ({reason}): give one such as 'IVF1024,Flat', "
            "'IVF1024,PQ32' or 'HNSW32'"
        ) from None
    lists = getattr(faiss.try_extract_index_ivf(index), "nlist", 0)
    if count is not None and lists > count:
        raise ValueError(f"factory={factory!r} has {lists} clusters for {count} passages: use fewer, or no factory")
    return index


def train_approximate(index: Any, blocks: Sequence[np.ndarray], sample: int) -> None:
    """Trains an approximate index on rows drawn from all blocks (seeded).

    Raises:
        ValueError: too few rows for this kind of index.
    """
    if index.is_trained:
        return
    total = sum(map(len, blocks))
    chosen = np.sort(np.random.default_rng(0).choice(total, min(sample, total), replace=False))
    parts, start = [], 0
    for block in blocks:
        parts.append(block[chosen[(chosen >= start) & (chosen < start + len(block))] - start])
        start += len(block)
    try:
        index.train(np.ascontiguousarray(np.concatenate(parts)))
    except RuntimeError as error:
        reason = str(error).rsplit("failed: ", 1)[-1]
        raise ValueError(f"the FAISS index cannot be trained on {len(chosen)} passages ({reason})") from None


def set_parameters(index: Any, parameters: str) -> None:
    """Search-time parameters of FAISS, as `nprobe=32` or `efSearch=128,quantizer_efSearch=64`.

    Raises:
        ValueError: FAISS does not know them for this kind of index.
    """
    if not parameters:
        return
    try:
        faiss_module().ParameterSpace().set_index_parameters(index, parameters)
    except RuntimeError as error:
        reason = str(error).rsplit(": ", 1)[-1]
        raise ValueError(f"parameters={parameters!r} are not those of this FAISS index: {reason}") from None


def read_approximate(path: Path, width: int, count: int) -> Any:
    """A FAISS index that `faiss.write_index` wrote and whose checksum agrees.

    Raises:
        ValueError: it is not a FAISS index, or not of these embeddings.
    """
    try:
        index = faiss_module().read_index(str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} cannot be read by FAISS, build the index again: {error}") from None
    if (index.d, index.ntotal) != (width, count):
        raise ValueError(
            f"{path} holds {index.ntotal} vectors of width {index.d}, expected {count} of {width}: "
            "build the index again"
        )
    return index
