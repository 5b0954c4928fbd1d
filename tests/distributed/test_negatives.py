"""InfoNCE across real processes: what one process with the whole batch computes, for any world, ragged or not."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from cosup_fast import reference
from cosup_fast.losses import CoSupervisionLoss, InfoNCELoss

DOUBLE = torch.float64
WORLDS = [1, 2, 3, 4, 8]
assert_equal = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11, check_dtype=False)
# Queries and keys of each rank: ragged, a rank with keys alone, one with nothing.
RAGGED = [(3, 5), (2, 2), (0, 4), (5, 6), (1, 3), (0, 0), (4, 4), (2, 7)]
ROWS = ("query", "keys", "query_ids", "key_ids", "private_negatives")


def make_parts(counts, d=6, seed=0, dtype=DOUBLE, ids=False, private=0, positive=False, several=0) -> list:
    """Tensors of each rank; ids repeat within and across ranks."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=DOUBLE).to(dtype)

    def randint(high: int, *shape: int) -> Tensor:
        return torch.randint(max(1, high), shape, generator=g)

    parts = []
    for n, m in counts:
        part = {"query": randn(n, d), "keys": randn(m, d)}
        if ids:
            part["key_ids"] = randint(2 * m, m)
        if positive:
            part["positive"] = randint(m, n)
        if private:
            part["private_negatives"] = randn(n, private, d)
        if several:
            part["positive_ids"] = randint(12, n, several + len(parts) % 2) - 1
            part.setdefault("positive", torch.arange(n))
        parts.append(part)
    return parts


def whole(parts: list[dict[str, Tensor]], scale: Tensor | None = None) -> dict[str, Tensor]:
    """The batch of all ranks."""
    offsets = [0]
    for part in parts:
        offsets.append(offsets[-1] + len(part["keys"]))
    batch = {name: torch.cat([part[name] for part in parts]) for name in ROWS if name in parts[0]}
    first = [part.get("positive", torch.arange(len(part["query"]))) for part in parts]
    batch["positive"] = torch.cat([positive + offset for positive, offset in zip(first, offsets)])
    if "positive_ids" in parts[0]:
        most = max(part["positive_ids"].shape[1] for part in parts)
        fill = [most - part["positive_ids"].shape[1] for part in parts]
        padded = [torch.nn.functional.pad(part["positive_ids"], (0, n), value=-1) for part, n in zip(parts, fill)]
        batch["positive_ids"] = torch.cat(padded)
    if scale is not None:
        batch["scale"] = scale
    return batch


def expected(batch: dict[str, Tensor], upstream: Tensor | None = None, dtype=DOUBLE, **options) -> dict[str, Tensor]:
    """One process with the whole batch, by the reference."""
    batch = {k: v.detach().to(dtype).requires_grad_() if v.is_floating_point() else v for k, v in batch.items()}
    loss, stats = reference.info_nce(**batch, return_stats=True, **options)
    (loss.sum() if upstream is None else (loss * upstream).sum()).backward()
    return {
        "loss": loss.detach(),
        **stats._asdict(),
        **{f"d{k}": v.grad for k, v in batch.items() if v.grad is not None},
    }


def together(answers: list[dict[str, Tensor]], reduction: str = "mean") -> dict[str, Tensor]:
    """The shares of all ranks put together."""
    out = {k: torch.cat([a[k] for a in answers]) for k in answers[0] if k not in ("loss", "dscale")}
    losses = [a["loss"] for a in answers]
    out["loss"] = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    if "dscale" in answers[0]:
        out["dscale"] = torch.stack([a["dscale"] for a in answers]).sum()
    return out


def check(world, parts, scale=None, upstream=None, **options) -> None:
    sent = [part if scale is None else {**part, "scale": scale} for part in parts]
    split = None if upstream is None else upstream.split([len(part["query"]) for part in parts])
    more = [{**part, "upstream": u} for part, u in zip(sent, split)] if split else sent
    ours = together(world.run("info_nce", more, **options), options.get("reduction", "mean"))
    assert_equal(ours, expected(whole(parts, scale), upstream, **options))


