"""Additions and deletions leave the index that a new build would make, or the one that was there."""

import json
import os

import pytest

from cosup_fast.data.records import Passage
from cosup_fast.index import Options, SequenceIndex
from cosup_fast.index.origin import Stamp
from cosup_fast.index.shards import Shard

SMALL = Options(shard_size=4, progress=False)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_add_and_delete_are_what_a_new_index_would_be(model, passages, saved, place, more, same_index):
    def start():
        if place == "folder":
            return SequenceIndex.load(saved, model)
        return SequenceIndex.build(model, passages, progress=False)

    index = start()
    index.add(model, more, progress=False)
    same_index(index, SequenceIndex.build(model, [*passages, *more], progress=False))
    index.delete(["rome", "x", "paris", "rome"])
    left = [p for p in [*passages, *more] if p.id not in ("rome", "x", "paris")]
    whole = SequenceIndex.build(model, left, progress=False)
    same_index(index, whole)
    assert "oslo" in index
    assert "rome" not in index
    index.add(model, [passages[0]], progress=False)
    index.delete([])
    index.add(model, [], progress=False)
    index.delete(["paris"])
    if place == "folder":
        index = SequenceIndex.load(saved, model)
        assert {name for name in os.listdir(saved) if name.startswith("shard")} == set(Stamp.read(saved).shards)
    same_index(index, whole)
    assert os.listdir(saved.parent) == ["index"]


def _lengths(folder):
    """How many passages each shard holds."""
    return [len(Shard.open(folder / name)) for name in Stamp.read(folder).shards]


def test_small_additions_share_a_shard_and_full_ones_stand_alone(model, passages, saved, monkeypatch, more, same_index):
    monkeypatch.setattr("cosup_fast.index.changes.SMALL", 4)
    index = SequenceIndex.load(saved, model)
    assert _lengths(saved) == [4, 4, 3]
    index.add(model, more[:1], progress=False)
    assert _lengths(saved) == [4, 4, 4]
    index.add(model, more[1:], progress=False)
    assert _lengths(saved) == [4, 4, 4, 1]
    index.delete([p.id for p in passages[4:8]])
    assert _lengths(saved) == [4, 4, 1]
    same_index(SequenceIndex.load(saved, model), index)


@pytest.mark.parametrize("place", ["memory", "folder"])
def test_refused_changes_leave_the_index_as_it_was(model, make_model, passages, saved, place, same_index):
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
        same_index(SequenceIndex.load(saved, model), index)


@pytest.mark.parametrize("change", ["add", "delete"])
@pytest.mark.parametrize("file", ["vectors.npy", "passages.jsonl", "shard.json"])
def test_a_change_gives_no_fresh_checksum_to_damaged_data(model, passages, saved, change, file, more):
    """A byte of the last shard, which both changes rewrite, is flipped after the index was loaded."""
    index = SequenceIndex.load(saved, model)
    last = saved / list(Stamp.read(saved).shards)[-1]
    damaged = bytearray((last / file).read_bytes())
    damaged[-6 if file == "passages.jsonl" else -3] ^= 1  # in a word of a text
    (last / file).write_bytes(damaged)
    stamp = (saved / "index.json").read_bytes()
    with pytest.raises(ValueError, match=rf"{file}.*build the index again"):
        index.add(model, more, progress=False) if change == "add" else index.delete([passages[-1].id])
    assert (saved / "index.json").read_bytes() == stamp


def test_a_deletion_fills_no_approximate_index_with_damaged_data(model, passages, tmp_path):
    """A byte of a shard that the deletion leaves alone, but that the approximate index is filled with again."""
    folder = tmp_path / "index"
    SequenceIndex.build(model, passages, folder, factory="Flat", options=SMALL)
    first = folder / "shard-00000" / "vectors.npy"
    damaged = bytearray(first.read_bytes())
    damaged[-3] ^= 1
    first.write_bytes(damaged)
    stamp = (folder / "index.json").read_bytes()
    with pytest.raises(ValueError, match=r"shard-00000/vectors\.npy was altered.*build the index again"):
        SequenceIndex.open(folder, verify=False).delete([passages[-1].id])
    assert (folder / "index.json").read_bytes() == stamp


