"""Backbones over packs: rows after the final norm, packs against single sequences, and what attention is handed."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from transformers import AttentionInterface, AutoModel

from cosup_fast.config.model import ModelConfig
from cosup_fast.data.packing import Pack
from cosup_fast.model.attention import PACKED_SDPA, choose_attention
from cosup_fast.model.backbone import alone, check_packs, find_final_norm, norm_rows, positions, run_pack
from cosup_fast.model.loading import load_language_model

NORMS = {"llama": 0.0, "gemma3_text": 1.0, "qwen3": 0.0, "olmo2": 0.0, "phi": None, "gpt2": None, "cohere": None}
OPTIONS = {"gemma3_text": {"head_dim": 8}, "qwen3": {"head_dim": 8}}
SEQUENCES = [list(range(40, 52)), list(range(60, 72)), [80], list(range(90, 103)), list(range(20, 32))]


@pytest.fixture
def make_backbone(make_folder):
    def make(kind="llama", attention=PACKED_SDPA, dtype=torch.float64, **options):
        folder = make_folder(kind, **OPTIONS.get(kind, {}), **options)
        backbone = AutoModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
        with torch.no_grad():
            for p in backbone.parameters():
                if p.ndim == 1:  # a norm whose weight is 1 everywhere would hide where it is applied
                    p.add_(torch.linspace(-0.5, 0.5, len(p)).sin())
        return backbone

    return make


@pytest.mark.parametrize("kind", NORMS)
def test_rows_are_those_of_the_whole_pack(kind, make_backbone):
    backbone = make_backbone(kind)
    norm = find_final_norm(backbone)
    assert (None if norm is None else norm.offset) == NORMS[kind]
    before = backbone.state_dict().keys()
    pack, rows = Pack.of(SEQUENCES), torch.tensor([3, 30, 49, 24])
    ours = norm_rows(backbone, run_pack(backbone, pack, norm), rows, norm)
    expected = run_pack(backbone, pack)[rows]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    weights = list(backbone.parameters())
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    for a, b in zip(*(torch.autograd.grad(y, weights, upstream, allow_unused=True) for y in (ours, expected))):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-5 * b.abs().max() + 1e-12
    assert backbone.state_dict().keys() == before


def test_an_error_leaves_the_model_as_it_was(make_backbone):
    backbone = make_backbone()
    before = backbone.norm
    with pytest.raises(IndexError):
        run_pack(backbone, Pack.of([[10**6]]), find_final_norm(backbone))
    assert backbone.norm is before


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_pack_is_its_sequences_apart(kind, make_backbone):
    """Neighbours of equal length share a call, a filler stands behind, and nothing leaks from either."""
    backbone = make_backbone(kind)
    alone = torch.cat([run_pack(backbone, Pack.of([ids])) for ids in SEQUENCES])
    for pack in (Pack.of(SEQUENCES), Pack.of(SEQUENCES, 100)):
        torch.testing.assert_close(run_pack(backbone, pack)[:50], alone, rtol=1e-6, atol=1e-6)
    others = torch.cat([torch.arange(12), torch.arange(24, 50)])
    neighbours = (run_pack(backbone, Pack.of([SEQUENCES[0], [token] * 12, *SEQUENCES[2:]], 90)) for token in (7, 9))
    assert torch.equal(*(hidden[others] for hidden in neighbours))


WINDOW = {"sliding_window": 9}
SOFTCAP = {"head_dim": 8, "attn_logit_softcapping": 2.0, **WINDOW}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4,
    "original_max_position_embeddings": 43,
}  # fmt: skip
KINDS = {
    "llama": {},
    "llama, dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
    "phi3": {"rope_parameters": LONGROPE, "original_max_position_embeddings": 43},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, **WINDOW},
    "qwen3": {"head_dim": 8},
    "gemma2": SOFTCAP,
    "gemma3_text": {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], **WINDOW},
    "mistral": WINDOW,
    "cohere2": WINDOW,
    "gpt_neox": {},
    "gpt2": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_is_what_eager_attention_makes_of_its_sequences(kind, make_folder):
    """Values and gradients: soft caps, windows shorter than a sequence, rotary frequencies that depend on length."""
    name = kind.partition(",")[0]
    folder = make_folder(name, **{"max_position_embeddings": 64, **KINDS[kind]})
    backbone = load_language_model(folder, ModelConfig(gen=folder, dtype="float64"), torch.device("cpu"), head=False)
    check_packs(backbone, kind, torch.device("cpu"))
    longest = positions(backbone.config)
    assert longest == (43 if kind == "phi3" else 64)
    sequences = [*SEQUENCES, [(7 * n) % 250 + 2 for n in range(longest)], SEQUENCES[0]]
    ours = run_pack(backbone, Pack.of(sequences))
    expected = torch.cat([alone(backbone, torch.tensor([ids]))[0] for ids in sequences])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    weights = list(backbone.parameters())
    upstream = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).sin().view_as(ours)
    for a, b in zip(*(torch.autograd.grad(y, weights, upstream, allow_unused=True) for y in (ours, expected))):
        assert a is None or (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9
    with torch.no_grad():  # what transformers does with it outside of packs
        whole = torch.tensor(sequences[:2])
        torch.testing.assert_close(
            backbone(input_ids=whole).last_hidden_state, alone(backbone, whole), rtol=1e-5, atol=1e-5
        )


def test_frequencies_that_depend_on_length_would_couple_neighbours(make_folder, make_model):
    """Why `positions` stops at the length of pretraining: beyond it a neighbour changes a sequence."""
    folder = make_folder("phi3", max_position_embeddings=64, **KINDS["phi3"])
    backbone = load_language_model(folder, ModelConfig(gen=folder, dtype="float64"), torch.device("cpu"), head=False)
    with torch.no_grad():
        short, long = (run_pack(backbone, Pack.of([SEQUENCES[0], [5] * n]))[:12] for n in (43, 44))
    assert (short - long).abs().max() > 1e-3
    template = make_model(gen=folder, shared=True).template
    assert (template.max_length, template.embseq_max_length) == (43, 43)


@pytest.fixture
def varlen(monkeypatch):
    """FlashAttention's varlen interface, computed from `cu_seqlens` alone by torch; returns what it was called with."""
    calls = []

    def attend(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k,
               scaling=None, dropout=0.0, **kwargs):  # fmt: skip
        calls.append((cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k))
        assert attention_mask is None
        assert kwargs.get("sequence_lengths") is None
        assert max_length_q == max(b - a for a, b in pairwise(cu_seq_lens_q.tolist()))
        bounds = pairwise(cu_seq_lens_q.tolist())
        pieces = [
            torch.nn.functional.scaled_dot_product_attention(
                *(x[:, :, a:b] for x in (query, key, value)), is_causal=True, scale=scaling, enable_gqa=True
            )
            for a, b in bounds
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", attend)
    return calls


@torch.no_grad()
def test_flash_attention_is_handed_the_boundaries_of_the_pack(make_backbone, varlen):
    backbone = make_backbone()
    expected = run_pack(backbone, Pack.of(SEQUENCES))
    backbone.config._attn_implementation = "flash_attention_2"
    for pack in (Pack.of(SEQUENCES), Pack.of(SEQUENCES, 70)):
        torch.testing.assert_close(run_pack(backbone, pack)[:50], expected, rtol=1e-6, atol=1e-6)
        for q, k, longest_q, longest_k in varlen:
            assert q.dtype == torch.int32
            assert torch.equal(q, k)
            assert torch.equal(q, pack.cu_seqlens)
            assert longest_q == longest_k == 13
        assert len(varlen) == 2  # layers
        varlen.clear()


@pytest.mark.gpu
def test_flash_attention_agrees_with_sdpa(make_backbone):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    if not torch.cuda.is_available():
        pytest.skip("flash-attn needs a CUDA device")
    pack = Pack.of(SEQUENCES, 70).to(torch.device("cuda"))
    results = []
    for attention in (PACKED_SDPA, "flash_attention_2"):
        backbone = make_backbone(attention=attention, dtype=torch.bfloat16).cuda()
        results.append(run_pack(backbone, pack)[:50].float())
    assert (results[0] - results[1]).norm() < 2e-2 * results[0].norm()


def test_flash_attention_is_never_fetched():
    try:
        import flash_attn  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"needs the package flash-attn, which is not installed: pip install"):
            choose_attention("flash_attention_2", torch.device("cuda"))
