"""What travels between GPUs: by hand on a small step, its limits, and the arithmetic beside published figures."""

from __future__ import annotations

import json

import pytest

from cosup_fast.config import load_config
from cosup_fast.plan.request import PlanRequest
from cosup_fast.plan.scaling import Cluster, keys_for_memory, keys_for_share, keys_of_step, step_traffic
from cosup_fast.plan.time import count_weights, estimate_step

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


def tiny(**fields) -> PlanRequest:
    return PlanRequest(**{"gen": TINY, "embseq": TINY, "gpus": 16, **fields})


def by_name(request: PlanRequest, cluster: Cluster | None = None) -> dict[str, tuple[float, float, int]]:
    return {
        one.what: (one.gigabytes * 1e9, one.seconds, one.ranks) for one in step_traffic(request, cluster or Cluster())
    }


def test_traffic_of_full_sharding_by_hand():
    weights = 2 * count_weights(TINY)  # both models
    found = by_name(tiny(gen_packs=3, embseq_packs=3), Cluster(8, node_gb_s=100, network_gb_s=10))
    assert found["weights"][0] == pytest.approx(15 / 16 * 2 * weights * 8)  # 3 + 2 forwards and 3 backwards
    assert found["gradients"][0] == pytest.approx(15 / 16 * 4 * weights * 3)
    keys = 16 * 3 * 16 * 64  # GPUs, packs, passages of a pack, width
    assert found["keys"][0] == pytest.approx(15 / 16 * 2 * keys)
    assert found["gradients of keys"][0] == pytest.approx(15 / 16 * 4 * keys)
    assert "gradients of replicas" not in found
    # A node of eight receives half of everything over eight links.
    assert found["weights"][1] == pytest.approx(2 * weights * 8 * max(15 / 16 / 100e9, 1 / 2 / (8 * 10e9)))


def test_replicas_keep_weights_within_their_node():
    weights = 2 * count_weights(TINY)
    found = by_name(tiny(replicas=2), Cluster(8, node_gb_s=100, network_gb_s=10))
    assert found["weights"][0] == pytest.approx(7 / 8 * 2 * weights * 2)
    assert found["weights"][1] == pytest.approx(7 / 8 * 2 * weights * 2 / 100e9)
    sent, seconds, ranks = found["gradients of replicas"]
    assert ranks == 2
    assert sent == pytest.approx(2 * 1 / 2 * 4 * weights / 8)
    assert seconds == pytest.approx(sent / 10e9)  # each over a link of its own
    assert found["keys"] == by_name(tiny(), Cluster(8, 100, 10))["keys"]


def test_adapters_are_refused_and_links_need_nodes(cosup):
    with pytest.raises(ValueError, match="not modelled for adapters"):
        step_traffic(tiny(gen_lora={"rank": 8}), Cluster())
    status, _, err = cosup("plan", "--preset", "llama2-7b-8x80g", "--network", "50")
    assert status == 1
    assert "--network is the speed of links of a cluster: name its size with --nodes" in err


def test_what_is_not_trained_or_not_asked_for_does_not_travel():
    whole, frozen = by_name(tiny()), by_name(tiny(freeze_embseq=True))
    assert frozen["gradients"][0] == pytest.approx(whole["gradients"][0] / 2)
    assert frozen["weights"][0] == pytest.approx(whole["weights"][0] * 3 / 4)
    assert set(by_name(tiny(nsp_weight=0.0))) == {"weights", "gradients"}
    ddp = by_name(tiny(sharding="ddp"))
    assert set(ddp) == {"gradients", "keys", "gradients of keys"}
    assert ddp["gradients"][0] == pytest.approx(2 * 15 / 16 * 4 * 2 * count_weights(TINY))
    assert by_name(tiny(gpus=1)) == {}


def test_thresholds_are_where_they_say():
    request = tiny()
    there = keys_for_share(request, 0.1)
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


def test_bytes_of_a_loss_beside_cut_cross_entropy():
    """arXiv 2411.09009, abstract: Gemma 2 (2B), 8,192 tokens: 24 GB of loss, and 1 GB of gradients at the least."""
    tokens, vocabulary, width = 8192, 256000, 2304
    assert 3 * 4 * tokens * vocabulary / 2**20 == 24000  # the logits in fp32, three times
    assert 2 * (tokens + vocabulary) * width / 2**30 == pytest.approx(1.13, abs=0.01)


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
    status, out, _ = cosup(*words, "--json")
    traffic = {one["what"]: one for one in json.loads(out)["traffic"]}
    assert traffic["keys"]["ranks"] == 8
    assert traffic["weights"]["ranks"] == 4
