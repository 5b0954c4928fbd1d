"""What a program hears of a run: callbacks, trackers, lines and time left; the model FLOP that a share is taken of."""

from __future__ import annotations

import importlib.util
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from cosup_fast.config import dump_config, load_config
from cosup_fast.data.packing import make_batch
from cosup_fast.training import log, trackers
from cosup_fast.training.callbacks import Callback
from cosup_fast.training.checkpoint import is_checkpoint
from cosup_fast.training.log import RunLog, read_metrics
from cosup_fast.training.metrics import StepMetrics
from cosup_fast.training.run import unused_gpus
from cosup_fast.training.step import accumulate_gradients
from cosup_fast.training.utilization import Utilization, known_peak, peak_tflops
from tests.training.runs import records, steps_of, train


@pytest.fixture
def configure(configure, data_folder):
    """The same, with held-out evaluations and checkpoints on the way."""
    held_out = {"data.dev": [str(data_folder / "examples.jsonl")], "data.allow_leaks": True}
    return partial(configure, **held_out, **{"training.eval_every": 2, "training.checkpoint_every": 2})


class Heard(Callback):
    """Writes down what it hears."""

    def __init__(self):
        self.calls = []

    def check(self, config, batches, ranks, device):
        self.calls.append(("check", len(batches), ranks, device.type))
        return "looks fine"

    def start(self, config, step, total):
        self.calls.append(("start", step, total))

    def metrics(self, metrics):
        self.calls.append((type(metrics).__name__, metrics.step))

    def evaluated(self, model, step):
        assert model.has_embseq
        self.calls.append(("evaluated", step))

    def saved(self, checkpoint):
        assert is_checkpoint(checkpoint)
        self.calls.append(("saved", checkpoint.name))

    def end(self, error):
        self.calls.append(("end", type(error).__name__))
        return True  # which would suppress an error, were it an __exit__


def test_callbacks_hear_of_the_whole_run_in_order(configure):
    heard = Heard()
    _, printed = train(configure(), heard)
    assert "looks fine" in printed
    kinds = [call[0] for call in heard.calls]
    assert heard.calls[:2] == [("check", 2, 1, "cpu"), ("start", 0, 4)]
    assert [call for call in heard.calls if call[0] == "StepMetrics"] == [
        ("StepMetrics", step) for step in (1, 2, 3, 4)
    ]
    assert [call[1] for call in heard.calls if call[0] == "evaluated"] == [0, 2, 4]
    assert [call[1] for call in heard.calls if call[0] == "HeldOut"] == [0, 2, 4]
    assert [call[1] for call in heard.calls if call[0] == "saved"] == ["step-000002", "step-000004"]
    assert heard.calls[-1] == ("end", "NoneType")
    assert kinds.count("end") == 1
    again = Heard()
    train(configure(training__steps=6), again, resume=True)
    assert again.calls[0] == ("start", 4, 6)


def test_what_a_callback_raises_ends_the_run_and_all_that_started_hear_of_it(configure):
    class Raises(Callback):
        def metrics(self, metrics):
            if isinstance(metrics, StepMetrics) and metrics.step == 3:
                raise RuntimeError("mine")

    class NeverStarts(Callback):
        def start(self, config, step, total):
            raise OSError("no disk")

    before, after = Heard(), Heard()
    with pytest.raises(RuntimeError, match="mine"):
        train(configure(), before, Raises())
    assert before.calls[-1] == ("end", "RuntimeError")
    assert steps_of(configure().output) == [1, 2, 3]
    train(configure(), resume=True)
    with pytest.raises(OSError, match="no disk"):
        train(configure(output=configure().output + "-2"), before, NeverStarts(), after)
    assert before.calls[-1] == ("end", "OSError")
    assert [call[0] for call in after.calls] == ["check"]


STEP = StepMetrics(1, 0.1, 3.0, 2.0, 1.0, 0.5, 1.5, 4, 1.0, 1.0, 3e-4, 1.0, 1000.0, 1.0, 2.0, mfu=0.25)


