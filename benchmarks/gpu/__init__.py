"""A GPU's first quarter of an hour: everything worth knowing about it here, within a budget, by one command.

    python -m benchmarks gpu --minutes 12            resumes where an earlier run stopped
    python -m benchmarks gpu --rehearse              every size shrunk, on a CPU, in a minute

tasks.py     what is measured, most valuable first
session.py   the budget, a worker that may crash, one file a result
limits.py    what the GPU can do: copies, products, launches
losses.py    losses and peers beside the bare products
steps.py     training steps of two models with random weights
generate.py  generation with retrieval
page.py      the results as one page

It needs torch with CUDA, triton, transformers, pydantic, pytest and no network. Whatever else a task needs it imports
itself; if that is missing, the result says so.
"""
