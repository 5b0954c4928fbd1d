import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cosup_fast.config.model import ModelConfig, NSPConfig
from cosup_fast.data.packing import Pack, make_batch
from cosup_fast.data.records import Example, Segment
from cosup_fast.data.template import DESCRIPTIONS, IGNORE
from cosup_fast.model import CoSupervisionModel
from cosup_fast.model.folder import check_saving


def eager(model, ids: list[int]) -> torch.Tensor:
    """Hidden states (T, D) of one sequence by transformers' own eager attention: no pack, no mask of ours."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        return model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
    finally:
        model.set_attn_implementation(before)


def sequences_of(model, passages) -> list[list[int]]:
    return [model.template.sequence(passage) for passage in passages]


def sequences_and_labels(batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens of each of Gen's sequences, and their labels."""
    pairs = []
    for part in batch.gen:
        labels = torch.full_like(part.pack.input_ids, IGNORE)
        labels[part.supervised_rows] = part.targets
        lengths = part.pack.lengths
        pairs += zip(part.pack.input_ids.split(lengths), labels.split(lengths), strict=True)
    return pairs


@pytest.fixture(scope="module")
def exact(make_model):
    """In fp64; transformers computes norms and rotations in fp32 all the same."""
    return make_model(dtype="float64")


@pytest.fixture(params=["llama", "gpt2"])
def either(request, make_model, gpt2_folder):
    return make_model(dtype="float64", embseq=gpt2_folder if request.param == "gpt2" else None)


@torch.no_grad()
def test_packed_hidden_states_are_those_of_each_sequence_alone(either, passages, examples, corpus):
    pack = make_batch(examples, corpus, either.template).gen[0].pack
    for ids, hidden in zip(
        pack.input_ids.split(pack.lengths), either.hidden_states(pack).split(pack.lengths), strict=True
    ):
        torch.testing.assert_close(hidden, eager(either.gen, ids.tolist()), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embedding_is_the_hidden_state_at_the_end_token(either, passages):
    sequences = sequences_of(either, passages)
    embedded = either.embed(Pack.of(sequences))
    for ids, embedding in zip(sequences, embedded, strict=True):
        hidden = eager(either.embseq, ids)[-1]
        expected = F.normalize(hidden if either.projection is None else either.projection(hidden), dim=-1)
        torch.testing.assert_close(embedding, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-7)])
@torch.no_grad()
def test_embedding_does_not_depend_on_the_pack(make_model, gpt2_folder, passages, dtype, tolerance):
    for embseq in (None, gpt2_folder):
        model = make_model(dtype=dtype, embseq=embseq)
        sequences = sequences_of(model, passages)
        alone = torch.cat([model.embed(Pack.of([ids])) for ids in sequences])
        assert (alone.norm(dim=1) - 1).abs().max() < 1e-6
        for order in torch.stack([torch.randperm(len(sequences)) for _ in range(4)]).tolist():
            packed = model.embed(Pack.of([sequences[row] for row in order]))
            assert (packed - alone[order]).abs().max() < tolerance


@torch.no_grad()
def test_nothing_leaks_between_neighbours(either):
    middle = list(range(40, 60))
    for run in (either.hidden_states, either.embed):
        kept = []
        for neighbour in (70, 90):
            out = run(Pack.of([[neighbour] * 9, middle, [neighbour] * 11]))
            kept.append(out[9:29] if run == either.hidden_states else out[1:2])
        assert torch.equal(*kept)


def test_neighbours_get_no_gradient(exact):
    pack = Pack.of([list(range(40, 50)), list(range(60, 75)), list(range(80, 85))])
    embeddings = exact.gen.get_input_embeddings()
    grad = torch.autograd.grad(exact.hidden_states(pack)[10:25].square().sum(), embeddings.weight)[0]
    assert (grad[60:75].abs().sum(dim=1) > 0).all()
    assert (grad[40:50] == 0).all()
    assert (grad[80:85] == 0).all()


