"""Gen and Embseq in packs: hidden states, losses and gradients are those of their definitions."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from cosup_fast.data.packing import Pack, make_batch
from cosup_fast.data.records import Example, Segment
from cosup_fast.data.template import DESCRIPTIONS, IGNORE
from cosup_fast.model import CoSupervisionModel


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


@pytest.mark.parametrize("symmetric", [False, True], ids=["one way", "symmetric"])
def test_options_of_nsp_reach_its_loss(make_model, corpus, symmetric):
    examples = [
        Example(id=name, question=f"{name}?", output=[Segment(text="So.", passage=name)])
        for name in ("paris", "rome", "go")
    ]
    options = {"label_smoothing": 0.2, "temperature": 0.5, "symmetric": symmetric}
    model = make_model(dtype="float64", nsp=options)
    batch = make_batch(examples, corpus, model.template)
    (part,), (pack,) = batch.gen, batch.passages
    scores = model.queries(model.hidden_states(part.pack), part.query_rows) @ model.embed(pack).T / 0.5
    expected = F.cross_entropy(scores, batch.positive, label_smoothing=0.2)
    if symmetric:
        expected = (expected + F.cross_entropy(scores.T, batch.positive.argsort(), label_smoothing=0.2)) / 2
    torch.testing.assert_close(model(batch).nsp, expected, atol=1e-6, rtol=1e-6)


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
