import json
import os
import sys

import faiss
import pytest
import torch

from cosup_fast.data.packing import Pack
from cosup_fast.data.records import Example, Passage, Segment
from cosup_fast.index import SequenceIndex, embed_passages, embed_queries

MORE = [Passage(id="oslo", title="Oslo", text="Oslo is the capital of Norway."), Passage(id="x", title="X", text="y")]


@pytest.fixture(scope="module")
def index(model, passages) -> SequenceIndex:
    return SequenceIndex.build(model, passages, progress=False)


@pytest.fixture
def saved(index, tmp_path):
    index.save(tmp_path / "index")
    return tmp_path / "index"


@pytest.mark.parametrize("batch_tokens", [1, 40, 100, 4096])
def test_each_row_is_its_passage_alone(model, passages, batch_tokens):
    embeddings = embed_passages(model, passages, batch_tokens=batch_tokens)
    with torch.no_grad():
        alone = torch.cat([model.embed(Pack.of([model.template.sequence(p)])) for p in passages])
    assert embeddings.dtype == torch.float32
    assert (embeddings - alone).abs().max() < 2e-6


def test_packs_are_bounded_and_sorted(model, passages, monkeypatch):
    packs: list[Pack] = []
    embed = model.embed
    monkeypatch.setattr(model, "embed", lambda pack: packs.append(pack) or embed(pack))
    embed_passages(model, passages, batch_tokens=60)
    lengths = [length for pack in packs for length in pack.lengths]
    assert lengths == sorted((len(model.template.sequence(p)) for p in passages), reverse=True)
    assert all(sum(pack.lengths) <= 60 or len(pack.lengths) == 1 for pack in packs)
    assert len(packs) < len(passages)


def test_embedding_leaves_no_trace_on_the_model(make_model, gpt2_folder, passages, examples, corpus):
    model = make_model(embseq=gpt2_folder)
    expected = embed_passages(model, passages)
    model.train()
    model.gen.base_model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert torch.equal(embed_passages(model, passages), expected)  # GPT-2 has dropout
    embed_queries(model, examples, corpus)
    assert [module.training for module in model.modules()] == modes
    expected.add_(1).requires_grad_()  # an ordinary tensor, no inference tensor
    with pytest.raises(ValueError, match="batch_tokens=0"):
        embed_passages(model, passages, batch_tokens=0)
    assert [module.training for module in model.modules()] == modes


def test_nothing_to_embed(model):
    assert embed_passages(model, []).shape == (0, 32)
    queries, asked = embed_queries(model, [], {})
    assert queries.shape == (0, 32)
    assert asked == []


@pytest.mark.parametrize("batch_tokens", [1, 150, 4096])
def test_queries_are_the_hidden_states_of_the_whole_example(model, examples, corpus, batch_tokens):
    queries, asked = embed_queries(model, examples, corpus, batch_tokens=batch_tokens)
    assert asked == [(0, "paris"), (1, "paris"), (1, "seine"), (2, "rome"), (3, "go"), (3, "go")]
    expected = []
    for example in examples:
        sequence = model.template.gen_sequence(example, corpus)
        with torch.no_grad():
            hidden = model.hidden_states(Pack.of([sequence.input_ids]))
            expected.append(model.queries(hidden, torch.tensor(sequence.query_rows)))
    assert (queries - torch.cat(expected)).abs().max() < 2e-6


def test_question_with_gold_but_no_output_asks_at_once(model, examples, corpus):
    asking = Example(id="q", question=examples[0].question, output=[], gold=["rome", "paris"])
    silent = Example(id="s", question="?", output=[Segment(text="no passage")])
    queries, asked = embed_queries(model, [silent, asking, examples[0]], corpus)
    assert asked == [(1, "rome"), (2, "paris")]
    torch.testing.assert_close(queries[0], queries[1])