def written_out(model, examples, corpus) -> tuple[torch.Tensor, torch.Tensor]:
    """NTP and NSP from their definitions, one sequence at a time, with eager attention and whole logits."""
    template, nsp = model.template, model.nsp
    passages = list(dict.fromkeys(s.passage for e in examples for s in e.output if s.passage))
    embseq = model.gen if model.embseq is None else model.embseq
    keys = torch.stack([eager(embseq, template.sequence(corpus[p]))[-1] for p in passages])
    keys = keys if model.projection is None else model.projection(keys)
    nll, queries, positive = [], [], []
    for example in examples:
        sequence = template.gen_sequence(example, corpus)
        hidden, labels = eager(model.gen, sequence.input_ids), torch.tensor(sequence.labels)
        logits = model.gen.get_output_embeddings()(hidden)
        nll.append(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[labels != IGNORE])
        queries.append(hidden[sequence.query_rows])
        positive += [passages.index(p) for p in sequence.query_passages]
    queries = torch.cat(queries)
    if nsp.similarity == "cosine":
        queries, keys = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    return torch.cat(nll).mean(), F.cross_entropy(queries @ keys.T / nsp.temperature, torch.tensor(positive))


@pytest.mark.parametrize(("similarity", "temperature"), [("cosine", 0.05), ("dot", 6.0)])
@pytest.mark.parametrize("kind", ["two", "shared", "projected"])
def test_loss_and_gradients_are_those_of_the_definition(
    make_model, gpt2_folder, examples, corpus, kind, similarity, temperature
):
    model = make_model(
        dtype="float64",
        embseq=gpt2_folder if kind == "projected" else None,
        shared=kind == "shared",
        nsp={"weight": 0.7, "similarity": similarity, "temperature": temperature},
    )
    out = model(make_batch(examples, corpus, model.template))
    ntp, nsp = written_out(model, examples, corpus)
    torch.testing.assert_close(out.ntp, ntp, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.nsp, nsp, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.loss, ntp + 0.7 * nsp, rtol=1e-5, atol=1e-5)
    weights = dict(model.named_parameters())
    ours, expected = (
        torch.autograd.grad(loss, list(weights.values()), allow_unused=True) for loss in (out.loss, ntp + 0.7 * nsp)
    )
    for name, a, b in zip(weights, ours, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-9, name


HEADS = {
    "phi": {},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
    "gemma3_text": {"final_logit_softcapping": 3.0, "head_dim": 8},
}


@pytest.mark.parametrize("kind", HEADS)
def test_ntp_is_the_cross_entropy_of_the_logits_of_the_model(make_model, make_folder, examples, corpus, kind):
    model = make_model(gen=make_folder(kind, **HEADS[kind]), shared=True, dtype="float64", nsp={"weight": 0.0})
    batch = make_batch(examples, corpus, model.template)
    nll = []
    for ids, labels in sequences_and_labels(batch):
        logits = model.gen(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(model.logits(eager(model.gen, ids.tolist())), logits, atol=1e-5, rtol=1e-5)
        nll.append(F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")[labels != IGNORE])
    expected, ours = torch.cat(nll).mean(), model(batch).ntp
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)
    head = model.gen.get_output_embeddings()
    assert (head.bias is not None) == (kind == "phi")
    for parameter in filter(lambda p: p is not None, (head.weight, head.bias)):
        a, b = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (ours, expected))
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_new_tokens_take_the_mean_of_the_bias_of_the_head(make_model, make_folder):
    model = make_model(gen=make_folder("phi"), shared=True)
    bias, tokenizer = model.gen.get_output_embeddings().bias, model.template.tokenizer
    for token, text in DESCRIPTIONS.items():
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        torch.testing.assert_close(bias[tokenizer.convert_tokens_to_ids(token)], bias[ids].mean())


def test_known_positives_are_no_negatives(make_model, gpt2_folder, corpus):
    known = {**corpus, "twin": corpus["seine"].model_copy(update={"id": "twin"})}
    asked = {"paris": ["paris", "seine", "nile"], "seine": ["seine"], "twin": ["twin", "rome"], "rome": ["rome"]}
    examples = [
        Example(id=name, question=f"{name}?", output=[Segment(text="So.", passage=name)], gold=gold)
        for name, gold in asked.items()
    ]
    model = make_model(dtype="float64", embseq=gpt2_folder)
    batch = make_batch(examples, known, model.template)
    out = model(batch)
    (part,) = batch.gen
    queries = model.queries(model.hidden_states(part.pack), part.query_rows)
    keys = torch.cat([model.embed(Pack.of([model.template.sequence(corpus[p])])) for p in ("paris", "seine", "rome")])
    scores = queries @ keys.T / model.nsp.temperature
    positives = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1]]).bool()
    expected = (scores.logsumexp(1) - scores.masked_fill(~positives, -torch.inf).logsumexp(1)).mean()
    torch.testing.assert_close(out.nsp, expected, atol=1e-5, rtol=1e-5)
    assert out.stats.rank.tolist() == [
        int((row > row[p].max()).sum()) for row, p in zip(scores, positives, strict=True)
    ]
    twins = model(make_batch(examples[1:3], known, model.template))
    assert twins.nsp == 0  # one text, so nothing to tell apart


