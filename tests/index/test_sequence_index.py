"""`SequenceIndex`: searched, changed, saved and opened, in memory and in a folder alike."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

from cosup_fast.data import passages as by_row
from cosup_fast.data.passages import PassagesById
from cosup_fast.data.records import Passage
from cosup_fast.files import sha256
from cosup_fast.index import Options, SequenceIndex, embed_passages, search
from cosup_fast.index.shards import write_record

SMALL = Options(shard_size=4, progress=False)


def test_passages_by_id_are_told_apart_where_hashes_collide(passages, monkeypatch):
    monkeypatch.setattr(by_row, "hash_ids", lambda ids: np.array([len(name) for name in ids], dtype="<u8"))
    hashes = by_row.hash_ids(passage.id for passage in passages)
    by_id = PassagesById(passages, [hashes[:4], hashes[4:]])
    assert len(set(hashes.tolist())) < len(passages)
    assert dict(by_id) == {passage.id: passage for passage in passages}
    assert by_id.rows(["nile", "rome", "atoll", "", "rome"]) == {"nile": 9, "rome": 1}
    assert 7 not in by_id
    with pytest.raises(KeyError, match="atoll"):
        by_id["atoll"]


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


def test_wrong_corpora_are_refused(model, passages, index, tmp_path, more):
    for folder in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match="empty corpus"):
            SequenceIndex.build(model, [], folder, progress=False)
        with pytest.raises(ValueError, match="'paris'"):
            SequenceIndex.build(model, [*passages, passages[0]], folder, progress=False)
        with pytest.raises(ValueError, match=r"'p' has .* tokens"):
            SequenceIndex.build(model, [Passage(id="p", title="", text="word " * 400)], folder, progress=False)
    with pytest.raises(ValueError, match=r"\(2, width\), got shape \(3, 32\)"):
        SequenceIndex(more, torch.zeros(3, 32), index.origin)
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        SequenceIndex([more[1], more[1]], torch.zeros(2, 32), index.origin)
    with pytest.raises(ValueError, match="'x' is not finite"):
        SequenceIndex(more, torch.tensor([[0.0], [torch.inf]]), index.origin)
    with pytest.raises(ValueError, match=r"factory='HNSW8': an approximate index lives in a folder"):
        SequenceIndex.build(model, passages, factory="HNSW8", progress=False)
    with pytest.raises(ValueError, match=r"parameters='nprobe=3'.*give a factory"):
        SequenceIndex.build(model, passages, tmp_path / "index", parameters="nprobe=3", progress=False)
    with pytest.raises(ValueError, match="has 64 clusters for 11 passages"):
        SequenceIndex.build(model, passages, tmp_path / "index", factory="IVF64,Flat", progress=False)
    assert os.listdir(tmp_path) == []


def test_rows_in_memory_are_a_copy(index, more):
    embeddings = torch.ones(2, 3)
    made = SequenceIndex(more, embeddings, index.origin)
    embeddings.zero_()
    assert made.embeddings.min() == 1


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_a_folder_is_searched_as_memory_is(model, index, built, monkeypatch, engine, in_memory, same_index):
    monkeypatch.setattr(search, "IN_MEMORY", 1 << 30 if in_memory else 0)
    loaded = SequenceIndex.load(built, model, engine=engine)
    assert [len(block) for block in loaded.blocks()] == [4, 4, 3]
    assert torch.equal(torch.cat(list(loaded.blocks())), loaded.embeddings)
    same_index(loaded, index)
    assert loaded.passages[-1] == index.passages[10]
    assert loaded.passages[2:6] == list(index.passages)[2:6]
    with pytest.raises(IndexError, match="row 11 of 11"):
        loaded.passages[11]


def test_save_and_load(model, index, built, tmp_path):
    assert sorted(os.listdir(built)) == ["build.json", "index.json", "shard-00000", "shard-00001", "shard-00002"]
    files = ["passages.jsonl", "rows.npy", "shard.json", "vectors.npy"]
    assert all(sorted(os.listdir(built / f"shard-0000{i}")) == files for i in range(3))
    assert os.listdir(built.parent) == ["index"]
    index.save(tmp_path / "a")
    loaded = SequenceIndex.load(tmp_path / "a", model)
    loaded.save(tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    again = SequenceIndex.load(tmp_path / "b", model)
    for other in (loaded, again):
        assert torch.equal(other.embeddings, index.embeddings)
        assert other.origin == index.origin
        assert list(other.passages) == list(index.passages)
    stamp = json.loads((built / "index.json").read_text())
    assert stamp["origin"]["fingerprint"] == model.fingerprint()
    assert (stamp["count"], stamp["dim"], stamp["format_version"]) == (11, 32, 2)
    with pytest.raises(ValueError, match="is where this index lives already"):
        again.save(tmp_path / "b")


def test_save_replaces_an_earlier_index(model, saved, more):
    small = SequenceIndex.build(model, more, progress=False)
    small.save(saved)
    assert list(SequenceIndex.load(saved, model).passages) == more
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
def test_a_crash_while_saving_leaves_the_earlier_index(model, index, saved, monkeypatch, stage, more, same_index):
    def crash(*args, **kwargs):
        raise OSError("disk full")

    place = {
        "vectors": ("cosup_fast.index.changes.save_array", crash),
        "passages": ("cosup_fast.index.changes.write_passages", crash),
        "sync": ("os.fsync", crash),
    }
    small = SequenceIndex.build(model, more, progress=False)
    if stage == "rename":
        rename = type(saved).rename
        monkeypatch.setattr(
            type(saved), "rename", lambda self, to: crash() if self.name.endswith(".new") else rename(self, to)
        )
    else:
        monkeypatch.setattr(*place[stage])
    with pytest.raises(OSError, match="disk full"):
        small.save(saved)
    monkeypatch.undo()
    same_index(SequenceIndex.load(saved, model), index)
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


@pytest.mark.parametrize("name", ["vectors.npy", "passages.jsonl", "rows.npy", "shard.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "longer", "empty", "missing"])
def test_damaged_files_are_refused(model, saved, name, damage):
    path = saved / "shard-00001" / name
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
    if damage != "flipped":
        with pytest.raises(ValueError, match=rf"{name}.*build the index again"):
            SequenceIndex.load(saved, model, verify=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not an index"),
        (b"", "damaged"),
        (b"[]", "damaged"),
        (b"\xff", "damaged"),
        (b"{}", "damaged"),
        (b'{"format_version": 2}', "damaged"),
        (b'{"format_version": 7}', "format_version 7, this release reads 2: build the index again"),
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
    with pytest.raises(ValueError, match=r"says 10 vectors of width 32, there are 11 of \[32\]"):
        SequenceIndex.load(saved, model)


def test_nothing_that_was_pickled_is_read(model, saved):
    folder = saved / "shard-00001"
    np.save(folder / "vectors.npy", np.array([{"a": 1}] * 4), allow_pickle=True)
    write_record(folder, "shard.json", ("passages.jsonl", "rows.npy", "vectors.npy"))
    stamp = json.loads((saved / "index.json").read_text())
    stamp["shards"]["shard-00001"] = sha256(folder / "shard.json")
    (saved / "index.json").write_text(json.dumps(stamp))
    with pytest.raises(ValueError, match="Array can't be memory-mapped: Python objects in dtype"):
        SequenceIndex.load(saved, model)


def test_missing_faiss_is_named_before_any_work(model, passages, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr(model, "embed", None)
    for options in ({"engine": "faiss"}, {"factory": "HNSW8", "folder": tmp_path / "i"}):
        with pytest.raises(ImportError, match=r"pip install 'cosup-fast\[index\]'"):
            SequenceIndex.build(model, passages, **options)


def test_unusual_unicode_goes_in_and_out(model, tmp_path):
    texts = [
        "\u2028 line \u2029 ends \x85",
        "\x00\x1f control",
        "e\u0301 é",
        "\ufeff mark",
        "🏳️‍🌈 \U0010ffff",
        "\r\n\t x",
    ]
    odd = [Passage(id=f"\u202e{i}\n{text}", title=text, text=text) for i, text in enumerate(texts)]
    SequenceIndex.build(model, odd, tmp_path / "index", options=SMALL)
    index = SequenceIndex.load(tmp_path / "index", model)
    assert list(index.passages) == odd
    torch.testing.assert_close(index.embeddings, embed_passages(model, odd), rtol=0, atol=2e-6)
    index.delete([odd[2].id])
    assert [p.id for p in index.passages] == [p.id for p in odd if p is not odd[2]]