OPTIONS = {
    "plain": {},
    "cosine": {"normalize": True, "scale": torch.tensor(4.0, dtype=DOUBLE)},
    "symmetric": {"symmetric": True, "scale": torch.tensor(0.7, dtype=DOUBLE)},
    "symmetric, smoothing, cosine": {"symmetric": True, "label_smoothing": 0.1, "normalize": True},
    "duplicates masked": {"ids": True},
    "duplicates kept": {"ids": True, "duplicates": "keep"},
    "duplicates positive, symmetric": {"ids": True, "duplicates": "positive", "symmetric": True},
    "several positives": {"ids": True, "several": 2},
    "several positives, symmetric": {"ids": True, "several": 2, "symmetric": True, "label_smoothing": 0.2},
    "private": {"private": 2, "positive": True, "label_smoothing": 0.1},
    "margin, symmetric": {"margin": -0.5, "symmetric": True, "private": 1},
    "sum": {"reduction": "sum", "positive": True},
    "none": {"reduction": "none", "normalize": True},
    "none, symmetric": {"reduction": "none", "symmetric": True, "ids": True, "private": 1},
}
MAKE = ("ids", "several", "private", "positive")


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equal_to_one_process(world, size, options):
    made = {k: v for k, v in options.items() if k in MAKE}
    options = {k: v for k, v in options.items() if k not in MAKE}
    parts = make_parts(RAGGED[:size], seed=size, **made)
    n = sum(len(part["query"]) for part in parts)
    upstream = torch.linspace(0.5, 2, n, dtype=DOUBLE) if options.get("reduction") == "none" else None
    check(world, parts, options.pop("scale", None), upstream, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"symmetric": True, "label_smoothing": 0.1}, {"ids": True}, {"ids": True, "several": 2, "symmetric": True}],
    ids=str,
)
def test_the_key_that_answers_a_query_may_be_another_ranks(world, options):
    made = {k: v for k, v in options.items() if k in MAKE}
    options = {k: v for k, v in options.items() if k not in MAKE}
    parts = make_parts(RAGGED[:5], **made)
    batch = whole(parts)
    counts = [len(part["query"]) for part in parts]
    batch["positive"] = torch.randperm(len(batch["keys"]))[: sum(counts)]
    for part, positive in zip(parts, batch["positive"].split(counts)):
        part["positive"] = positive
    ours = together(world.run("info_nce", parts, positive_rows="group", **options))
    assert_equal(ours, expected(batch, **options))


def test_equal_with_many_chunks(world):
    for options in ({}, {"symmetric": True}, {"symmetric": True, "reduction": "none"}):
        parts = make_parts([(7, 9), (0, 3), (11, 11)])
        ours = together(world.run("info_nce", parts, chunk_rows=2, **options), options.get("reduction", "mean"))
        assert_equal(ours, expected(whole(parts), **options))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equal_for_any_shapes_and_options(world, data):
    counts = data.draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=8), label="queries, others"
    )
    counts = [(n, n + more) for n, more in counts]
    made = data.draw(st.fixed_dictionaries({"ids": st.booleans(), "private": st.integers(0, 2)}), label="made")
    made["several"] = data.draw(st.integers(0, 2), label="several") if made["ids"] else 0
    options = data.draw(
        st.fixed_dictionaries(
            {
                "symmetric": st.booleans(),
                "normalize": st.booleans(),
                "label_smoothing": st.sampled_from([0.0, 0.3]),
                "reduction": st.sampled_from(["mean", "sum", "none"]),
                "duplicates": st.sampled_from(["mask", "positive", "keep"]),
            }
        ),
        label="options",
    )
    parts = make_parts(counts, d=data.draw(st.integers(3, 9), label="d"), **made)
    if sum(n for n, _ in counts) == 0:
        answers = world.run("info_nce", parts, **options)
        assert all(float(a["loss"].sum()) == 0 and not a["dkeys"].any() for a in answers)
    else:
        check(world, parts, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"symmetric": True, "normalize": True, "scale": 8.0}], ids=["plain", "both"])