@pytest.mark.parametrize("kind", ["two", "shared", "projected"])
def test_without_weight_of_nsp_there_is_no_embseq(make_model, gpt2_folder, examples, corpus, kind):
    made = {"embseq": gpt2_folder if kind == "projected" else None, "shared": kind == "shared"}
    model = make_model(nsp={"weight": 0.0}, **made)
    assert (model.has_embseq, model.shared, model.embseq, model.projection) == (False, False, None, None)
    batch = make_batch(examples, corpus, model.template)
    passes = []
    model.gen.base_model.register_forward_hook(lambda *arguments: passes.append(1))
    out = model(batch)
    out.loss.backward()
    assert len(passes) == len(batch.gen)
    assert (out.nsp, out.stats) == (0, None)
    assert torch.equal(out.loss, out.ntp)
    with pytest.raises(ValueError, match="passages cannot be embedded: this model is a Gen without an Embseq"):
        model.embed(batch.passages[0])


@pytest.mark.parametrize("differentiated", [True, False])
def test_without_weight_ntp_is_a_diagnosis_alone(make_model, examples, corpus, differentiated):
    model = make_model(ntp={"weight": 0.0})
    batch = make_batch(examples, corpus, model.template)
    with torch.set_grad_enabled(differentiated):
        out = model(batch)
    assert torch.equal(out.loss, out.nsp)
    expected = torch.zeros(()) if differentiated else make_model()(batch).ntp
    torch.testing.assert_close(out.ntp, expected)


def test_the_end_token_learns_where_a_model_pads_with_it(make_model, llama_folder, examples, corpus, tmp_path):
    assert AutoModelForCausalLM.from_pretrained(llama_folder).get_input_embeddings().padding_idx == 1
    model = make_model()
    model.save(tmp_path / "saved")
    for one in (model, make_model(shared=True), CoSupervisionModel.load(tmp_path / "saved")):
        one(make_batch(examples, corpus, one.template)).nsp.backward()
        assert one.template.eos == 1
        assert (one.embseq or one.gen).get_input_embeddings().weight.grad[1].abs().max() > 0


def test_each_loss_reaches_its_models(make_model, examples, corpus):
    model = make_model()
    out = model(make_batch(examples, corpus, model.template))
    names = [name for name, _ in model.named_parameters()]
    for loss, reached in ((out.ntp, {"gen"}), (out.nsp, {"gen", "embseq"})):
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True)
        moved = {name.split(".")[0] for name, grad in zip(names, grads) if grad is not None and grad.any()}
        assert moved == reached
    assert all(parameter.grad is None for parameter in model.parameters())


