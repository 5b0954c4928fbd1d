"""Four ranks as two replicas of two shards: prints how far each rank's gradients are from those of one process.

A program of its own, as its ranks are forks that share the memory of torch and of the model.
"""

from __future__ import annotations

import datetime
import os
import sys
import traceback
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig, LlamaForCausalLM

from cosup_fast.training.sharding import shard

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def loss(gen: Any, tokens: Tensor) -> Tensor:
    """Reads every weight, the head's too."""
    return gen.model(tokens, use_cache=False).last_hidden_state.pow(3).sum() + gen.lm_head.weight.pow(2).sum()


def rank(number: int, store: str, gen: Any, tokens: Tensor, expected: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, relative to its largest element."""
    patience = datetime.timedelta(seconds=500)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=4, timeout=patience)
    ranks = torch.arange(4).view(2, 2)
    row, column = divmod(number, 2)
    mine = [dist.new_group(some.tolist(), use_local_synchronization=True) for some in (ranks[:, column], ranks[row])]
    mesh = DeviceMesh.from_group(mine, "cpu", mesh=ranks, mesh_dim_names=("replicas", "shards"))
    if number:
        gen = gen.to("meta")  # the first rank alone has weights
    model: Any = types.SimpleNamespace(gen=gen, embseq=None, projection=None, criterion=None, sharded=False)
    shard(model, mesh, precision="float32")
    gen.run_inside(lambda: loss(gen, tokens[number])).backward()
    differences = []
    for name, p in gen.named_parameters():
        assert p.to_local().numel() < p.numel(), f"{name} is whole on a rank"
        differences.append((p.grad.full_tensor() - expected[name]).abs().max() / expected[name].abs().max())
    return float(max(differences))


def main(store: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    gen = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, vocab_size=32)).double()
    tokens = torch.arange(4 * 6).view(4, 1, 6)
    torch.stack([loss(gen, x) for x in tokens]).sum().backward()
    expected = {name: p.grad.clone() for name, p in gen.named_parameters() if p.grad is not None}
    gen.zero_grad()
    children = []
    for number in range(4):
        if (child := os.fork()) == 0:
            status = 1
            try:
                difference = rank(number, store, gen, tokens, expected)
                Path(f"{store}.{number}").write_text(str(difference))
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    sys.exit(max(os.waitpid(child, 0)[1] for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
