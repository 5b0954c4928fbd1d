"""Judges: the lexical one on cases judged by hand, the models on tiny random ones."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from cosup_fast.data.records import Passage
from cosup_fast.evaluation.fluency import FluencyModel
from cosup_fast.evaluation.judge import LexicalJudge, NLIJudge
from cosup_fast.evaluation.judges import load_judge

CASES = [json.loads(line) for line in (Path(__file__).parent / "grounding_cases.jsonl").read_text().splitlines()]
NILE = Passage(id="n", title="Nile river", text="The Nile flows north, through Egypt. It does not reach Rome.")


def _right(split: str) -> tuple[Counter, Counter]:
    """How many of the cases of a split the lexical judge gets right, and how many there are, by kind."""
    cases = [case for case in CASES if case["split"] == split]
    pairs = [(Passage(id="p", title=case["title"], text=case["text"]), case["claim"]) for case in cases]
    right: Counter = Counter()
    for case, verdict in zip(cases, LexicalJudge().judge(pairs), strict=True):
        right[case["kind"]] += verdict.entailed == case["entailed"]
    return right, Counter(case["kind"] for case in cases)


@pytest.mark.parametrize(("split", "expected"), [("dev", 42), ("held-out", 33)])
def test_accuracy_on_cases_judged_by_hand(split, expected):
    """The figures of docs/evaluation.md; `dev` was looked at while the rules were made, `held-out` was not."""
    right, every = _right(split)
    assert right.total() == expected, right
    for kind in ("verbatim", "negation", "negation kept", "contradicted number", "contradicted entity", "unrelated"):
        assert right[kind] == every[kind], kind


def test_the_documented_accuracy_is_the_tested_one():
    text = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    columns = [_right("dev"), _right("held-out")]
    for kind in dict.fromkeys(case["kind"] for case in CASES):
        cells = [f"{right[kind]} of {every[kind]}" if every[kind] else "" for right, every in columns]
        assert f"| {kind} | {cells[0]} | {cells[1]} |" in text
    cells = [f"**{right.total()} of {every.total()}**" for right, every in columns]
    assert f"| **all** | {cells[0]} | {cells[1]} |" in text


@pytest.mark.parametrize(
    ("claim", "entailed", "why"),
    [
        ("The Nile flows north", True, "are in the passage"),
        ("It is in Egypt that the Nile flows.", True, "are in the passage"),
        ("The Nile (river)", True, "are in the passage"),  # the title counts
        ("The Nile flows south", False, "south"),
        ("The Nile reaches Rome.", False, "negated on one side only"),
        ("The Nile doesn't reach Rome.", True, "are in the passage"),
        ("The Nile has 3 branches", False, "number not in the passage: 3"),
        ("The Nile flows through Sudan.", False, "name not in the passage: Sudan"),
        ("Nil", False, "Nil"),
        ("It is.", False, "no content words"),
        ("!!!", False, "no content words"),
    ],
)
def test_lexical_verdicts_say_why(claim, entailed, why):
    (verdict,) = LexicalJudge().judge([(NILE, claim)])
    assert verdict.entailed is entailed
    assert why in verdict.why
    assert 0 <= verdict.score <= 1


@pytest.mark.parametrize(
    ("text", "claim", "entailed"),
    [
        ("It has 1,500 seats.", "It has 1500 seats", True),
        ("It has 1,500 seats.", "It has 15 seats", False),
        ("It weighs 2.50 kg.", "It weighs 2.5 kg", True),
        ("It has twelve doors.", "There are 12 doors", True),
        ("The 19th century began.", "The 19 century began", True),
        ("Version 1.2.3 is out.", "Version 1.2.3 is out", True),
        ("囲碁は古い遊戯です。", "囲碁は古い", True),
        ("囲碁は古い遊戯です。", "将棋は古い", False),
        ("", "Anything", False),
        ("Ærø is an island.\n\nIt lies in Denmark.", "Ærø lies in Denmark.", True),
    ],
)
def test_lexical_edges(text, claim, entailed):
    passage = Passage.model_construct(id="p", title="", text=text)
    assert LexicalJudge().judge([(passage, claim)])[0].entailed is entailed


def test_judges_by_name():
    assert load_judge("none") is None
    assert load_judge("lexical").name == "lexical"
    with pytest.raises(ValueError, match="lexicall"):
        load_judge("lexicall")


@pytest.fixture(scope="module")
def tokenizer(make_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_folder("llama"))


@pytest.fixture(scope="module")
def classifier_folder(tokenizer, tmp_path_factory) -> str:
    """A random BERT that tells contradiction, entailment and neutral apart."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = str(tmp_path_factory.mktemp("nli"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.5, pad_token_id=1,
        id2label={0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"},
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def seq2seq_folder(tokenizer, tmp_path_factory) -> str:
    """A random T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = str(tmp_path_factory.mktemp("t5"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, n_positions=256,
        pad_token_id=1, eos_token_id=1, decoder_start_token_id=1,
    )  # fmt: skip
    T5ForConditionalGeneration(config).save_pretrained(folder)
    return folder


CLAIMS = [(NILE, "The Nile flows"), (NILE, "x"), (Passage(id="p", title="", text="Paris."), "It is in France, is it?")]


def test_a_classifier_judges_as_transformers_says(classifier_folder, tokenizer):
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    verdicts = NLIJudge(classifier_folder, batch_size=2).judge(CLAIMS)
    for (passage, claim), verdict in zip(CLAIMS, verdicts, strict=True):
        premise = f"{passage.title}: {passage.text}" if passage.title else passage.text
        with torch.no_grad():
            probability = model(**tokenizer(premise, claim, return_tensors="pt")).logits[0].softmax(dim=0)
        assert verdict.score == pytest.approx(float(probability[1]), abs=1e-5)
        assert verdict.entailed == (int(probability.argmax()) == 1)
    assert len({v.entailed for v in verdicts} | {round(v.score, 6) for v in verdicts}) > 2


def test_an_encoder_decoder_answers_1_or_0(seq2seq_folder, tokenizer):
    from transformers import AutoModelForSeq2SeqLM

    model = AutoModelForSeq2SeqLM.from_pretrained(seq2seq_folder).eval()
    one, zero = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "10")
    verdicts = NLIJudge(seq2seq_folder, batch_size=2).judge(CLAIMS)
    for (passage, claim), verdict in zip(CLAIMS, verdicts, strict=True):
        premise = f"{passage.title}: {passage.text}" if passage.title else passage.text
        inputs = tokenizer(f"premise: {premise} hypothesis: {claim}", return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            logits = model(**inputs, decoder_input_ids=torch.tensor([[1]])).logits[0, 0, [zero, one]]
        assert verdict.score == pytest.approx(float(logits.softmax(dim=0)[1]), abs=1e-5)
        assert verdict.entailed == bool(logits[1] > logits[0])


def test_a_long_passage_loses_its_tail_and_a_long_claim_is_refused(classifier_folder):
    judge = NLIJudge(classifier_folder)
    long = Passage(id="l", title="", text="one two three four five six seven eight nine ten " * 20)
    start = Passage(id="l", title="", text="one two three four five six seven eight nine ten " * 40)
    assert judge.judge([(long, "The Nile")]) == judge.judge([(start, "The Nile")])
    with pytest.raises(ValueError, match="leaves no room for its passage in the 128 positions"):
        judge.judge([(long, "The Nile flows through Egypt. " * 40)])


def test_models_that_are_no_judges_are_refused(classifier_folder, tmp_path, llama_folder):
    config = json.loads((Path(classifier_folder) / "config.json").read_text())
    for path in Path(classifier_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": {"0": "bad", "1": "not_entailment"}}))
    with pytest.raises(ValueError, match=r"has the labels \['bad', 'not_entailment'\]: expected a model for natural"):
        NLIJudge(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"is a pickle, which may run code, and is never read"):
        NLIJudge(str(tmp_path))
    with pytest.raises(ValueError, match="batch_size=0"):
        NLIJudge(classifier_folder, batch_size=0)


def test_code_of_a_model_is_not_run(classifier_folder, tmp_path):
    for path in Path(classifier_folder).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((tmp_path / "config.json").read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": classes}))
    with pytest.raises(ValueError, match="cannot be loaded"):
        NLIJudge(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_perplexity_is_that_of_each_text_alone(llama_folder, gpt2_folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["The Nile flows north through Egypt.", "x", "", "Paris is the capital of France", "Rome"]
    for folder in (llama_folder, gpt2_folder):  # without and with a token that starts every text
        fluency = FluencyModel(folder, batch_size=2)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        for text, nats in zip(texts, fluency.nats_per_token(texts), strict=True):
            ids = torch.tensor([tokenizer(text)["input_ids"]]).long()
            if ids.shape[1] < 2:
                assert nats is None
                continue
            with torch.no_grad():
                assert nats == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-5)
    assert fluency.nats_per_token(["word " * 1000])[0] > 0  # longer than the model's positions
    with pytest.raises(ValueError, match="fluency model"):
        FluencyModel(str(Path(llama_folder).parent))
