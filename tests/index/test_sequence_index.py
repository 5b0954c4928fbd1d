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
from cosup_fast.index import Options, SequenceIndex, embed_passages, search
from cosup_fast.index.origin import Stamp
from cosup_fast.index.shards import Shard

MORE = [Passage(id="oslo", title="Oslo", text="Oslo is the capital of Norway."), Passage(id="x", title="X", text="y")]
SMALL = Options(shard_size=4, progress=False)


@pytest.fixture(scope="module")
def index(model, passages) -> SequenceIndex:
    return SequenceIndex.build(model, passages, progress=False)


@pytest.fixture(scope="module")
def built(model, passages, tmp_path_factory):
    """An index of three shards in a folder; tests must leave it as it is."""
    folder = tmp_path_factory.mktemp("built") / "index"
    SequenceIndex.build(model, passages, folder, options=SMALL)
    return folder


@pytest.fixture
def saved(built, tmp_path):
    return shutil.copytree(built, tmp_path / "index")


def _same(a: SequenceIndex, b: SequenceIndex) -> None:
    assert list(a.passages) == list(b.passages)
    torch.testing.assert_close(a.embeddings, b.embeddings, rtol=0, atol=2e-6)
    queries = torch.randn(4, a.dim, generator=torch.Generator().manual_seed(1))
    ours, theirs = a.search(queries, 5), b.search(queries, 5)
    assert torch.equal(ours[1], theirs[1])
    torch.testing.assert_close(ours[0], theirs[0])


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


def test_wrong_corpora_are_refused(model, passages, index, tmp_path):
    for folder in (None, tmp_path / "index"):
        with pytest.raises(ValueError, match="empty corpus"):
            SequenceIndex.build(model, [], folder, progress=False)
        with pytest.raises(ValueError, match="'paris'"):
            SequenceIndex.build(model, [*passages, passages[0]], folder, progress=False)
        with pytest.raises(ValueError, match=r"'p' has .* tokens"):
            SequenceIndex.build(model, [Passage(id="p", title="", text="word " * 400)], folder, progress=False)
    with pytest.raises(ValueError, match=r"\(2, width\), got shape \(3, 32\)"):
        SequenceIndex(MORE, torch.zeros(3, 32), index.origin)
    with pytest.raises(ValueError, match="'x' occurs more than once"):
        SequenceIndex([MORE[1], MORE[1]], torch.zeros(2, 32), index.origin)
    with pytest.raises(ValueError, match="'x' is not finite"):
        SequenceIndex(MORE, torch.tensor([[0.0], [torch.inf]]), index.origin)
    with pytest.raises(ValueError, match=r"factory='HNSW8': an approximate index lives in a folder"):
        SequenceIndex.build(model, passages, factory="HNSW8", progress=False)
    with pytest.raises(ValueError, match=r"parameters='nprobe=3'.*give a factory"):
        SequenceIndex.build(model, passages, tmp_path / "index", parameters="nprobe=3", progress=False)
    with pytest.raises(ValueError, match="has 64 clusters for 11 passages"):
        SequenceIndex.build(model, passages, tmp_path / "index", factory="IVF64,Flat", progress=False)
    assert os.listdir(tmp_path) == []


def test_rows_in_memory_are_a_copy(index):
    embeddings = torch.ones(2, 3)
    made = SequenceIndex(MORE, embeddings, index.origin)
    embeddings.zero_()
    assert made.embeddings.min() == 1


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_add_and_delete_are_what_a_new_index_would_be(model, passages, saved, place):
    def start():
        if place == "folder":
            return SequenceIndex.load(saved, model)
        return SequenceIndex.build(model, passages, progress=False)

    index = start()
    index.add(model, MORE, progress=False)
    _same(index, SequenceIndex.build(model, [*passages, *MORE], progress=False))
    index.delete(["rome", "x", "paris", "rome"])
    left = [p for p in [*passages, *MORE] if p.id not in ("rome", "x", "paris")]
    whole = SequenceIndex.build(model, left, progress=False)
    _same(index, whole)
    assert "oslo" in index
    assert "rome" not in index
    index.add(model, [passages[0]], progress=False)
    index.delete([])
    index.add(model, [], progress=False)
    index.delete(["paris"])
    if place == "folder":
        index = SequenceIndex.load(saved, model)
        assert {name for name in os.listdir(saved) if name.startswith("shard")} == set(Stamp.read(saved).shards)
    _same(index, whole)
    assert os.listdir(saved.parent) == ["index"]


def _lengths(folder):
    """How many passages each shard holds."""
    return [len(Shard.open(folder / name)) for name in Stamp.read(folder).shards]


