"""What travels between GPUs: by hand on a small step, its limits, and the arithmetic beside published figures."""

from __future__ import annotations

import json

import pytest

from cosup_fast.config import load_config
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import (
    Cluster,
    PassWeights,
    StepWeights,
    keys_for_memory,
    keys_for_share,
    keys_of_step,
    step_traffic,
)
from cosup_fast.plan.time import estimate_step

LLAMA = {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}
LLAMA3_8B = LLAMA | {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
}  # fmt: skip
LLAMA3_70B = LLAMA | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
}  # fmt: skip
TINY = LLAMA | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


GEN, EMBSEQ = PassWeights(layers=1_000_000, rest=300_000, gradients=2_600_000), PassWeights(900_000, 200_000, 2_200_000)
BOTH = StepWeights((GEN, EMBSEQ), whole=0)


def tiny(**fields) -> PlanRequest:
    return PlanRequest(**{"gen": TINY, "embseq": TINY, "gpus": 16, **fields})


def by_name(
    request: PlanRequest, weights: StepWeights = BOTH, cluster: Cluster | None = None
) -> dict[str, tuple[float, float, int]]:
    return {
        one.what: (one.gigabytes * 1e9, one.seconds, one.ranks)
        for one in step_traffic(request, weights, cluster or Cluster())
    }


def test_traffic_of_full_sharding_by_hand():
    found = by_name(tiny(gen_packs=3, embseq_packs=3), cluster=Cluster(8, node_gb_s=100, network_gb_s=10))
    gathered = 8 * (GEN.layers + EMBSEQ.layers) + 3 * (GEN.rest + EMBSEQ.rest)  # 3 + 2 forwards and 3 backwards
    assert found["weights"][0] == pytest.approx(15 / 16 * gathered)
    assert found["gradients"][0] == pytest.approx(15 / 16 * 3 * (GEN.gradients + EMBSEQ.gradients))
    keys = 16 * 3 * 16 * 64  # GPUs, packs, passages of a pack, width
    assert found["keys"][0] == pytest.approx(15 / 16 * 2 * keys)
    assert found["gradients of keys"][0] == pytest.approx(15 / 16 * 4 * keys)
    assert "gradients of replicas" not in found
    # A node of eight receives half of everything over eight links.
    assert found["weights"][1] == pytest.approx(gathered * max(15 / 16 / 100e9, 1 / 2 / (8 * 10e9)))


def test_replicas_keep_weights_within_their_node():
    links = Cluster(8, node_gb_s=100, network_gb_s=10)
    found = by_name(tiny(replicas=2), cluster=links)
    gathered = 2 * (GEN.layers + EMBSEQ.layers) + GEN.rest + EMBSEQ.rest
    assert found["weights"][0] == pytest.approx(7 / 8 * gathered)
    assert found["weights"][1] == pytest.approx(7 / 8 * gathered / 100e9)
    sent, seconds, ranks = found["gradients of replicas"]
    assert ranks == 2
    assert sent == pytest.approx(2 * 1 / 2 * (GEN.gradients + EMBSEQ.gradients) / 8)
    assert seconds == pytest.approx(sent / 10e9)  # each over a link of its own
    assert found["keys"] == by_name(tiny(), cluster=links)["keys"]


def test_links_need_nodes(cosup):
    status, _, err = cosup("plan", "--preset", "llama2-7b-8x80g", "--network", "50")
    assert status == 1
    assert "--network is the speed of links of a cluster: name its size with --nodes" in err


def test_what_is_not_trained_or_not_asked_for_does_not_travel():
    frozen = by_name(tiny(freeze_embseq=True))
    assert frozen["gradients"][0] == pytest.approx(15 / 16 * GEN.gradients)
    assert frozen["weights"][0] == pytest.approx(15 / 16 * (2 * GEN.layers + GEN.rest + EMBSEQ.layers))
    assert set(frozen) == {"weights", "gradients", "keys"}
    projected = tiny(freeze_embseq=True, embseq=TINY | {"hidden_size": 32})  # what is trained of it reads the keys
    assert "gradients of keys" in by_name(projected)
    assert "gradients of keys" not in by_name(tiny(key_grad="local"))
    assert set(by_name(tiny(nsp_weight=0.0), StepWeights((GEN,), whole=0))) == {"weights", "gradients"}
    ddp = by_name(tiny(sharding="ddp"), StepWeights((GEN, EMBSEQ), whole=5000))
    assert set(ddp) == {"gradients", "keys", "gradients of keys"}
    assert ddp["gradients"][0] == pytest.approx(2 * 15 / 16 * 5000)
    assert by_name(tiny(gpus=1)) == {}


