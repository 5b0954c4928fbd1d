"""The loop: order of the data, joint gradients, continuation bit for bit, and what stops it."""

from __future__ import annotations

import math

import pytest
import torch

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Segment
from cosup_fast.model import CoSupervisionModel
from cosup_fast.training.checkpoint import CheckpointError, checkpoints, verify
from cosup_fast.training.clipping import clip_gradients
from cosup_fast.training.diagnostics import Diagnosis
from cosup_fast.training.metrics import HeldOut, StepMetrics, as_record
from cosup_fast.training.step import accumulate_gradients
from cosup_fast.training.trainer import TrainingError

VARIANTS = {
    "pair": {},
    "shared": {"shared": True},
    "frozen": {"freeze_embseq": True},
    "learnt temperature": {"nsp": {"learnable_temperature": True}},
}


def _losses(seen):
    return [(m.step, m.loss, m.ntp, m.nsp, m.gen_grad_norm, m.embseq_grad_norm) for m in seen]


@pytest.mark.parametrize(("steps", "total"), [(1000, 1000), (4, 4), (None, 6)])
def test_steps_win_over_epochs(make_trainer, steps, total):
    assert make_trainer(steps=steps, epochs=3).total_steps == total


def test_the_time_limit_stops_with_a_checkpoint(make_trainer, tmp_path):
    evaluated = []

    def evaluate(model, step):
        evaluated.append(step)
        return HeldOut(step, 1.0, 1.0, 0.0, 0.0, 0.0)

    trainer = make_trainer(callbacks={"evaluate": evaluate}, steps=5, max_minutes=1e-9, eval_every=1)
    assert trainer.train() == tmp_path / "checkpoints" / "step-000000"
    assert evaluated == [0]
    assert make_trainer(output=tmp_path / "b", steps=2, max_minutes=10).train().name == "step-000002"


def test_training_lowers_both_losses_and_learns_to_retrieve_in_the_batch(make_trainer):
    seen: list[StepMetrics] = []
    make_trainer(seen=seen, steps=40, batch_size=4, schedule="linear").train()
    first, last = seen[0], seen[-1]
    assert last.ntp < 0.5 * first.ntp
    assert last.nsp < 0.5 * first.nsp
    assert last.in_batch_accuracy == 1.0
    assert [m.step for m in seen] == list(range(1, 41))


def test_on_a_cpu_freed_memory_goes_back_every_ten_steps(make_trainer, monkeypatch):
    trainer, given_back = make_trainer(steps=21, batch_size=2), []
    monkeypatch.setattr(
        "cosup_fast.training.trainer.return_freed_memory", lambda: given_back.append(trainer.step), raising=True
    )
    trainer.train()
    assert given_back == [10, 20]