def test_small_additions_share_a_shard_and_full_ones_stand_alone(model, passages, saved, monkeypatch):
    monkeypatch.setattr("cosup_fast.index.changes.SMALL", 4)
    index = SequenceIndex.load(saved, model)
    assert _lengths(saved) == [4, 4, 3]
    index.add(model, MORE[:1], progress=False)
    assert _lengths(saved) == [4, 4, 4]
    index.add(model, MORE[1:], progress=False)
    assert _lengths(saved) == [4, 4, 4, 1]
    index.delete([p.id for p in passages[4:8]])
    assert _lengths(saved) == [4, 4, 1]
    _same(SequenceIndex.load(saved, model), index)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_refused_changes_leave_the_index_as_it_was(model, make_model, passages, saved, place):
    index = SequenceIndex.load(saved, model)
    if place == "memory":
        index = SequenceIndex(list(index.passages), index.embeddings, index.origin)
    new = Passage(id="new", title="", text="n")
    with pytest.raises(ValueError, match="'go'"):
        index.add(model, [new, passages[3]], progress=False)
    with pytest.raises(ValueError, match="'new'"):
        index.add(model, [new, new], progress=False)
    with pytest.raises(ValueError, match=r"'p' has .* tokens"):
        index.add(model, [new, Passage(id="p", title="", text="word " * 400)], progress=False)
    with pytest.raises(ValueError, match=r"text\.passage"):
        index.add(make_model(text={"passage": "{text}"}), [new], progress=False)
    with pytest.raises(ValueError, match="precision='bfloat16': this index was built with 'float32'"):
        index.add(model, [new], options=Options(precision="bfloat16", progress=False))
    with pytest.raises(ValueError, match=r"no passage has the id 'nobody' \(2 of 3 ids are not there\)"):
        index.delete(["paris", "nobody", "none"])
    with pytest.raises(ValueError, match="an index needs at least one"):
        index.delete([p.id for p in passages])
    assert list(index.passages) == passages
    assert os.listdir(saved.parent) == ["index"]
    if place == "folder":
        _same(SequenceIndex.load(saved, model), index)


@pytest.mark.parametrize("change", ["add", "delete"])
@pytest.mark.parametrize("file", ["vectors.npy", "passages.jsonl", "shard.json"])
def test_a_change_gives_no_fresh_checksum_to_damaged_data(model, passages, saved, change, file):
    """A byte of the last shard, which both changes rewrite, is flipped after the index was loaded."""
    index = SequenceIndex.load(saved, model)
    last = saved / list(Stamp.read(saved).shards)[-1]
    damaged = bytearray((last / file).read_bytes())
    damaged[-6 if file == "passages.jsonl" else -3] ^= 1  # in a word of a text
    (last / file).write_bytes(damaged)
    stamp = (saved / "index.json").read_bytes()
    with pytest.raises(ValueError, match=rf"{file}.*build the index again"):
        index.add(model, MORE, progress=False) if change == "add" else index.delete([passages[-1].id])
    assert (saved / "index.json").read_bytes() == stamp


def test_a_change_keeps_the_checksums_of_shards_that_it_leaves_alone(model, passages, saved):
    index = SequenceIndex.load(saved, model)
    first = saved / next(iter(Stamp.read(saved).shards))
    (first / "shard.json").write_bytes((first / "shard.json").read_bytes().replace(b"1", b"2", 1))
    index.delete([passages[-1].id])
    with pytest.raises(ValueError, match=r"was altered|its manifest says"):
        SequenceIndex.load(saved, model)