def test_search_is_exact(index):
    queries = torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    expected = (queries.double() @ index.embeddings.double().T).topk(5)
    scores, rows = index.search(queries, 5)
    assert torch.equal(rows, expected.indices)
    torch.testing.assert_close(scores, expected.values.float())
    found = index.retrieve(queries[3], 2)
    assert [passage for passage, _ in found] == [index.passages[row] for row in rows[3, :2]]
    assert [score for _, score in found] == pytest.approx(scores[3, :2].tolist())


def test_passage_finds_itself(index):
    _, rows = index.search(index.embeddings, 1)
    assert rows[:, 0].tolist() == list(range(len(index)))


def test_search_takes_what_there_is(index):
    scores, rows = index.search(torch.randn(3, 32, dtype=torch.bfloat16), 1000)
    assert rows.sort(dim=1).values.tolist() == [list(range(len(index)))] * 3
    assert (scores.diff(dim=1) <= 0).all()
    assert index.search(torch.empty(0, 32), 3)[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("queries", "k", "message"),
    [
        (torch.zeros(2, 32), 0, "k=0"),
        (torch.zeros(2, 31), 1, r"\(N, 32\), got shape \(2, 31\)"),
        (torch.zeros(32), 1, r"got shape \(32,\)"),
        (torch.full((1, 32), torch.nan), 1, "finite"),
    ],
)
def test_wrong_queries_are_refused(index, queries, k, message):
    with pytest.raises(ValueError, match=message):
        index.search(queries, k)


def test_wrong_corpora_are_refused(model, passages, index):
    with pytest.raises(ValueError, match="empty corpus"):
        SequenceIndex.build(model, [], progress=False)
    with pytest.raises(ValueError, match="'paris' stands more than once"):
        SequenceIndex.build(model, [*passages, passages[0]], progress=False)
    with pytest.raises(ValueError, match=r"'p' has .* tokens"):
        SequenceIndex.build(model, [Passage(id="p", title="", text="word " * 400)], progress=False)
    with pytest.raises(ValueError, match=r"\(2, 32\), got shape \(3, 32\)"):
        SequenceIndex(MORE, torch.zeros(3, 32), index.origin)
    with pytest.raises(ValueError, match="'x' stands more than once"):
        SequenceIndex([MORE[1], MORE[1]], torch.zeros(2, 32), index.origin)
    with pytest.raises(ValueError, match="'x' is not finite"):
        SequenceIndex(MORE, torch.tensor([[0.0], [torch.inf]]), index.origin)


def test_add(model, make_model, passages):
    index = SequenceIndex.build(model, passages, progress=False)
    index.add(model, MORE, progress=False)
    whole = SequenceIndex.build(model, [*passages, *MORE], progress=False)
    assert index.passages == whole.passages
    torch.testing.assert_close(index.embeddings, whole.embeddings)
    with pytest.raises(ValueError, match="'oslo' stands more than once"):
        index.add(model, [Passage(id="new", title="", text="n"), MORE[0]], progress=False)
    other = make_model(text={"passage": "{text}"})
    with pytest.raises(ValueError, match=r"text\.passage"):
        index.add(other, [Passage(id="new", title="", text="n")], progress=False)
    assert len(index) == len(index.embeddings) == len(whole)


def test_save_and_load(model, index, saved):
    assert sorted(os.listdir(saved)) == ["index.json", "passages.jsonl", "vectors.faiss"]
    assert os.listdir(saved.parent) == ["index"]
    loaded = SequenceIndex.load(saved, model)
    assert loaded.passages == index.passages
    assert loaded.origin == index.origin
    assert torch.equal(loaded.embeddings, index.embeddings)
    stamp = json.loads((saved / "index.json").read_text())
    assert stamp["origin"]["fingerprint"] == model.fingerprint()
    assert (stamp["count"], stamp["dim"], stamp["format_version"]) == (11, 32, 1)


def test_save_replaces_an_earlier_index(model, saved):
    small = SequenceIndex.build(model, MORE, progress=False)
    small.save(saved)
    assert SequenceIndex.load(saved, model).passages == MORE
    assert os.listdir(saved.parent) == ["index"]


