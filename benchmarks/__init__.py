"""What the losses cost, beside other libraries on the same inputs. Run from a clone: python -m benchmarks --help.

cases.py        the losses, shapes, dtypes and inputs
providers/      one adapter a file: ours and the peers
check.py        is it the same function? against fp64, before any timing
timing.py       how fast? interleaved rounds beside bare matrix products and a memory copy
counting.py     what does it cost exactly? products, FLOPs, bytes, workspace; Triton kernels in the interpreter
binaries.py     what are the kernels made of? peers' kernels compiled for a GPU that is not there
peak.py         how much memory? resident set in a subprocess, or the allocator of a GPU
host.py         what does a tiny loss cost beside its arithmetic?
train_step.py   how fast is a step of training beside the published one, in recipe.py?
gpu/            what is a GPU worth? everything above and more, within a budget, by one command
batch_memory.py how much memory does a step take, by the size of its batch?
gate.py         have the exact figures changed? against exact.json
report.py       tables and plots, in a folder that is there whole or not at all
overview.py     the plot in the README, from the tables of a folder
speed.py        the same as pytest-benchmark entry points

Beside them, run as a file: generation.py (the batched decoder beside plain_decoder.py), serving.py (the server beside
that decoder, asked by serving_clients.py), index_build.py (packs beside padded batches), index_size.py (time and memory
of an index of a given size), corpus_size.py (of a training corpus) and judges.py (how well judges of grounding separate
VitaminC's labels).
"""