def test_lower_precision_is_within_eagers_error(world, dtype, options):
    parts = make_parts([(9, 12), (0, 5), (14, 14), (6, 20)], d=32, dtype=dtype)
    for part in parts:
        part["query"] /= 6
    ours = together(world.run("info_nce", parts, **options))
    truth = expected(whole(parts), **options)
    eager = expected(whole(parts), dtype=dtype, **options)
    for name in ("loss", "lse", "dquery", "dkeys"):
        largest = truth[name].abs().max()
        rounding = torch.finfo(ours[name].dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps
        allowed = 2 * ((eager[name].double() - truth[name]).abs().max() / largest + rounding)
        assert (ours[name].double() - truth[name]).abs().max() / largest <= allowed, name


def test_keys_travel_in_the_dtype_of_the_products_and_gradients_in_fp32(world):
    parts = make_parts([(4, 4), (3, 5)], dtype=torch.float32)
    for dtype, answers in (
        (torch.float32, world.run("traffic", parts)),
        (torch.bfloat16, world.run("traffic", parts, autocast=True)),
        (torch.bfloat16, world.run("traffic", [{k: v.bfloat16() for k, v in part.items()} for part in parts])),
    ):
        for answer in answers:
            assert answer == {"gathered": [str(dtype)], "scattered": ["torch.float32"]}


def test_autocast_is_bf16_products(world):
    parts = make_parts([(9, 12), (4, 5)], d=32, dtype=torch.float32)
    ours = together(world.run("info_nce", parts, autocast=True, normalize=True, scale=5.0))
    truth = expected(whole(parts), normalize=True, scale=5.0)
    assert ours["dkeys"].dtype == torch.float32
    assert 1e-6 < (ours["dkeys"] - truth["dkeys"]).abs().max() / truth["dkeys"].abs().max() < 2**-6


def local_gradients(parts, **options) -> tuple[Tensor, Tensor]:
    """dq and dk where keys of other ranks are constants: from dL/dz, of which a key has its own rank's block."""
    batch = whole(parts)
    q, k = batch.pop("query"), batch.pop("keys")
    z = (q @ k.T).requires_grad_()
    reference.info_nce(z, torch.eye(len(k), dtype=DOUBLE), **batch, **options).backward()
    owner_q = torch.cat([torch.full((len(p["query"]),), i) for i, p in enumerate(parts)])
    owner_k = torch.cat([torch.full((len(p["keys"]),), i) for i, p in enumerate(parts)])
    block = owner_q[:, None] == owner_k
    return z.grad @ k, (z.grad * block).T @ q


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"scale": 0.5, "ids": True}], ids=str)
def test_local_keys_have_the_gradient_of_their_own_ranks_queries(world, size, options):
    options = dict(options)
    parts = make_parts(RAGGED[:size], ids=options.pop("ids", False))
    dq, dk = local_gradients(parts, **options)
    for chunk_rows in (None, 2):
        ours = together(world.run("info_nce", parts, key_grad="local", chunk_rows=chunk_rows, **options))
        torch.testing.assert_close(ours["dquery"], dq, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(ours["dkeys"], dk, rtol=1e-11, atol=1e-11)
        truth = expected(whole(parts), **options)
        torch.testing.assert_close(ours["loss"], truth["loss"], rtol=1e-11, atol=1e-11)


def test_a_passage_on_another_rank_is_never_its_own_negative(world):
    keys = torch.randn(3, 8, dtype=DOUBLE)
    query = torch.randn(3, 8, dtype=DOUBLE)
    ids = torch.tensor([7, 8, 9])
    parts = [{"query": query, "keys": keys, "key_ids": ids}, {"query": query[:1], "keys": keys, "key_ids": ids}]
    answers = world.run("info_nce", parts, reduction="none")
    alone = expected({"query": query, "keys": keys, "key_ids": ids}, reduction="none")
    # The other rank's copy of the positive is not a candidate; those of the two negatives are, so each counts twice.
    z = query @ keys.T
    others = z.masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf)
    twice = torch.cat([z.diagonal()[:, None], others, others], 1).logsumexp(1) - z.diagonal()
    torch.testing.assert_close(answers[0]["loss"], twice)
    assert (answers[0]["loss"] > alone["loss"]).all()
    torch.testing.assert_close(answers[1]["loss"], twice[:1])


