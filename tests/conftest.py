"""Shared fixtures: tiny random models with real tokenizers, made on the spot, and a small corpus with examples."""

from __future__ import annotations

import signal
import sys
import time

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from cosup_fast.data.records import Example, Passage, Segment, write_jsonl

PASSAGES = [
    Passage(id="paris", title="Paris", text="Paris is the capital of France. It lies on the Seine."),
    Passage(id="rome", title="Rome", text="Rome is the capital of Italy, founded in 753 BC."),
    Passage(id="seine", title="Seine", text="The Seine is a river of 777 km in northern France."),
    Passage(id="go", title="Go (game)", text="Go is a board game. 囲碁 is its Japanese name."),
    Passage(
        id="emoji",
        title="👩‍👩‍👧‍👦 family",
        text="A ZWJ sequence; e\u0301 is é in two code points, \u202eright to left\u202c.",
    ),
    Passage(id="marks", title="[NSP]", text="Some text writes [NSP], [Cs], [Ce], [PAD] and </s> out in full."),
    Passage(id="braces", title="{title}", text="Braces {question} {0} and 100% stay as they are."),
    Passage(id="short", title="", text="x"),
    Passage(id="long", title="Long", text="one two three four five six seven eight nine ten " * 4),
    Passage(id="nile", title="Nile", text="The Nile flows north through Egypt."),
    Passage(id="euclid", title="Euclid", text="Euclid wrote the Elements in Alexandria about 300 BC."),
]

EXAMPLES = [
    Example(
        id="e1",
        dataset="cities",
        question="What is the capital of France?",
        output=[Segment(text="Paris is the capital of France.", passage="paris")],
        answers=["Paris"],
    ),
    Example(
        id="e2",
        dataset="cities",
        instruction="Answer in full. ",
        question="Which river crosses the capital of France, and how long is it?",
        output=[
            Segment(text="First the city. "),
            Segment(text="Paris lies on the Seine. ", passage="paris"),
            Segment(text="Then its length: "),
            Segment(text="777 km", passage="seine"),
            Segment(text=", that is all."),
        ],
        answers=["777 km", "777 kilometres"],
    ),
    Example(
        id="e3",
        dataset="dates",
        question="When was Rome founded [NSP]?",
        output=[Segment(text="753 BC", passage="rome")],
        answers=[r"753\s*B\.?C"],
        answer_type="regex",
    ),
    Example(
        id="e4",
        dataset="dates",
        question="碁 in 日本?",
        output=[Segment(text="囲碁 👍", passage="go"), Segment(text="囲碁 again", passage="go")],
    ),
]


@pytest.fixture(scope="session")
def passages() -> list[Passage]:
    return PASSAGES


@pytest.fixture(scope="session")
def corpus() -> dict[str, Passage]:
    return {passage.id: passage for passage in PASSAGES}


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    return EXAMPLES