@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 1}, {"tokens_per_micro_batch": 250, "fixed_shapes": True}])
def test_the_gradient_of_a_step_is_that_of_its_mean_losses(cut, make_model, make_trainer, corpus):
    """However the step is cut: each query against every passage of the step."""
    model, expected = make_model(dtype="float64"), make_model(dtype="float64")
    trainer = make_trainer(model, batch_size=4, clip=None, lr=1e-9, **cut)
    hidden, labels, rows = [], [], []
    chosen = trainer.batch_examples(0)
    assert len(chosen) == 4
    sequences = [model.template.gen_sequence(example, corpus) for example in chosen]
    for s in sequences:
        hidden.append(expected.hidden_states(Pack.of([s.input_ids])))
        labels.append(torch.tensor(s.labels))
        rows.append(expected.queries(hidden[-1], torch.tensor(s.query_rows)))
    wanted = [name for s in sequences for name in s.query_passages]
    passages = sorted(set(wanted))
    keys = torch.cat([expected.embed(Pack.of([model.template.sequence(corpus[name])])) for name in passages])
    logits = torch.cat(hidden) @ expected.gen.lm_head.weight.T
    scores = torch.cat(rows) @ keys.T / 0.05
    loss = torch.nn.functional.cross_entropy(logits, torch.cat(labels))
    positive = torch.tensor([passages.index(name) for name in wanted])
    loss = loss + expected.nsp.weight * torch.nn.functional.cross_entropy(scores, positive)
    loss.backward()
    gradients = {}
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: gradients.__setitem__(name, p.grad.clone()))
    metrics = trainer.take_step()
    assert metrics.loss == pytest.approx(loss.item(), rel=1e-6)
    assert metrics.candidates == len(passages)
    for name, p in expected.named_parameters():
        if p.grad is not None:
            assert (gradients[name] - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name


@pytest.mark.parametrize("kind", ["projection", "shared"])
def test_clipping_covers_everything_and_norms_are_told_apart(kind, make_model, make_trainer, gpt2_folder):
    parts = {"embseq": gpt2_folder} if kind == "projection" else {"shared": True}
    trainer = make_trainer(make_model(nsp={"learnable_temperature": True}, **parts), lr=1e-9)
    model = trainer.model
    for p in model.parameters():
        p.grad = torch.ones_like(p)

    def size(*modules):
        return sum(p.numel() for module in modules if module is not None for p in module.parameters())

    norms = clip_gradients(model, trainer.config.clip)
    assert norms == pytest.approx(
        [math.sqrt(size(model.gen)), math.sqrt(size(model.embseq, model.projection)), math.sqrt(size(model))]
    )
    gradients = [p.grad for p in model.parameters()]
    assert math.sqrt(sum(float(g.pow(2).sum()) for g in gradients)) == pytest.approx(1.0, rel=1e-4)


def test_a_step_is_that_of_torchs_adamw_and_only_matrices_decay(make_model, make_trainer):
    """Two steps: the first one of Adam does not depend on beta."""
    model = make_model(dtype="float64", nsp={"learnable_temperature": True})
    fields = {"lr": 1e-2, "betas": (0.7, 0.8), "weight_decay": 0.5}
    trainer = make_trainer(model, clip=None, warmup=0.0, **fields)
    expected = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    assert {p.ndim for p in expected.values()} == {0, 1, 2}
    matrices, rest = ([p for p in expected.values() if (p.ndim == 2) == wanted] for wanted in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}], **fields, fused=False, foreach=False
    )
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: setattr(expected[name], "grad", p.grad.clone()))
    for _ in range(2):
        assert trainer.take_step().lr == fields["lr"]
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_precision_is_that_of_both_models_products(precision, make_trainer):
    trainer = make_trainer(precision=precision)
    seen = set()
    for model in (trainer.model.gen, trainer.model.embseq):
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
                module.register_forward_hook(lambda module, inputs, y: seen.add((y.dtype, module.weight.dtype)))
    trainer.take_step()
    assert seen == {(getattr(torch, precision), torch.float32)}


CUTS = {"pair": {"micro_batch_size": 1}, "shared": {"tokens_per_micro_batch": 250, "fixed_shapes": True}}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_gives_the_same_bits(variant, make_model, make_trainer, tmp_path):
    from cosup_fast.model import CoSupervisionModel

    fields = {"steps": 6, "schedule": "cosine", "weight_decay": 0.1, **CUTS.get(variant, {})}
    whole: list[StepMetrics] = []
    make_trainer(make_model(**VARIANTS[variant]), tmp_path / "whole", whole, **fields).train()
    trainer = make_trainer(make_model(**VARIANTS[variant]), tmp_path / "parts", **fields)
    for _ in range(3):
        trainer.take_step()
    saved = trainer.save()
    torch.manual_seed(1234)  # the generator's state comes from the checkpoint
    rest: list[StepMetrics] = []
    resumed = make_trainer(CoSupervisionModel.load(saved), tmp_path / "parts", rest, **fields)
    resumed.resume(saved)
    resumed.train()
    assert _losses(rest) == _losses(whole)[3:]
    uninterrupted = CoSupervisionModel.load(checkpoints(tmp_path / "whole" / "checkpoints")[-1])
    for (name, a), b in zip(uninterrupted.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing_changes_no_gradient(kind, make_trainer, tmp_path):
    runs = []
    for recompute in ("none", kind):
        seen: list[StepMetrics] = []
        make_trainer(output=tmp_path / recompute, seen=seen, steps=3, activation_checkpointing=recompute).train()
        runs.append(_losses(seen))
    for kept, recomputed in zip(*runs, strict=True):
        assert kept == pytest.approx(recomputed, rel=1e-5)


def test_a_loss_that_is_no_number_stops_with_names_and_leaves_the_weights(make_trainer, examples):
    trainer = make_trainer(checkpoint_every=1, steps=3)
    trainer.take_step()
    good = trainer.save()
    with torch.no_grad():
        trainer.model.gen.lm_head.weight[5] = math.nan
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(TrainingError, match=r"step 2: NTP loss nan") as error:
        trainer.take_step()
    assert str(good) in str(error.value)
    assert any(example.id in str(error.value) for example in examples)
    for p, q in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p, q) or q.isnan().any()