def test_save_through_a_link_and_into_an_empty_folder(model, index, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for _ in range(2):
        index.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert len(SequenceIndex.load(tmp_path / "real", model)) == len(index)
    index.save(tmp_path / "new" / "deeper")
    assert sorted(os.listdir(tmp_path)) == ["link", "new", "real"]


def test_save_never_replaces_something_else(index, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    for name in ("thesis", "file"):
        with pytest.raises(ValueError, match="holds something else"):
            index.save(tmp_path / name)
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "..."


@pytest.mark.parametrize("stage", ["vectors", "passages", "sync", "rename"])
def test_a_crash_while_saving_leaves_the_earlier_index(model, index, saved, monkeypatch, stage):
    def crash(*args, **kwargs):
        raise OSError("disk full")

    place = {
        "vectors": (faiss, "write_index"),
        "passages": (sys.modules["cosup_fast.index"], "write_jsonl"),
        "sync": (os, "fsync"),
    }
    small = SequenceIndex.build(model, MORE, progress=False)
    if stage == "rename":
        rename = type(saved).rename
        monkeypatch.setattr(
            type(saved), "rename", lambda self, to: crash() if self.name.endswith(".new") else rename(self, to)
        )
    else:
        monkeypatch.setattr(*place[stage], crash)
    with pytest.raises(OSError, match="disk full"):
        small.save(saved)
    monkeypatch.undo()
    assert SequenceIndex.load(saved, model).passages == index.passages
    assert os.listdir(saved.parent) == ["index"]


def test_index_of_another_model_is_refused(make_model, saved):
    other = make_model()
    with torch.no_grad():
        other.gen.base_model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    for model, message in [
        (other, r"fingerprint is \w{12}, the model's is \w{12}: other weights\. Build it again .* allow_stale=True"),
        (
            make_model(text={"passage": "{text}"}),
            r"text\.passage is '\{title\} :: \{text\}', the model's is '\{text\}'",
        ),
        (make_model(nsp={"similarity": "dot"}), "similarity is 'cosine', the model's is 'dot'"),
    ]:
        with pytest.raises(ValueError, match=message):
            SequenceIndex.load(saved, model)
        stale = SequenceIndex.load(saved, model, allow_stale=True)
        assert stale.origin.fingerprint != model.fingerprint()


def test_index_of_another_width_is_refused_even_when_stale_is_allowed(make_model, gpt2_folder, saved):
    with pytest.raises(ValueError, match="width 32, this model has 24"):
        SequenceIndex.load(saved, make_model(gen=gpt2_folder), allow_stale=True)


@pytest.mark.parametrize("name", ["vectors.faiss", "passages.jsonl"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "empty", "missing"])
def test_damaged_files_are_refused(model, saved, name, damage):
    path = saved / name
    content = bytearray(path.read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(
            {
                "truncated": path.read_bytes()[:-1],
                "flipped": bytes(content),
                "longer": path.read_bytes() + b"\n",
                "empty": b"",
            }[damage]
        )
    with pytest.raises(ValueError, match=rf"{name}.*build the index again"):
        SequenceIndex.load(saved, model, allow_stale=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no index"),
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"\xff", "damaged"),
        (b"{}", "damaged"),
        (b'{"format_version": 1}', "damaged"),
        (b'{"format_version": 7}', "format_version 7, this release reads 1: build the index again"),
    ],
)
def test_damaged_stamps_are_refused(model, saved, content, message):
    path = saved / "index.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        SequenceIndex.load(saved, model)


def test_stamp_that_contradicts_the_files_is_refused(model, saved):
    stamp = json.loads((saved / "index.json").read_text())
    (saved / "index.json").write_text(json.dumps(stamp | {"count": 10}))
    with pytest.raises(ValueError, match="says 10 vectors of width 32, there are 11 of 32 for 11 passages"):
        SequenceIndex.load(saved, model)


def test_missing_faiss_is_named_before_any_work(model, passages, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(model, "embed", None)
    with pytest.raises(ImportError, match=r"pip install 'cosup-fast\[index\]'"):
        SequenceIndex.build(model, passages)