def test_an_index_that_names_folders_elsewhere_is_refused(model, saved):
    stamp = json.loads((saved / "index.json").read_text())
    for name in ("../shard-00000", "/tmp/shard-00000", "shard-0/../../x"):
        changed = {**stamp, "shards": {name: "0" * 64}}
        (saved / "index.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="is damaged, build the index again"):
            SequenceIndex.load(saved, model)


def test_a_change_under_another_process_is_refused(model, saved):
    ours, theirs = (SequenceIndex.load(saved, model) for _ in range(2))
    theirs.delete(["rome"])
    with pytest.raises(ValueError, match="changed by another process meanwhile: load it again"):
        ours.delete(["paris"])
    assert ours.retrieve(ours.embeddings[0], 1)[0][0].id == "paris"  # what is mapped stays readable
    _same(SequenceIndex.load(saved, model), theirs)


@pytest.mark.parametrize("stage", ["link", "write", "stamp"])
def test_a_change_that_fails_leaves_the_earlier_index_and_is_done_by_the_next_try(
    model, passages, saved, monkeypatch, stage
):
    def crash(*args, **kwargs):
        raise OSError("disk full")

    index = SequenceIndex.load(saved, model)
    place = {
        "link": ("cosup_fast.index.changes.link_file", crash),
        "write": ("cosup_fast.index.changes.write_shard", crash),
        "stamp": ("cosup_fast.index.origin.Stamp.write", crash),
    }
    monkeypatch.setattr(*place[stage])
    with pytest.raises(OSError, match="disk full"):
        index.add(model, MORE, progress=False)
    monkeypatch.undo()
    assert list(SequenceIndex.load(saved, model).passages) == passages
    monkeypatch.setattr("cosup_fast.index.build.embed_sequences", None)  # they are embedded already
    index.add(model, MORE, progress=False)
    monkeypatch.undo()
    _same(index, SequenceIndex.build(model, [*passages, *MORE], progress=False))
    assert os.listdir(saved.parent) == ["index"]
    assert len([name for name in os.listdir(saved) if name.startswith("shard")]) == len(Stamp.read(saved).shards)


def test_what_was_added_before_the_kill_is_not_added_twice(model, passages, saved, monkeypatch):
    index = SequenceIndex.load(saved, model)
    monkeypatch.setattr("cosup_fast.index.build.Build.discard", lambda self: None)  # killed between the two
    index.add(model, MORE, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="all of its 2 passages are in the index already"):
        SequenceIndex.load(saved, model).add(model, MORE, progress=False)
    assert os.listdir(saved.parent) == ["index"]
    assert len(SequenceIndex.load(saved, model)) == len(passages) + 2


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("engine", ["faiss", "torch"])
def test_a_folder_is_searched_as_memory_is(model, index, built, monkeypatch, engine, in_memory):
    monkeypatch.setattr(search, "IN_MEMORY", 1 << 30 if in_memory else 0)
    loaded = SequenceIndex.load(built, model, engine=engine)
    assert [len(block) for block in loaded.blocks()] == [4, 4, 3]
    assert torch.equal(torch.cat(list(loaded.blocks())), loaded.embeddings)
    _same(loaded, index)
    assert loaded.passages[-1] == index.passages[10]
    assert loaded.passages[2:6] == list(index.passages)[2:6]
    with pytest.raises(IndexError, match="row 11 of 11"):
        loaded.passages[11]


def test_an_approximate_index_follows_every_change(model, passages, tmp_path):
    folder = tmp_path / "index"
    index = SequenceIndex.build(model, passages, folder, factory="IVF2,Flat", parameters="nprobe=2", options=SMALL)
    exact = SequenceIndex.build(model, passages, progress=False)
    for change in (
        lambda i: i.add(model, MORE, progress=False),
        lambda i: i.delete(["rome", "oslo"]),
        lambda i: i.add(model, [MORE[0]], progress=False),
    ):
        _same(index, exact)
        change(index)
        change(exact)
        loaded = SequenceIndex.load(folder, model)
        assert loaded.approximate.nprobe == 2
        _same(loaded, exact)
        _same(SequenceIndex.load(folder, model, engine="torch"), exact)
        assert len([name for name in os.listdir(folder) if name.startswith("approximate")]) == 1
    index.save(tmp_path / "copy")
    _same(SequenceIndex.load(tmp_path / "copy", model, engine="approximate"), exact)
    (path,) = folder.glob("approximate-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"approximate-3\.faiss is missing, damaged or changed"):
        SequenceIndex.load(folder, model)
    exact.save(tmp_path / "exact")
    with pytest.raises(ValueError, match="no approximate FAISS index"):
        SequenceIndex.load(tmp_path / "exact", model, engine="approximate")


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


def test_save_replaces_an_earlier_index(model, saved):
    small = SequenceIndex.build(model, MORE, progress=False)
    small.save(saved)
    assert list(SequenceIndex.load(saved, model).passages) == MORE
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
        "vectors": ("cosup_fast.index.changes.save_array", crash),
        "passages": ("cosup_fast.index.changes.write_passages", crash),
        "sync": ("os.fsync", crash),
    }
    small = SequenceIndex.build(model, MORE, progress=False)
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
    _same(SequenceIndex.load(saved, model), index)
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
    import numpy as np

    from cosup_fast.index.shards import write_record

    folder = saved / "shard-00001"
    np.save(folder / "vectors.npy", np.array([{"a": 1}] * 4), allow_pickle=True)
    write_record(folder, "shard.json", ("passages.jsonl", "rows.npy", "vectors.npy"))
    stamp = json.loads((saved / "index.json").read_text())
    from cosup_fast.files import sha256

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