def test_thresholds_are_where_they_say():
    request = tiny()
    there = keys_for_share(request, BOTH, 0.1)
    packs = there / keys_of_step(request)
    sent = by_name(request)
    keys = sent.pop("keys")[0] + sent.pop("gradients of keys")[0]
    assert packs * keys == pytest.approx(0.1 * sum(one[0] for one in sent.values()), rel=1e-3)
    assert keys_for_memory(request, 1) == 2**30 // (6 * 64)


@pytest.mark.parametrize(
    ("model", "utilization", "tokens_a_second", "peak", "deviation"),
    [
        (LLAMA3_8B, 0.568, 2904, 312e12, -0.156),
        (LLAMA3_8B, 0.582, 2973, 312e12, -0.157),
        (LLAMA3_70B, 0.517, 331, 312e12, -0.078),
    ],
    ids=["8B", "8B selective op", "70B"],
)
def test_flop_of_a_token_beside_torchtitan(model, utilization, tokens_a_second, peak, deviation):
    """Its table gives tokens a second and utilization on A100s, hence FLOP; it counts all of attention, and embeddings.

    docs/performance.md of pytorch/torchtitan, Llama 3 with FSDP2 on 64 A100, sequences of 8,192.
    """
    tokens = 8192
    one = PlanRequest(
        gen=model, gpus=1, nsp_weight=0.0, gen_sequences=1, gen_length=tokens, activation_checkpointing="none"
    )
    ours = 1e15 * estimate_step(one).pflop / tokens
    theirs = utilization * peak / tokens_a_second
    assert ours / theirs - 1 == pytest.approx(deviation, abs=0.003)
    width, layers = model["hidden_size"], model["num_hidden_layers"]
    other_half, embeddings = 3 * 2 * layers * width * tokens, 6 * width * model["vocab_size"]
    assert (ours + other_half + embeddings) / theirs == pytest.approx(1, abs=0.003)


def test_replicas_are_refused_where_there_is_nothing_to_replicate():
    config = load_config(None, ["model.gen=llama2-7b", "training.sharding=fsdp"])
    with pytest.raises(ValueError, match="does not divide 16 GPUs"):
        PlanRequest.of(config, gpus=16, replicas=3)
    ddp = load_config(None, ["model.gen=llama2-7b", "training.sharding=ddp"])
    with pytest.raises(ValueError, match=r"replicas is 2 and training\.sharding=ddp"):
        PlanRequest.of(ddp, gpus=16, replicas=2)


def test_the_command_reports_traffic_and_says_that_it_is_a_prediction(cosup, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"max_position_embeddings": 512}))
    words = ["plan", f"model.gen={tmp_path / 'config.json'}", "training.sharding=fsdp", "--gpus", 4, "--nodes", 2]
    words += ["--replicas", 2, "--gen-pack", "2x64", "--embseq-pack", "4x32", "--quick"]
    status, out, _ = cosup(*words)
    assert status == 0
    for said in ("8 GPUs, 2 replicas", "all-gather", "gradients of replicas", "prediction, not measured", "in a ring"):
        assert said in out
    status, out, _ = cosup(*words, "model.gen_lora.rank=2", "model.embseq_lora.rank=2", "--json")
    traffic = {one["what"]: one for one in json.loads(out)["traffic"]}
    assert traffic["keys"]["ranks"] == 8
    assert traffic["weights"]["ranks"] == 4
    assert traffic["gradients"]["gigabytes"] < 0.1 * traffic["weights"]["gigabytes"]  # of adapters alone, in fp32
