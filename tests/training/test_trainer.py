"""The loop: order of the data, joint gradients, continuation bit for bit, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch

from cosup_fast.data.packing import make_batch
from cosup_fast.data.template import IGNORE
from cosup_fast.training.checkpoint import CheckpointError, checkpoints, verify
from cosup_fast.training.trainer import HeldOut, StepMetrics, Trainer, TrainingConfig, TrainingError

VARIANTS = {
    "pair": {},
    "shared": {"shared": True},
    "frozen": {"freeze_embseq": True},
    "learnt temperature": {"nsp": {"learnable_temperature": True}},
}


@pytest.fixture
def make_trainer(make_model, examples, corpus, tmp_path):
    def make(model=None, output=tmp_path, seen=None, chosen=examples, **fields):
        config = TrainingConfig(**{"batch_size": 2, "lr": 1e-2, "epochs": 100, "eval_every": None, **fields})
        record = (lambda metrics: None) if seen is None else seen.append
        return Trainer(model or make_model(), config, chosen, corpus, output, on_metrics=record)

    return make


def _losses(seen):
    return [(m.step, m.loss, m.ntp, m.nsp, m.gen_grad_norm, m.embseq_grad_norm) for m in seen]


def test_every_epoch_is_a_permutation_and_they_differ(make_trainer, examples):
    trainer = make_trainer(chosen=list(examples) * 5, batch_size=3)
    assert trainer.steps_per_epoch == 7
    epochs = [[e.id for step in range(7 * k, 7 * k + 7) for e in trainer.batch_examples(step)] for k in range(3)]
    for order in epochs:
        assert sorted(order) == sorted(e.id for e in list(examples) * 5)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [e.id for e in trainer.batch_examples(9)] == [e.id for e in trainer.batch_examples(9)]


def test_training_lowers_both_losses_and_learns_to_retrieve_in_the_batch(make_trainer):
    seen: list[StepMetrics] = []
    make_trainer(seen=seen, steps=40, batch_size=4, schedule="linear").train()
    first, last = seen[0], seen[-1]
    assert last.ntp < 0.5 * first.ntp
    assert last.nsp < 0.5 * first.nsp
    assert last.in_batch_accuracy == 1.0
    assert [m.step for m in seen] == list(range(1, 41))


def test_the_gradient_of_a_step_is_that_of_its_mean_losses(make_model, make_trainer, examples, corpus):
    """Two unequal micro-batches: sums over each, divided by the counts of the step."""
    model, expected = make_model(dtype="float64"), make_model(dtype="float64")
    trainer = make_trainer(model, batch_size=3, accumulate=2, clip=None, lr=1e-9)
    chosen = trainer.batch_examples(0)
    assert len(chosen) == 4
    batches = [make_batch(part, corpus, model.template) for part in (chosen[:3], chosen[3:])]
    supervised = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    queries = sum(len(batch.query_rows) for batch in batches)
    loss = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        hidden = expected.hidden_states(batch.gen)
        logits = hidden @ expected.gen.lm_head.weight.T
        loss += torch.nn.functional.cross_entropy(logits, batch.labels, reduction="sum") / supervised
        scores = expected.queries(hidden, batch.query_rows) @ expected.embed(batch.passages).T / 0.05
        nsp = torch.nn.functional.cross_entropy(scores, batch.positive, reduction="sum") / queries
        loss += expected.nsp.weight * nsp
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    metrics = trainer._step()
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
    for name, p in expected.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(gradients[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)


def test_clipping_covers_both_models(make_trainer):
    trainer = make_trainer(lr=1e-9)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    gen, embseq = trainer._clip()
    gradients = [p.grad for p in trainer.model.parameters()]
    assert gen > 1
    assert embseq > 1
    assert math.sqrt(sum(float(g.pow(2).sum()) for g in gradients)) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_gives_the_same_bits(variant, make_model, make_trainer, tmp_path):
    from cosup_fast.modeling import CoSupervisionModel

    whole: list[StepMetrics] = []
    make_trainer(make_model(**VARIANTS[variant]), tmp_path / "whole", whole, steps=6, schedule="cosine").train()
    trainer = make_trainer(make_model(**VARIANTS[variant]), tmp_path / "parts", steps=6, schedule="cosine")
    for _ in range(3):
        trainer._step()
    saved = trainer.save()
    torch.manual_seed(1234)  # the generator's state comes from the checkpoint
    rest: list[StepMetrics] = []
    resumed = make_trainer(CoSupervisionModel.load(saved), tmp_path / "parts", rest, steps=6, schedule="cosine")
    resumed.resume(saved)
    resumed.train()
    assert _losses(rest) == _losses(whole)[3:]
    uninterrupted = CoSupervisionModel.load(checkpoints(tmp_path / "whole" / "checkpoints")[-1])
    for (name, a), b in zip(uninterrupted.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_activation_checkpointing_changes_no_gradient(make_trainer, tmp_path):
    runs = []
    for on in (False, True):
        seen: list[StepMetrics] = []
        make_trainer(output=tmp_path / str(on), seen=seen, steps=3, activation_checkpointing=on).train()
        runs.append(_losses(seen))
    for kept, recomputed in zip(*runs, strict=True):
        assert kept == pytest.approx(recomputed, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_names_and_leaves_the_weights(make_trainer, examples):
    trainer = make_trainer(checkpoint_every=1, steps=3)
    trainer._step()
    good = trainer.save()
    with torch.no_grad():
        trainer.model.gen.lm_head.weight[5] = math.nan
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainingError, match=r"step 2: loss nan") as error:
        trainer._step()
    assert str(good) in str(error.value)
    assert any(example.id in str(error.value) for example in examples)
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p, q) or q.isnan().any()


def test_evaluations_come_first_last_and_between_and_warnings_arrive(make_model, examples, corpus, tmp_path):
    steps, seen, warnings = [], [], []

    def evaluate(model, step):
        torch.rand(3)  # must not disturb the run's random numbers
        steps.append(step)
        return HeldOut(step, 1.0 + step, 1.0, 0.0, 0.0, 0.0)

    config = TrainingConfig(batch_size=2, steps=5, eval_every=2, lr=1e-3)
    Trainer(
        make_model(), config, examples * 3, corpus, tmp_path,
        evaluate=evaluate, on_metrics=seen.append, on_warning=warnings.append,
    ).train()  # fmt: skip
    assert steps == [0, 2, 4, 5]
    assert [m.step for m in seen if isinstance(m, HeldOut)] == steps
    assert any("held-out NTP loss has risen" in w for w in warnings)


def test_only_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    make_trainer(steps=5, checkpoint_every=1, keep_checkpoints=2).train()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000004", "step-000005"]


def test_a_damaged_checkpoint_is_refused(make_trainer):
    saved = make_trainer(steps=1).train()
    verify(saved)
    weights = saved / "gen" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors has \d+ bytes, its manifest says"):
        verify(saved)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"model.safetensors was altered"):
        verify(saved)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        verify(saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        verify(saved)


def test_no_examples(make_trainer):
    with pytest.raises(ValueError, match=r"data\.train"):
        make_trainer(chosen=[])
