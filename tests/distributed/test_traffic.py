"""What a plan says that ranks send in a step is what they send, byte for byte, adapters and frozen models included."""

from __future__ import annotations

import json

import pytest

from cosup_fast.config.model import ModelConfig, NSPConfig, NTPConfig
from cosup_fast.data.packing import PackLimits
from cosup_fast.plan.configs import model_config
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import Cluster, step_traffic
from cosup_fast.plan.weights import count_step_weights
from tests.distributed.variants import VARIANTS, build

OPERATORS = {"all-gather": "_allgather_base_", "reduce-scatter": "_reduce_scatter_base_", "all-reduce": "allreduce_"}


def planned(settings: str, passages: int, **fields) -> dict[str, float]:
    """The whole bytes of each collective, of which a rank of n sends (n - 1) / n; twice that for an all-reduce."""
    sections = json.loads(settings)
    parts = ModelConfig(**sections["model"])
    nsp, ntp = NSPConfig(**sections.get("nsp", {})), NTPConfig(**sections.get("ntp", {}))
    request = PlanRequest(
        gen=model_config(parts.gen),
        embseq=None if parts.shared or not nsp.weight else model_config(parts.embseq or parts.gen),
        **{name: getattr(parts, name) for name in ("shared", "freeze_embseq", "gen_lora", "embseq_lora", "dtype")},
        nsp_weight=nsp.weight,
        ntp_weight=ntp.weight,
        precision="float32",
        embseq_sequences=1,
        **fields,
    )
    found: dict[str, float] = dict.fromkeys(OPERATORS.values(), 0)
    for one in step_traffic(request, count_step_weights(build(settings), request), Cluster()):
        whole = 1e9 * one.gigabytes * one.ranks / (one.ranks - 1) / (2 if one.collective == "all-reduce" else 1)
        per_pack = passages / request.embseq_packs if "keys" in one.what else 1
        found[OPERATORS[one.collective]] += whole * per_pack
    return found


def check(world, ranks, settings, limits, examples, corpus, *, sharding, replicas=1):
    arguments = settings, examples, corpus, tuple(limits), sharding == "fsdp", replicas
    answers = world.run("sent", list(range(ranks)), *arguments)
    most = {name: max(1, *(one[name] for one in answers)) for name in ("passages", "gen_packs", "embseq_packs")}
    expected = planned(settings, gpus=ranks, sharding=sharding, replicas=replicas, **most)
    for answer in answers:
        assert dict.fromkeys(expected, 0) | answer["bytes"] == pytest.approx(expected)
    return most, expected


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "symmetric"])
def test_ranks_that_share_out_the_weights_send_what_a_plan_says(variant, small_world, settings, step_examples, corpus):
    arguments = settings(variant), PackLimits(300, 2), step_examples, corpus
    most, _ = check(small_world, 2, *arguments, sharding="fsdp")
    assert most["gen_packs"] > 1


@pytest.mark.parametrize("variant", ["pair", "adapters"])
def test_a_step_of_one_pack_gathers_once_for_each_direction(variant, small_world, settings, step_examples, corpus):
    check(small_world, 2, settings(variant), PackLimits(), step_examples, corpus, sharding="fsdp")


@pytest.mark.parametrize("variant", ["no NTP", "projected, learnt temperature", "adapters"])
def test_ranks_with_whole_weights_send_gradients_alone(variant, small_world, settings, step_examples, corpus):
    check(small_world, 2, settings(variant), PackLimits(300, 2), step_examples, corpus, sharding="ddp")


def test_replicas_sum_what_their_shards_hold(small_world, settings, step_examples, corpus):
    check(small_world, 4, settings("adapters"), PackLimits(), step_examples, corpus, sharding="fsdp", replicas=2)


def test_adapters_narrower_than_the_ranks_are_padded(small_world, settings, step_examples, corpus):
    """Rank 2 over 3 ranks: a third of what travels of these adapters is padding."""
    check(small_world, 3, settings("adapters"), PackLimits(), step_examples, corpus, sharding="fsdp")
