"""One configuration: what is read, what is overridden, and how mistakes are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cosup_fast.config import ConfigError, RunConfig, dump_config, field_names, load_config


def test_every_field_can_be_overridden_on_the_command_line():
    names = list(field_names())
    assert {"output", "model.gen", "training.lr", "nsp.temperature", "data.train", "text.prompt"} <= set(names)
    defaults = RunConfig().model_dump(mode="json")
    for name in names:
        value = defaults
        for key in name.split("."):
            value = value[key]
        assert load_config(None, [f"{name}={json.dumps(value)}"]) == RunConfig(), name


def test_a_dumped_configuration_reads_back_equal(tmp_path):
    config = load_config(None, ["training.lr=3e-4", "data.train=[a.jsonl, b.jsonl]", "text.prompt='{question}?'"])
    assert config.training.lr == 3e-4
    assert config.data.train == ["a.jsonl", "b.jsonl"]
    (tmp_path / "c.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "c.yaml") == config


def test_overrides_win_over_the_file(tmp_path):
    (tmp_path / "c.yaml").write_text("training: {lr: 1.0e-3, steps: 5}\n")
    config = load_config(tmp_path / "c.yaml", ["training.steps=7"])
    assert (config.training.lr, config.training.steps) == (1e-3, 7)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("text.passage={text}", "{text}"),
        ("text.passage=# {title}: {text}", "# {title}: {text}"),
        ("text.passage='{text} '", "{text} "),
        ("output=2024", "2024"),
        ('output="2024"', "2024"),
        ("output=1e-4", "1e-4"),
        ("output=off", "off"),
        ("model.embseq=135", "135"),
        ("model.embseq=null", None),
        ("data.train=[]", []),
        ("training.lr=1e-4", 1e-4),
    ],
)
def test_an_override_of_a_text_field_is_taken_as_it_stands(override, value):
    section, _, name = override.partition("=")[0].rpartition(".")
    config = load_config(None, [override])
    assert getattr(getattr(config, section) if section else config, name) == value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=mine.jsonl", "Input should be a valid list (write data.train=[mine.jsonl]), found 'mine.jsonl'"),
        ("training.lrr=1", "unknown field 'training.lrr', did you mean 'training.lr'"),
        ("temperature=0.1", "unknown field 'temperature', did you mean 'nsp.temperature'"),
        ("trainin.lr=1", "unknown field 'trainin'"),
        ("training.report_to=[wandb,mlflow,wandb]", "training.report_to names wandb more than once"),
        ("training.lr=-1", "training.lr: Input should be greater than 0, found -1"),
        ("training.steps=many", "training.steps"),
        ("training.betas=[0.9,1.0]", "training.betas.1: Input should be less than 1, found 1.0"),
        ("training.lr", "expected section.field=value"),
        ("output.x=1", "output: Input should be a valid string"),
        ("output=", "output: Input should be a valid string"),
        ("model.shared=true model.embseq=other", "model.shared=true uses Gen as Embseq"),
        ("model.shared=true model.freeze_embseq=true", "model.freeze_embseq"),
        ("training.keep_best=recall", "Input should be 'ntp', 'nsp', 'recall_at_1', 'recall_at_5' or 'recall_at_20'"),
        ("model.gen_lora.rank=-1", "model.gen_lora.rank: Input should be greater than or equal to 0, found -1"),
        ("model.gen_lora.alhpa=3", "unknown field 'model.gen_lora.alhpa', did you mean 'model.gen_lora.alpha'"),
        ("text.prompt='{q}'", "text.prompt"),
        ("text.passage='{text'", "text.passage"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(override, message):
    with pytest.raises(ConfigError) as error:
        load_config(None, override.split())
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output: a\noutput: b\n", "the key 'output' occurs twice, first in line 1"),
        ("training: {lr: 1.0e-4, steps: 5, lr: 1.0e-3}\n", "the key 'lr' occurs twice"),
        ("[" * 5000, "nested too deep"),
        ("a: " + "{a: " * 5000, "nested too deep"),
        ("a: &a [*a]\n", "contains itself|unfold"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi")),
            "unfold to more than",
        ),
        ("output: 2024-13-77\n", "cannot be read as YAML"),
    ],
    ids=["twice", "twice within", "deep list", "deep mapping", "itself", "billion laughs", "no date"],
)
def test_a_hostile_or_careless_file_is_refused(tmp_path, text, said):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "c.yaml")


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config(tmp_path / "broken.yaml")
    (tmp_path / "typo.yaml").write_text("training: {batchsize: 2}\n")
    with pytest.raises(
        ConfigError, match=r"typo.yaml: unknown field 'training.batchsize', did you mean 'training.batch_size'"
    ):
        load_config(tmp_path / "typo.yaml")


@pytest.mark.parametrize(
    "path",
    [path for path in sorted((Path(__file__).parents[2]).glob("examples/*.yaml")) if not path.name.startswith("study")],
    ids=lambda path: path.name,
)
def test_the_examples_are_valid_configurations(path):
    assert load_config(path).model.gen


IN_BACKWARD = {"optimizer_in_backward": "true", "clip": "null", "spike_factor": "null", "diagnose_every": "null"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.clip", 1.0),
        ("training.spike_factor", 20.0),
        ("training.diagnose_every", 100),
        ("training.tokens_per_micro_batch", 400),
        ("training.micro_batch_size", 4),
        ("training.sharding", "fsdp"),
        ("model.shared", "true"),
    ],
)
def test_what_needs_all_gradients_at_once_is_no_step_in_the_backward_pass(field, value):
    alone = [f"training.{name}={x}" for name, x in IN_BACKWARD.items()]
    load_config(None, alone)
    with pytest.raises(ConfigError, match=r"training\.optimizer_in_backward=true") as error:
        load_config(None, [*alone, f"{field}={value}"])
    assert f"{field}={value}" in str(error.value)


@pytest.mark.parametrize("field", ["micro_batch_size", "tokens_per_micro_batch", "batch_size"])
def test_a_micro_batch_of_nothing_is_refused(field):
    with pytest.raises(ConfigError, match=rf"training\.{field}: .*greater than or equal to 1, found 0"):
        load_config(None, [f"training.{field}=0"])