@pytest.fixture(scope="session")
def mixed() -> list[Example]:
    """Examples with none, one, two and three [NSP], some with a further gold passage."""
    three = [Segment(text=f"{i}.", passage=name) for i, name in enumerate(("nile", "euclid", "paris"))]
    return [
        *EXAMPLES,
        Example(id="silent", question="What?", output=[Segment(text="Nothing is looked up here.")]),
        Example(id="three", question="Which?", output=three, gold=["nile", "rome"]),
    ]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """passages.jsonl and examples.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    write_jsonl(folder / "passages.jsonl", PASSAGES)
    write_jsonl(folder / "examples.jsonl", EXAMPLES)
    return folder


def make_tokenizer(vocabulary: int, start: bool):
    """A byte-level BPE with pad = eos, as SmolLM2 has it; with `start` it puts <s> before a text, as Llama 2 does."""
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{p.title} :: {p.text}" for p in PASSAGES if p.id != "marks"], trainer)
    if start:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.fixture(scope="session")
def make_folder(tmp_path_factory):
    """A function that makes a Hugging Face folder with a random model: 2 layers and width 32 unless told otherwise."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(kind: str, *, vocabulary: int = 300, start: bool = False, spare: int = 0, seed: int = 0, **options) -> str:
        folder = str(tmp_path_factory.mktemp(kind))
        tokenizer = make_tokenizer(vocabulary, start)
        tokenizer.save_pretrained(folder)
        sizes = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "initializer_range": 0.3,
        }
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer) + spare, **{**sizes, **ids, **options})
        model = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()
        if head.bias is not None:
            torch.nn.init.normal_(head.bias)
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama_folder(make_folder) -> str:
    """A Llama with grouped queries, untied embeddings and rows that no token uses, as published models have them."""
    return make_folder("llama", spare=5, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def ascii_folder(make_folder) -> str:
    """A Llama that writes ASCII text without end: each of its tokens is text that can be sent at once."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = make_folder("llama", seed=3, tie_word_embeddings=False)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for token, row in enumerate(model.get_output_embeddings().weight):
            text = tokenizer.decode([token], skip_special_tokens=True)
            if not (text and text.isascii()):
                row.zero_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(make_folder) -> str:
    """Another architecture, width, dropout and tokenizer."""
    return make_folder(
        "gpt2", vocabulary=280, start=True, seed=1, hidden_size=24, num_attention_heads=3, max_position_embeddings=320
    )


@pytest.fixture(scope="session")
def mistral_folder(make_folder) -> str:
    """A Mistral whose attention sees 12 tokens."""
    return make_folder("mistral", seed=2, sliding_window=12)


@pytest.fixture(scope="session")
def make_model(llama_folder, gpt2_folder):
    """A function that makes a model in evaluation mode: two Llamas unless told otherwise; it knows a "gpt2", too."""
    from cosup_fast.config.model import ModelConfig, NSPConfig, NTPConfig
    from cosup_fast.data.template import TextConfig
    from cosup_fast.model import CoSupervisionModel

    def make(*, text=None, nsp=None, ntp=None, seed: int = 0, **model):
        torch.manual_seed(seed)
        parts = {name: gpt2_folder if value == "gpt2" else value for name, value in model.items()}
        made = CoSupervisionModel.from_pretrained(
            ModelConfig(**{"gen": llama_folder, **parts}),
            TextConfig(**(text or {})),
            NSPConfig(**(nsp or {})),
            ntp=NTPConfig(**(ntp or {})),
        )
        return made.eval()

    return make


@pytest.fixture(scope="session")
def model(make_model):
    """Llama with Llama in fp32; tests must leave it as it is."""
    return make_model()


@pytest.fixture
def cosup(monkeypatch, capsys):
    """Runs the command in this process: (exit status, standard output, standard error on one line)."""

    from cosup_fast.cli.app import run
    from cosup_fast.cli.common import err, out

    for console in (out, err):  # made when they were first imported, perhaps narrower
        monkeypatch.setattr(console, "_width", 200)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cosup-fast", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            run()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        captured = capsys.readouterr()
        return status, captured.out, " ".join(captured.err.split())

    return call


@pytest.fixture(scope="session")
def tiny_run(llama_folder, data_folder):
    """Settings of a tiny run of two steps an epoch, but for its output."""
    return {
        "model.gen": llama_folder,
        "data.corpus": str(data_folder / "passages.jsonl"),
        "data.train": [str(data_folder / "examples.jsonl")],
        "data.dev": [],
        "training.batch_size": 2,
        "training.lr": 1e-2,
        "training.steps": 4,
    }


@pytest.fixture
def fields(tiny_run, tmp_path):
    """The same with an output."""
    return {"output": tmp_path / "run", **tiny_run}


@pytest.fixture
def arguments(fields):
    """A function that writes the fields, and changes of them, as overrides on the command line."""

    def arguments(**changes):
        return [f"{name}={value}" for name, value in {**fields, **changes}.items()]

    return arguments


@pytest.fixture
def keyboard():
    """Ctrl-C as in a terminal, also where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory):
    """A checkpoint that indexes are built with; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save(folder)
    return folder


@pytest.fixture(scope="session")
def eventually():
    """A function that waits until a condition holds."""

    def wait(condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it never came true"
            time.sleep(0.002)

    return wait


@pytest.fixture(scope="session")
def randomize():
    """A function that gives a model new random weights, by a seed, that see every transition of the grammar."""

    @torch.no_grad()
    def randomize(model, seed):
        random = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "norm" not in name and "ln_" not in name:
                parameter.normal_(0, 0.3, generator=random)
        head, template = model.gen.get_output_embeddings().weight, model.template
        for token, size in ((template.nsp, 2.5), (template.context_end, 4.0), (template.eos, 2.0)):
            head[token] *= size
        return model

    return randomize