def test_a_line_has_what_is_known_and_the_time_that_is_left(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    console = Console(file=io.StringIO(), width=200)
    told = RunLog(tmp_path, console)
    told.start(load_config(None, []), 5, 105)
    for step in (6, 7, 15, 16, 17):
        clock[0] = 100 + 30 * (step - 5)
        told.metrics(StepMetrics(**{**vars(STEP), "step": step, "mfu": None if step == 16 else 0.25}))
    told.end(None)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith("step")]
    assert [int(line.split()[1]) for line in lines] == [6, 15, 17]  # a minute, or ten steps
    assert (
        "step 6 of 105  NTP 2.000  NSP 1.000  in-batch 50%  lr 3.00e-04  MFU 25.0%  0:49:30 left  1000 tokens/s"
        in lines[0]
    )
    assert "0:44:00 left" in lines[2]


def test_max_minutes_bound_the_time_that_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(log.time, "monotonic", lambda: clock)
    clock = 0.0
    told = RunLog(tmp_path, Console(file=io.StringIO(), width=200))
    told.start(load_config(None, ["training.max_minutes=2"]), 0, 1000)
    assert told.seconds_left(0, 0.0) is None
    assert told.seconds_left(1, 20.0) == 100.0
    assert told.seconds_left(1, 130.0) == 0.0
    told.end(None)


def test_torchrun_is_hinted_at_where_gpus_are_left_unused():
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert "torchrun --nproc-per-node 8 -m cosup_fast train" in unused_gpus(cuda, "auto", 8, None)
    for device, requested, visible, peers in [
        (cuda, "auto", 1, None), (cuda, "cuda:1", 8, None), (cpu, "cpu", 8, None), (cuda, "auto", 8, object()),
    ]:  # fmt: skip
        assert unused_gpus(device, requested, visible, peers) == ""


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(configure, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ImportError, match=r"training\.report_to=wandb needs .*: pip install 'cosup-fast\[wandb\]'"):
        train(configure(training__report_to=["tensorboard", "wandb"]))
    assert not Path(configure().output).exists()


def test_no_tracker_is_needed(configure):
    train(configure(training__report_to=[]))
    assert not (Path(configure().output) / "tensorboard").exists()
    assert read_metrics(Path(configure().output) / "metrics.jsonl")


def test_tensorboard_has_every_figure(configure):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(configure())
    train(configure(training__steps=6), resume=True)
    found = EventAccumulator(str(Path(configure().output) / "tensorboard")).Reload()
    recorded = read_metrics(Path(configure().output) / "metrics.jsonl")
    for name, kind in (("step/ntp", "step"), ("held-out/recall_at_5", "held-out")):
        expected = [(r["step"], r[name.partition("/")[2]]) for r in recorded if r["kind"] == kind]
        assert [(e.step, e.value) for e in found.Scalars(name)] == [(s, pytest.approx(v)) for s, v in expected]


def test_a_tracker_that_fails_is_warned_of_once_and_the_run_continues(configure, monkeypatch):
    def lost(self, figures, step):
        raise ConnectionError("server lost")

    monkeypatch.setattr(trackers.TensorBoard, "send", lost)
    _, printed = train(configure())
    assert printed.count("tensorboard: figures are not all recorded, but metrics.jsonl has them: server lost") == 1
    assert steps_of(configure().output) == [1, 2, 3, 4]