def test_an_approximate_index_whose_parameters_are_damaged_names_the_file(model, passages, tmp_path):
    SequenceIndex.build(model, passages, tmp_path / "index", factory="Flat", options=SMALL)
    path = tmp_path / "index" / "index.json"
    path.write_text(path.read_text().replace('"parameters": ""', '"parameters": "nprobes=3"'))
    with pytest.raises(ValueError, match=r"index.json: parameters='nprobes=3' are not those of this FAISS index"):
        SequenceIndex.open(tmp_path / "index")


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


def test_a_change_under_another_process_is_refused(model, saved, same_index):
    ours, theirs = (SequenceIndex.load(saved, model) for _ in range(2))
    theirs.delete(["rome"])
    with pytest.raises(ValueError, match="changed by another process meanwhile: load it again"):
        ours.delete(["paris"])
    assert ours.retrieve(ours.embeddings[0], 1)[0][0].id == "paris"  # what is mapped stays readable
    same_index(SequenceIndex.load(saved, model), theirs)


@pytest.mark.parametrize("stage", ["link", "write", "stamp"])
def test_a_change_that_fails_leaves_the_earlier_index_and_is_done_by_the_next_try(
    model, passages, saved, monkeypatch, stage, more, same_index
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
        index.add(model, more, progress=False)
    monkeypatch.undo()
    assert list(SequenceIndex.load(saved, model).passages) == passages
    monkeypatch.setattr("cosup_fast.index.build.embed_sequences", None)  # they are embedded already
    index.add(model, more, progress=False)
    monkeypatch.undo()
    same_index(index, SequenceIndex.build(model, [*passages, *more], progress=False))
    assert os.listdir(saved.parent) == ["index"]
    assert len([name for name in os.listdir(saved) if name.startswith("shard")]) == len(Stamp.read(saved).shards)


def test_what_was_added_before_the_kill_is_not_added_twice(model, passages, saved, monkeypatch, more):
    index = SequenceIndex.load(saved, model)
    monkeypatch.setattr("cosup_fast.index.build.Build.discard", lambda self: None)  # killed between the two
    index.add(model, more, progress=False)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="all of its 2 passages are in the index already"):
        SequenceIndex.load(saved, model).add(model, more, progress=False)
    assert os.listdir(saved.parent) == ["index"]
    assert len(SequenceIndex.load(saved, model)) == len(passages) + 2


def test_an_approximate_index_follows_every_change(model, passages, tmp_path, more, same_index):
    folder = tmp_path / "index"
    index = SequenceIndex.build(model, passages, folder, factory="IVF2,Flat", parameters="nprobe=2", options=SMALL)
    exact = SequenceIndex.build(model, passages, progress=False)
    for change in (
        lambda i: i.add(model, more, progress=False),
        lambda i: i.delete(["rome", "oslo"]),
        lambda i: i.add(model, [more[0]], progress=False),
    ):
        same_index(index, exact)
        change(index)
        change(exact)
        loaded = SequenceIndex.load(folder, model)
        assert loaded.approximate.nprobe == 2
        same_index(loaded, exact)
        same_index(SequenceIndex.load(folder, model, engine="torch"), exact)
        assert len([name for name in os.listdir(folder) if name.startswith("approximate")]) == 1
    index.save(tmp_path / "copy")
    same_index(SequenceIndex.load(tmp_path / "copy", model, engine="approximate"), exact)
    (path,) = folder.glob("approximate-*")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"approximate-3\.faiss is missing, damaged or changed"):
        SequenceIndex.load(folder, model)
    exact.save(tmp_path / "exact")
    with pytest.raises(ValueError, match="no approximate FAISS index"):
        SequenceIndex.load(tmp_path / "exact", model, engine="approximate")