def test_of_the_examples_of_a_refused_step_one_whose_loss_is_no_number_is_the_worst(make_trainer, monkeypatch):
    losses = {"first": 2.0, "broken": math.nan, "last": 3.0}
    monkeypatch.setattr("cosup_fast.training.trainer.ntp_of_each", lambda *given: losses)
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.gen.lm_head.weight[5] = math.nan
    with pytest.raises(TrainingError, match=r"the highest NTP loss alone has broken \(nan\)"):
        trainer.take_step()


@pytest.mark.parametrize("share", [0.5, 1.001, 2.0])
def test_clipping_scales_both_models_by_the_norm_of_all_and_only_what_is_too_long(share, make_trainer):
    """The published code clips Gen alone; a step in which Embseq's gradient is the larger one shows it."""
    trainer = make_trainer()
    model = trainer.model
    accumulate_gradients(model, trainer.batch(0))
    for p in model.embseq.parameters():
        if p.grad is not None:
            p.grad *= 100
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    gen, embseq, total = clip_gradients(model, None)
    assert embseq > 10 * gen > 0.5
    assert total == pytest.approx(math.hypot(gen, embseq))
    clip_gradients(model, share * total)
    for name, p in model.named_parameters():
        if p.grad is not None and share > 1:
            assert torch.equal(p.grad, before[name]), name
        elif p.grad is not None:
            torch.testing.assert_close(p.grad, share * before[name], msg=name)


def test_a_diagnosis_comes_at_its_interval_and_changes_no_step(make_model, make_trainer, gpt2_folder, tmp_path):
    runs = []
    for every in (None, 2):
        seen = []
        model = make_model(embseq=gpt2_folder)  # GPT-2 has dropout
        make_trainer(model, tmp_path / str(every), seen, steps=5, diagnose_every=every).train()
        runs.append(_losses(m for m in seen if isinstance(m, StepMetrics)))
    assert runs[0] == runs[1]
    found = [m for m in seen if isinstance(m, Diagnosis)]
    assert [m.step for m in found] == [2, 4]


def test_the_gradient_of_a_step_is_the_sum_of_those_diagnosed(make_trainer):
    seen = []
    make_trainer(seen=seen, steps=2, diagnose_every=2).train()
    found = next(m for m in seen if isinstance(m, Diagnosis))
    a, b, cosine = found.ntp_grad_norm, found.nsp_grad_norm, found.grad_cosine
    step = next(m for m in seen if isinstance(m, StepMetrics) and m.step == 2)
    assert math.sqrt(a * a + b * b + 2 * a * b * cosine) == pytest.approx(step.gen_grad_norm, rel=1e-4)


def test_figures_of_a_step(make_trainer, corpus):
    trainer = make_trainer(batch_size=4, tokens_per_micro_batch=300, fixed_shapes=True, lr=1e-9)
    batch = trainer.batch(0)
    found = trainer.take_step()
    stats = trainer.model(batch).stats
    assert found.in_batch_rank == pytest.approx(float(stats.rank.double().mean()) + 1)
    assert found.in_batch_rank > 1
    assert found.useful_tokens == batch.tokens / (300 * len(batch.packs)) < 1
    assert make_trainer().take_step().useful_tokens == 1.0
    assert 0.1 < found.peak_memory_gib < 100


def test_evaluations_come_first_last_and_between_and_warnings_arrive(make_trainer, examples):
    steps, seen, warnings = [], [], []

    def evaluate(model, step):
        model.eval()
        steps.append(step)
        return HeldOut(step, 1.0 + step, 1.0, 0.0, 0.0, 0.0)

    def on_metrics(metrics):
        assert trainer.model.training
        seen.append(metrics)

    callbacks = {"evaluate": evaluate, "on_metrics": on_metrics, "on_warning": warnings.append}
    trainer = make_trainer(chosen=examples * 3, callbacks=callbacks, steps=5, eval_every=2)
    trainer.train()
    assert steps == [0, 2, 4, 5]
    assert [m.step for m in seen if isinstance(m, HeldOut)] == steps
    assert any("held-out NTP loss has risen" in w for w in warnings)