def test_every_tracker_has_its_own_run_again(configure):
    class Numbered(trackers.Tracker):
        extra = "train"

        def __init__(self, name):
            super().__init__(pytest.fail)
            self.name, self.opened = name, []

        def open(self, output, config, step, run):
            self.opened.append(run)
            return run or f"{self.name}-1"

        def send(self, figures, step):
            pass

        def close(self, error):
            pass

    config, several = configure(), [Numbered("one"), Numbered("other")]
    Path(config.output).mkdir()
    for _ in range(2):
        for tracker in several:
            tracker.start(config, 0, 4)
    assert [tracker.opened for tracker in several] == [[None, "one-1"], [None, "other-1"]]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_has_every_figure_in_one_run_of_its_own(configure, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "tests")
    from mlflow import MlflowClient

    config = configure(training__report_to=["mlflow"])
    train(config)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["training.lr"] == "0.01"
    train(configure(training__report_to=["mlflow"], training__steps=6), resume=True)
    (again,) = client.search_runs([experiment.experiment_id])
    assert again.info.run_id == run.info.run_id
    recorded = records(config.output)
    found = client.get_metric_history(run.info.run_id, "step/ntp")
    assert [(m.step, m.value) for m in found] == [(r["step"], r["ntp"]) for r in recorded]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(ValueError, match=r"training\.report_to=mlflow cannot be opened: "):
        train(configure(training__report_to=["mlflow"], output=config.output + "-2"))


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_records_offline_and_resumes_its_run(configure, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = configure(training__report_to=["wandb"])
    train(config)
    train(configure(training__report_to=["wandb"], training__steps=6), resume=True)
    output = Path(config.output)
    run = json.loads((output / "trackers.json").read_text())["wandb"]
    parts = sorted(output.glob(f"wandb/offline-run-*-{run}"))
    assert len(parts) == 2
    sent = b"".join(_payload(part / f"run-{run}.wandb") for part in parts)
    recorded = records(output)
    assert len(recorded) == 6
    for record in recorded:
        assert re.search(rb"step/ntp.{1,4}" + re.escape(json.dumps(record["ntp"]).encode()), sent, re.DOTALL)


def _payload(path):
    """What is in a file of W&B's: after 7 bytes a LevelDB log, blocks of 32 KiB of pieces with headers of 7 bytes."""
    data, place, found = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if place % (1 << 15) + 7 >= 1 << 15:
            place += -place % (1 << 15)
            continue
        length = int.from_bytes(data[place + 4 : place + 6], "little")
        found += data[place + 7 : place + 7 + length]
        place += 7 + length
    return found


def test_peaks_are_those_of_data_sheets_or_given():
    assert known_peak("NVIDIA A100-SXM4-80GB") == 312.0
    assert known_peak("NVIDIA H100 80GB HBM3") == known_peak("NVIDIA H200") == 989.5
    assert known_peak("NVIDIA H100 PCIe") == 756.5
    assert (known_peak("NVIDIA L4"), known_peak("NVIDIA L40S")) == (121.0, 362.0)
    assert known_peak("NVIDIA A10G") is known_peak("Tesla V100-SXM2-16GB") is None
    assert peak_tflops(None, torch.device("cpu"), half=True) is None
    assert peak_tflops(None, torch.device("cuda"), half=False) is None
    assert peak_tflops(0.5, torch.device("cpu"), half=False) == 0.5


@pytest.mark.parametrize("options", [{}, {"freeze_embseq": True}, {"nsp": {"weight": 0.0}}, {"gen": "gpt2"}], ids=str)
def test_model_flop_are_those_of_the_products_that_run(make_model, examples, corpus, options):
    """Against torch's counter over a step of one pack, without attention, whose products may be padded."""
    model = make_model(**options)
    batch = make_batch(examples[:1], corpus, model.template, retrieval=model.has_embseq)
    counter = Utilization(model, None)
    counted = FlopCounterMode(display=False)
    with counted:
        accumulate_gradients(model, batch)
    products = sum(
        n
        for op, n in counted.get_flop_counts()["Global"].items()
        if "attention" not in str(op) and "bmm" not in str(op)
    )
    parts = [counter.gen] + ([counter.embseq] if counter.embseq else [])
    for part in parts:
        part.attention = 0
    assert counter.flop(batch) == pytest.approx(products, rel=0.02)


def test_the_share_is_told_where_the_peak_is(configure):
    train(configure(training__peak_tflops=0.01))
    recorded = records(configure().output)
    assert all(0 < r["mfu"] < 1 for r in recorded)
    train(configure(output=configure().output + "-2"))
    recorded = records(configure().output + "-2")
    assert {r["mfu"] for r in recorded} == {None}


def test_the_callback_of_the_docs_runs(configure, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    block = page.partition("## Callbacks")[2].partition("```python\n")[2].partition("```")[0]
    (tmp_path / "run.yaml").write_text(dump_config(configure()))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/training.md", "exec"), {"__name__": "docs"})
    assert re.fullmatch(r"(step [024]: R@5 \d+\.\d%\n){3}", capsys.readouterr().out)