def test_counts_make_parts_of_a_step_add_up(exact, examples, corpus):
    template = exact.template
    whole = exact(make_batch(examples, corpus, template))
    parts = [make_batch(part, corpus, template) for part in (examples[:1], examples[1:])]
    tokens = sum(part.ntp_count for part in parts)
    ntp = sum(exact(part, ntp_count=tokens, nsp_count=6).ntp for part in parts)
    torch.testing.assert_close(ntp, whole.ntp, rtol=1e-9, atol=0)


def test_frozen_embseq(make_model, gpt2_folder, examples, corpus):
    model = make_model(embseq=gpt2_folder, freeze_embseq=True)
    model.train()
    assert model.gen.training
    assert not any(module.training for module in model.embseq.modules())  # its dropout is 0.1
    out = model(make_batch(examples, corpus, model.template))
    out.loss.backward()
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.embseq.parameters())
    assert model.projection.weight.grad.abs().max() > 0
    assert model.gen.get_input_embeddings().weight.grad.abs().max() > 0
    model.eval()
    assert not model.gen.training


def test_dropout_of_a_trained_embseq_is_on_in_training(make_model, gpt2_folder, passages):
    model = make_model(embseq=gpt2_folder)
    pack = Pack.of(sequences_of(model, passages))
    model.train()
    with torch.no_grad():
        assert not torch.equal(model.embed(pack), model.embed(pack))


def test_shared_weights_are_one_model(make_model, passages):
    model = make_model(shared=True)
    assert model.embseq is None
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"gen"}
    pack = Pack.of(sequences_of(model, passages))
    with torch.no_grad():
        expected = F.normalize(model.hidden_states(pack)[pack.last_rows], dim=-1)
        torch.testing.assert_close(model.embed(pack), expected)


def test_projection_starts_orthogonal(make_model, gpt2_folder):
    weight = make_model(embseq=gpt2_folder).projection.weight
    assert weight.shape == (32, 24)
    torch.testing.assert_close(weight.T @ weight, torch.eye(24), atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_gradient(make_model, examples, corpus):
    grads = []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_activation_checkpointing()
            assert model.gen.is_activation_checkpointing
            assert model.embseq.is_activation_checkpointing
        model(make_batch(examples, corpus, model.template)).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_new_tokens_start_as_the_mean_of_their_descriptions(make_model, llama_folder):
    model = make_model()
    plain = AutoModelForCausalLM.from_pretrained(llama_folder)
    tokenizer = model.template.tokenizer
    for ours, before in (
        (model.gen.get_input_embeddings().weight, plain.get_input_embeddings().weight),
        (model.gen.get_output_embeddings().weight, plain.get_output_embeddings().weight),
    ):
        for token, text in DESCRIPTIONS.items():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            torch.testing.assert_close(ours[tokenizer.convert_tokens_to_ids(token)], before[ids].mean(dim=0))
        torch.testing.assert_close(ours[:300], before[:300])
    assert len(model.gen.get_input_embeddings().weight) == 305  # the unused rows sufficed
    assert model.gen.config.pad_token_id == model.template.pad


def test_first_layers_only(make_model, llama_folder, passages):
    model = make_model(gen_layers=1, embseq_layers=1)
    assert len(model.gen.base_model.layers) == len(model.embseq.layers) == 1
    whole = make_model()
    whole.embseq.layers = whole.embseq.layers[:1]
    pack = Pack.of(sequences_of(model, passages))
    with torch.no_grad():
        torch.testing.assert_close(model.embed(pack), whole.embed(pack))
    with pytest.raises(ValueError, match=r"2 layers, 3 were asked for"):
        make_model(gen_layers=3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"gen": "a", "shared": True, "embseq": "b"}, "model.embseq='b'"),
        ({"shared": True, "embseq_layers": 1}, "embseq_layers=1"),
        ({"shared": True, "freeze_embseq": True}, "would freeze Gen"),
        ({"attention": "flash_attention_2", "dtype": "float64"}, "16-bit"),
        ({"layers": 3}, "layers"),
    ],
)
def test_inconsistent_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**setting)