def test_evaluations_leave_the_random_numbers_of_dropout_alone(make_model, make_trainer, gpt2_folder, tmp_path):
    def evaluate(model, step):
        return HeldOut(step, float(torch.rand(())), 1.0, 0.0, 0.0, 0.0)

    runs = []
    for eval_every in (None, 1):
        seen = []
        callbacks = {"evaluate": evaluate, "on_metrics": seen.append}
        output = tmp_path / str(eval_every)
        make_trainer(make_model(embseq=gpt2_folder), output, None, steps=3, eval_every=eval_every,
                     callbacks=callbacks).train()  # fmt: skip
        runs.append(_losses(m for m in seen if isinstance(m, StepMetrics)))
    assert runs[0] == runs[1]


def test_a_replayed_history_warns_of_nothing_again_and_counts(make_trainer):
    warnings = []
    trainer = make_trainer(callbacks={"on_warning": warnings.append})
    held_out = [HeldOut(step, 1.0, 1.0, 0.1, 0.1, 0.1) for step in range(4)]
    trainer.replay(as_record(h) for h in held_out)  # flat R@5 was reported then
    assert [*trainer.monitor.evaluation(1.0, 0.1), *warnings] == []
    trainer = make_trainer(callbacks={"on_warning": warnings.append})
    trainer.replay(as_record(h) for h in held_out[:3])
    assert len([*trainer.monitor.evaluation(1.0, 0.1), *warnings]) == 1


def test_a_resumed_run_knows_what_every_step_has_shown(make_model, make_trainer, tmp_path):
    """Also those that were not logged, whatever the window is now; and it does not warn again."""
    options = {"steps": 10, "spike_window": 8, "spike_factor": 10.0, "log_every": 100}
    trainer = make_trainer(make_model(), tmp_path, None, **options)
    for _ in range(49):
        list(trainer.monitor.step(300.0, 4))
    assert len(list(trainer.monitor.evaluation(1.0, 0.1))) == 0
    saved = trainer.train()
    again = make_trainer(CoSupervisionModel.load(saved), tmp_path, None, **options)
    again.resume(saved)
    assert again.guard.state_dict() == trainer.guard.state_dict()
    assert len(again.guard.state_dict()["NTP"]) == 8
    assert again.monitor.state_dict() == trainer.monitor.state_dict()
    assert list(again.guard.refuse(1e4, 1e4)) == list(trainer.guard.refuse(1e4, 1e4)) != []
    assert again.monitor.state_dict()["warned"] == ["diverged"]
    assert list(again.monitor.step(300.0, 4)) == []
    narrow = make_trainer(CoSupervisionModel.load(saved), tmp_path, None, **options | {"spike_window": 4})
    narrow.resume(saved)
    assert narrow.guard.state_dict()["NTP"] == trainer.guard.state_dict()["NTP"][-4:]


def test_steps_that_retrieve_nothing_are_no_history_of_nsp(make_trainer, examples):
    """Their NSP of 0 is no loss, beside which the first real one would be a spike."""
    plain = [Example(id=f"plain-{i}", question="Who?", output=[Segment(text="I do not know.")]) for i in range(7)]
    trainer = make_trainer(chosen=[*plain, examples[0]], spike_window=8, spike_factor=None)
    steps = [trainer.take_step() for _ in range(4)]
    assert sorted(step.candidates > 0 for step in steps) == [False, False, False, True]
    history = trainer.guard.state_dict()
    assert history["NTP"] == [step.ntp for step in steps]
    assert history["NSP"] == [step.nsp for step in steps if step.candidates]


def test_only_the_newest_checkpoints_are_kept(make_trainer, tmp_path):
    make_trainer(steps=5, checkpoint_every=1, keep_checkpoints=2).train()
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-000004", "step-000005"]


def test_a_damaged_manifest_is_refused(make_trainer):
    saved = make_trainer(steps=1).train()
    verify(saved)
    (saved / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged.*remove this checkpoint"):
        verify(saved)


def test_no_examples(make_trainer):
    with pytest.raises(ValueError, match=r"data\.train"):
        make_trainer(chosen=[])


def test_an_example_longer_than_a_micro_batch_is_refused_before_training(make_trainer):
    make_trainer(tokens_per_micro_batch=239)
    with pytest.raises(ValueError, match=r"example 'e2' has 239 tokens, more than the 238 of a micro-batch: raise"):
        make_trainer(tokens_per_micro_batch=238)