def test_an_operand_that_was_changed_before_its_gradient_is_refused(world):
    """Of losses by row the gradient is formed in the backward pass, from queries that must still be the same."""
    for message in world.run("changed", make_parts(RAGGED[:2])):
        assert "modified by an inplace operation" in message


def test_labels_stay_aligned_where_ranks_bring_hard_negatives(world):
    """sentence-transformers, PR 3453: ranks bring P N N P N N, labels as of P P N N N N made negatives the targets."""
    eye = torch.eye(12, dtype=DOUBLE) * 20
    parts = []
    for rank in range(4):
        positives = eye[2 * rank : 2 * rank + 2]
        hard = -positives.repeat(2, 1)
        parts.append({"query": positives, "keys": torch.cat([positives, hard])})
    answers = world.run("info_nce", parts, reduction="none")
    for rank, answer in enumerate(answers):
        assert (answer["rank"] == 0).all()
        assert answer["top1"].tolist() == [6 * rank, 6 * rank + 1]
        assert (answer["loss"] < 1e-6).all()


@pytest.mark.parametrize("ddp", [False, True], ids=["summed", "DDP"])
def test_gradients_of_shared_weights_do_not_depend_on_the_world_or_on_accumulation(world, ddp):
    """open_clip #616: the gradient scale grew with the number of GPUs."""
    weight = torch.randn(5, 9, dtype=DOUBLE, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(2)
    rounds = [torch.randn(2, 24, 9, dtype=DOUBLE, generator=g) for _ in range(2)]  # queries, keys
    first = None
    for size, cuts in ((1, [24]), (2, [12, 12]), (3, [5, 11, 8]), (8, [3] * 8), (4, [24, 0, 0, 0])):
        if ddp and 0 in cuts:
            continue
        parts = [{} for _ in range(size)]
        for k, (queries, keys) in enumerate(rounds):
            for part, q, w in zip(parts, queries.split(cuts), keys.split(cuts)):
                part |= {f"query{k}": q, f"keys{k}": w}
        for answer in world.run("shared_weights", parts, weight, 2, ddp):
            first = first or answer
            assert_equal(answer, first, rtol=1e-10, atol=1e-10)
    w, log_scale = weight.clone().requires_grad_(), torch.tensor(3.0, dtype=DOUBLE).log().requires_grad_()
    for queries, keys in rounds:
        loss = reference.info_nce(queries @ w.T, keys @ w.T, scale=log_scale.exp(), normalize=True, reduction="sum")
        (loss / 48).backward()
    assert first is not None
    # log(3) is stored in fp32
    assert_equal(first, {"weight": w.grad, "log_scale": log_scale.grad}, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_a_grad_cache_over_ranks_gives_the_gradient_of_one_process(world, rows):
    weight = torch.randn(5, 9, dtype=DOUBLE)
    parts = make_parts([(5, 7), (0, 2), (4, 4)], d=9)
    batch = whole(parts)
    leaf = weight.clone().requires_grad_()
    query, keys = batch.pop("query") @ leaf.T, batch.pop("keys") @ leaf.T
    reference.info_nce(query, keys, scale=0.7, **batch).backward()
    for gradient in world.run("grad_cache", parts, weight, rows):
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-10, atol=1e-10)


def test_gather_and_scatter_sum(world):
    parts = [torch.randn(n, 3, 2) for n in (2, 0, 5)]
    everything = torch.cat(parts)
    for part, answer in zip(parts, world.run("primitives", parts)):
        assert answer["counts"] == [2, 0, 5]
        assert torch.equal(answer["all"], everything)
        assert not answer["graph"]
        assert torch.equal(answer["own"], part.double() * 6)
        torch.testing.assert_close(answer["sum"], torch.stack([p.sum() for p in parts]).sum())
        torch.testing.assert_close(answer["max"], torch.stack([p.sum() for p in parts]).max())


def test_what_nobody_trains_costs_nothing(world):
    parts = make_parts([(4, 8)] * 4)
    one = 2 * 4 * 32 * 6  # N_r x M x D
    for options, products in (
        ({}, 3), ({"symmetric": True}, 3), ({"reduction": "none"}, 4), ({"key_grad": "local"}, 2.25),
        ({"symmetric": True, "chunk_rows": 2}, 3),
    ):  # fmt: skip
        assert world.run("counted", parts, **options) == [products * one] * 4, options
    for frozen, products in ((("keys",), 2), (("query",), 2), (("query", "keys"), 1)):
        sent = [{**part, "frozen": frozen} for part in parts]
        assert world.run("counted", sent) == [products * one] * 4, frozen


def test_a_rank_may_train_what_another_does_not(world):
    parts = make_parts([(3, 4), (2, 2), (4, 5)])
    truth = expected(whole(parts))
    answers = world.run(
        "info_nce", [{**part, "frozen": ("query", "keys")[: i % 2 * 2]} for i, part in enumerate(parts)]
    )
    assert "dkeys" not in answers[1]
    assert "dquery" not in answers[1]
    for rank, start in ((0, 0), (2, 6)):
        own = slice(start, start + len(parts[rank]["keys"]))
        torch.testing.assert_close(answers[rank]["dkeys"], truth["dkeys"][own], rtol=1e-11, atol=1e-11)


def test_ranks_may_say_in_different_ways_what_answers(world):
    """By rows here, by ids there, and not at all where there is no query."""
    parts = make_parts([(3, 4), (2, 3), (0, 2)])
    start = 0
    for part in parts:
        part["key_ids"] = torch.arange(start, start + len(part["keys"]))
        start += len(part["keys"])
    said = [dict(part) for part in parts]
    said[0]["positive"] = torch.tensor([2, 0, 1])
    said[1]["positive_ids"] = torch.tensor([[6], [4]])
    for part, rows in zip(parts, ([2, 0, 1], [2, 0], [])):
        part["positive"] = torch.tensor(rows, dtype=torch.int64)
    assert_equal(together(world.run("info_nce", said)), together(world.run("info_nce", parts)))


def test_a_rank_without_queries_need_not_say_whose_rows_answer(world):
    first, second = make_parts([(3, 3), (0, 2)])
    truth = expected({**whole([first, second]), "positive": torch.tensor([4, 0, 1])})
    first["positive"] = torch.tensor([4, 0, 1])
    for more in ({}, {"positive": torch.zeros(0, dtype=torch.int64)}):
        answers = world.run("info_nce", [first, {**second, **more}], positive_rows="group")
        assert_equal(together(answers), truth)


def test_positive_rows_of_all_ranks_without_a_positive_are_their_own(world):
    parts = make_parts([(3, 4), (0, 2)])
    assert_equal(together(world.run("info_nce", parts, positive_rows="group")), expected(whole(parts)))


def test_a_rank_may_have_nothing_to_train_where_backward_needs_no_other(world):
    parts = make_parts([(3, 4), (2, 2)])
    parts[0]["frozen"], parts[1]["frozen"] = ("keys",), ("query", "keys")
    answers = world.run("info_nce", parts, reduction="none")
    assert "dquery" in answers[0]
    assert "dquery" not in answers[1]


@pytest.mark.parametrize("ignore_index", [-100, None])
def test_co_supervision_shares_add_up(world, ignore_index):
    g = torch.Generator().manual_seed(0)
    head = torch.randn(11, 6, dtype=DOUBLE, generator=g)
    parts = make_parts([(2, 3), (0, 1), (4, 4)])
    for part, tokens in zip(parts, (5, 8, 1)):
        part["hidden"] = torch.randn(tokens, 6, dtype=DOUBLE, generator=g)
        part["target"] = torch.randint(-1, 11, (tokens,), generator=g)
        part["target"][part["target"] < 0] = 0 if ignore_index is None else ignore_index
        part["lm_head_weight"] = head
    batch = whole(parts)
    hidden, target = (torch.cat([part[name] for part in parts]) for name in ("hidden", "target"))
    truth = CoSupervisionLoss(0.5, nsp=InfoNCELoss(scale=2.0))(hidden, head, target, **batch)
    answers = world.run("co_supervision", parts, ignore_index)
    for name in ("loss", "ntp", "nsp"):
        torch.testing.assert_close(torch.stack([a[name] for a in answers]).sum(), getattr(truth, name))


@pytest.mark.slow
def test_under_torch_compile(world):
    parts = make_parts([(3, 4), (2, 2)])
    ours = together(world.run("info_nce", parts, compiled=True, symmetric=True))
    assert_equal(ours, expected(whole(parts), symmetric=True))


REFUSED = {
    "width": ([{}, {"query": torch.randn(2, 5), "keys": torch.randn(3, 5)}], "width is 4 on rank 0 and 5 on rank 1"),
    "scale": ([{"scale": 2.0}, {"scale": 3.0}], "scale is 2.0 on rank 0 and 3.0 on rank 1"),
    "scale tensor": (
        [{"scale": torch.tensor(2.0)}, {"scale": torch.tensor(3.0)}],
        "scale is 2.0 on rank 0 and 3.0 on rank 1",
    ),
    "duplicates": (
        [{"key_ids": torch.arange(3), "duplicates": "positive"}, {"key_ids": torch.arange(3)}],
        "duplicates is 'positive' on rank 0 and 'mask' on rank 1",
    ),
    "nothing to train": (
        [{"keys": torch.randn(3, 4, requires_grad=True), "reduction": "none"}, {"reduction": "none"}],
        "reduction is 'none', so that backward is a collective, but rank 1 has nothing that needs a gradient",
    ),
    "ids": ([{"key_ids": torch.arange(3)}, {}], "key_ids is 'given' on rank 0 and None on rank 1"),
    "reduction": ([{"reduction": "sum"}, {}], "reduction is 'sum' on rank 0 and 'mean' on rank 1"),
    "dtype": (
        [{}, {"query": torch.randn(2, 4).double(), "keys": torch.randn(3, 4).double()}],
        "dtype is 'torch.float32' on rank 0 and 'torch.float64' on rank 1",
    ),
    "positive": ([{}, {"positive": torch.tensor([0, 3])}], "rank 1: positive holds 3; every entry must be in 0..2"),
    "positive of all ranks": (
        [
            {"positive": torch.tensor([0, 5]), "positive_rows": "group"},
            {"positive": torch.tensor([6, 0]), "positive_rows": "group"},
        ],
        "rank 1: positive holds 6; every entry must be in 0..5",
    ),
    "positive ids": (
        [
            {"key_ids": torch.arange(3), "positive_ids": torch.tensor([[4], [0]])},
            {"key_ids": torch.arange(3, 6), "positive_ids": torch.tensor([[4], [9]])},
        ],
        "rank 1: positive_ids[1] is [9], none of which is in key_ids",
    ),
    "rows": ([{}, {"keys": torch.randn(1, 4)}], "rank 1: keys has 1 rows for 2 queries"),
    "kind": ([{}, {"keys": torch.randn(3, 4).long()}], "rank 1: keys"),
    "reference": ([{"impl": "reference"}, {"impl": "reference"}], "impl is 'reference', which is of one process"),
    "key_grad": ([{"key_grad": "both"}, {"key_grad": "both"}], "key_grad is 'both'"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_on_one_rank_is_raised_on_all(world, changes, message):
    parts = [{"query": torch.randn(2, 4), "keys": torch.randn(3, 4), **change} for change in changes]
    (_, first), (_, second) = world.run("refusal", parts)
    assert message in first
    assert message.removeprefix("rank 1: ").split(" ")[0] in second
    assert "rank 1: " not in second


def test_ranks_that_make_different_calls_are_told(world):
    for text in world.run("purposes", [None] * 3):
        assert "every rank makes the same calls" in text