HYBRID = {"layer_types": ["conv", "full_attention"]}
NO_ATTENTION = "has no attention that packs can use: .*choose another model, or model.attention=flash_attention_2"


@pytest.mark.parametrize("role", ["Gen", "Embseq"])
@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("lfm2", HYBRID, r"\(Lfm2Model\) mixes the sequences of a pack"),
        ("stablelm", {}, r"\(StableLmModel\) mixes the sequences of a pack"),
        ("roberta", {"is_decoder": True}, r"\(RobertaModel\) reads a sequence of a pack otherwise than alone"),
        ("falcon", {}, NO_ATTENTION),
        ("bloom", {}, NO_ATTENTION),
        (
            "gpt_oss",
            {"head_dim": 8, "num_local_experts": 4},
            "has no attention .*: its layers attend with sinks",
        ),
        ("doge", {"sliding_window": 9}, "has no attention .*: its layers see 9 tokens through a mask alone"),
        (
            "gemma3_text",
            {"head_dim": 8, "use_bidirectional_attention": True},
            r"\(Gemma3TextModel\) reads a sequence of a pack otherwise than alone",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_models_that_packs_do_not_suit_are_refused(make_model, make_folder, role, kind, options, message):
    folder = make_folder(kind, **options)
    with pytest.raises(ValueError, match=f"{role} '{folder}' {message}"):
        make_model(gen=folder, shared=True) if role == "Gen" else make_model(embseq=folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_sequences_stand_out_from_rounding(make_model, make_folder, gpt2_folder, dtype):
    make_model(gen=make_folder("llama", num_hidden_layers=24), embseq=gpt2_folder, dtype=dtype)
    with pytest.raises(ValueError, match="mixes"):
        make_model(gen=make_folder("lfm2", **HYBRID), shared=True, dtype=dtype)


def test_a_bidirectional_embseq_is_refused(make_model, make_folder):
    with pytest.raises(ValueError, match=r"Embseq .*\(BertModel\) reads a sequence of a pack otherwise than alone"):
        make_model(embseq=make_folder("bert"))


def test_a_head_with_layers_of_its_own_is_refused(make_model, make_folder):
    folder = make_folder("bert", is_decoder=True)
    with pytest.raises(
        ValueError, match=r"BertLMHeadModel.*logits are not those of its head 'cls.predictions.decoder'"
    ):
        make_model(gen=folder, shared=True)


def test_a_checkpoint_is_checked_like_a_model(saved, make_folder):
    shutil.rmtree(saved / "embseq")
    shutil.copytree(make_folder("bert"), saved / "embseq")
    with pytest.raises(ValueError, match=r"Embseq '.*embseq' \(BertModel\) reads"):
        CoSupervisionModel.load(saved)


def test_the_check_leaves_no_trace(make_model, gpt2_folder, monkeypatch):
    def made() -> tuple:
        model = make_model(gen=gpt2_folder, embseq=gpt2_folder)
        return torch.get_rng_state(), model.fingerprint(), [module.training for module in model.modules()]

    checked = made()
    monkeypatch.setattr("cosup_fast.model.model.check_model", lambda *args: None)
    for a, b in zip(checked, made(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_pickle_is_never_loaded(llama_folder, tmp_path, make_model):
    folder = tmp_path / "pickled"
    shutil.copytree(llama_folder, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{folder} holds no \*\.safetensors.* is a pickle.*convert it"):
        make_model(gen=str(folder))
    with pytest.raises(ValueError, match="is a pickle"):
        make_model(embseq=str(folder))


VARIANTS = {
    "two": {},
    "shared": {"shared": True},
    "frozen": {"freeze_embseq": True},
    "learned temperature": {"nsp": {"learnable_temperature": True, "temperature": 0.5}},
    "dot": {"nsp": {"similarity": "dot", "temperature": 8.0}},
    "fp64": {"dtype": "float64"},
    "bf16": {"dtype": "bfloat16"},
    "template": {"text": {"passage": "{text} ({title})", "label_passages": True}},
    "projected": {"embseq": "gpt2"},
    "tied and resized": {"gen": "gpt2"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_save_and_load(make_model, gpt2_folder, examples, corpus, tmp_path, variant):
    model = make_model(**{k: gpt2_folder if v == "gpt2" else v for k, v in VARIANTS[variant].items()})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    model.save(tmp_path / "saved")
    loaded = CoSupervisionModel.load(tmp_path / "saved").eval()
    assert loaded.fingerprint() == model.fingerprint()
    assert loaded.nsp == model.nsp
    assert loaded.template.config == model.template.config
    assert loaded.freeze_embseq == model.freeze_embseq
    batch, again = (make_batch(examples, corpus, m.template) for m in (model, loaded))
    assert torch.equal(batch.gen[0].pack.input_ids, again.gen[0].pack.input_ids)
    assert torch.equal(batch.passages[0].input_ids, again.passages[0].input_ids)
    with torch.no_grad():
        before, after = model(batch), loaded(again)
        assert torch.equal(before.loss, after.loss)
        assert torch.equal(model.embed(batch.passages[0]), loaded.embed(again.passages[0]))
    loaded.save(tmp_path / "twice")
    assert CoSupervisionModel.load(tmp_path / "twice").fingerprint() == model.fingerprint()


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "saved")
    return tmp_path / "saved"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no cosup.json"),
        (b"", "damaged"),
        (b'{"format_version": 1, ', "damaged"),
        (b"\xff\xfe{}", "damaged"),
        (b"[]", "damaged|format_version"),
        (b"{}", "format_version None"),
        (b'{"format_version": 2}', "format_version 2, this release reads 1"),
        (b'{"format_version": 1}', "damaged|incomplete"),
    ],
)
def test_wrong_description_is_refused(saved, content, message):
    path = saved / "cosup.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        CoSupervisionModel.load(saved)


def test_heads_must_be_whole(saved, make_model, gpt2_folder, tmp_path):
    make_model(embseq=gpt2_folder).save(tmp_path / "projected")
    shutil.copy(tmp_path / "projected" / "heads.safetensors", saved / "heads.safetensors")
    with pytest.raises(ValueError, match=r"projection\.weight"):
        CoSupervisionModel.load(saved)
    (saved / "heads.safetensors").unlink()
    with pytest.raises(ValueError, match=r"heads.safetensors"):
        CoSupervisionModel.load(saved)


@pytest.mark.parametrize("part", ["gen", "embseq"])
def test_missing_models_are_named(saved, part):
    shutil.rmtree(saved / part)
    with pytest.raises(ValueError, match=part):
        CoSupervisionModel.load(saved)


def test_unknown_setting_in_the_description_is_refused(saved):
    description = json.loads((saved / "cosup.json").read_text())
    description["nsp"]["margin"] = 1
    (saved / "cosup.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="margin"):
        CoSupervisionModel.load(saved)


def test_fingerprint_changes_with_any_weight(make_model, gpt2_folder):
    model = make_model(embseq=gpt2_folder, nsp={"learnable_temperature": True})
    seen = {model.fingerprint()}
    assert model.fingerprint() in seen
    tensors = model.state_dict()
    for tensor in tensors.values():
        last = tensor.reshape(-1)[-1:]
        kept = last.clone()
        last.copy_(torch.nextafter(kept, kept + 1))
        seen.add(model.fingerprint())
        last.copy_(kept)
    assert len(seen) == 1 + len(tensors)
    assert model.fingerprint() == make_model(embseq=gpt2_folder, nsp={"learnable_temperature": True}).fingerprint()


def test_fingerprint_changes_with_template_and_similarity(make_model):
    made = [
        make_model(),
        make_model(nsp={"similarity": "dot"}),
        make_model(text={"passage": "{title}: {text}"}),
        make_model(text={"max_passage_tokens": 100}),
        make_model(dtype="float64"),
        make_model(shared=True),
    ]
    assert len({model.fingerprint() for model in made}) == len(made)
    # What neither a query nor an embedding depends on does not make an index stale.
    assert make_model(nsp={"weight": 3.0}).fingerprint() == made[0].fingerprint()


def test_wrong_nsp_settings_are_refused():
    for setting in ({"temperature": 0}, {"weight": -1}, {"similarity": "l2"}, {"label_smoothing": 1}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            NSPConfig(**setting)


def test_hard_negatives_reach_the_loss_and_embseq(make_model, corpus):
    """The published code reads them and drops them."""
    model = make_model()
    plain = Example(id="a", question="Which capital?", output=[Segment(text="Paris", passage="paris")])
    other = Example(id="b", question="Which river?", output=[Segment(text="Nile", passage="nile")])
    hard = plain.model_copy(update={"negatives": ["rome", "seine"]})
    batch = make_batch([hard, other], corpus, model.template)
    names = ["paris", "nile", "rome", "seine"]
    alone = [make_batch([example], corpus, model.template) for example in (plain, other)]
    query = torch.cat([model.query_embeddings(one.gen[0].pack, one.gen[0].query_rows) for one in alone])
    keys = torch.cat([model.embed(Pack.of([model.template.sequence(corpus[name])])) for name in names])
    scores = query @ keys.T / model.nsp.temperature
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1]))
    nsp = model(batch).nsp
    torch.testing.assert_close(nsp, expected, rtol=1e-4, atol=1e-5)
    assert nsp > model(make_batch([plain, other], corpus, model.template)).nsp + 0.01
    # Both queries push both of them away.
    keys = keys.detach().requires_grad_()
    torch.nn.functional.cross_entropy(query.detach() @ keys.T, torch.tensor([0, 1])).backward()
    assert (keys.grad[2:].norm(dim=1) > 0).all()
    gradients = []
    for examples in ([hard, other], [plain, other]):
        model.zero_grad()
        model(make_batch(examples, corpus, model.template)).nsp.backward()
        gradients.append(model.embseq.get_input_embeddings().weight.grad.clone())
    only_in_negatives = set(model.template.sequence(corpus["rome"])) - {
        token for name in ("paris", "nile", "seine") for token in model.template.sequence(corpus[name])
    }
    assert only_in_negatives
    for token in only_in_negatives:
        assert gradients[0][token].norm() > 0
        assert gradients[1][token].norm() == 0


def test_a_generation_config_that_transformers_reads_and_does_not_write_is_saved(llama_folder, tmp_path):
    """A temperature without sampling: the first checkpoint used to fail after hundreds of steps."""
    shutil.copytree(llama_folder, tmp_path / "gen")
    settings = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": 1}
    (tmp_path / "gen" / "generation_config.json").write_text(json.dumps(settings))
    model = CoSupervisionModel.from_pretrained(ModelConfig(gen=str(tmp_path / "gen"), shared=True))
    model.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "gen" / "generation_config.json").read_text())["temperature"] == 0.6
    CoSupervisionModel.load(tmp_path / "saved")


def test_what_cannot_be_saved_is_known_before_it_is_trained(make_model, monkeypatch):
    model = make_model()
    check_saving(model)

    def refuse(folder):
        raise NotImplementedError("no slow form")

    monkeypatch.setattr(model.template.tokenizer, "save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"could be trained and not saved \(no slow form\)"):
        check_saving(model)
