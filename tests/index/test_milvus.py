"""An index in Milvus finds what one in a folder finds, survives interruptions, and says what is wrong with a server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("pymilvus", reason="needs cosup-fast[milvus]")
pytest.importorskip("milvus_lite", reason="needs cosup-fast[milvus]")

import pymilvus

from cosup_fast.data.records import DataError, Passage, write_jsonl
from cosup_fast.index import Options, SequenceIndex, collection, milvus, search
from cosup_fast.index import build as build_module
from cosup_fast.index.collection import AT_ONCE, Collection, Place, StoreError
from cosup_fast.index.milvus import MilvusIndex
from cosup_fast.index.stores import build_index, index_exists, load_index, open_index

SMALL = Options(shard_size=4, progress=False)
# Ids that filters cannot quote, and texts that are embedded alike.
NASTY = [Passage(id=name, title="Same", text="the same text") for name in ('a"b', "c\\d", "e'f", "g\nh", "😀", "{x}")]


@pytest.fixture
def place(tmp_path) -> str:
    return f"milvus:{tmp_path / 'index.db'}"


@pytest.fixture
def built(model, passages, place, tmp_path) -> str:
    build_index(model, [*passages, *NASTY], place, tmp_path, options=SMALL)
    return place


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(collection, "PATIENCE", 1.0)


def same(store: MilvusIndex, folder: SequenceIndex) -> None:
    """Everything that can be asked of both has the same answer, scores to the bit."""
    assert list(store.passages) == list(folder.passages)
    assert [store.passages[row] for row in (-1, 0, 3)] == [folder.passages[row] for row in (-1, 0, 3)]
    assert len(store) == len(folder)
    assert dict(store.by_id) == dict(folder.by_id)
    assert torch.equal(store.embeddings, folder.embeddings)
    queries = torch.cat([torch.randn(40, store.dim, generator=torch.Generator().manual_seed(0)), store.embeddings])
    for k in (1, 5, 100):
        ours, theirs = store.search(queries, k), folder.search(queries, k)
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    assert store.retrieve_all(queries, 3) == folder.retrieve_all(queries, 3)


def test_it_finds_what_faiss_finds_also_after_changes(model, passages, built, tmp_path):
    store = load_index(built, model)
    assert isinstance(store, MilvusIndex)
    folder = SequenceIndex.build(model, [*passages, *NASTY], tmp_path / "index", options=SMALL, engine="faiss")
    same(store, folder)
    other = load_index(built, model)
    store.delete(["rome", 'a"b', "g\nh"])
    with pytest.raises(StoreError, match="changed by another process"):
        other.delete(["paris"])
    folder.delete(["rome", 'a"b', "g\nh"])
    same(store, folder)
    more = [Passage(id=f"new{i}", title="Same", text="the same text") for i in range(6)]
    store.add(model, more, work=tmp_path / "work", options=SMALL)
    folder.add(model, more, options=SMALL)
    same(store, folder)
    same(load_index(built, model), folder)
    assert store.stamp.generation == 2
    assert not list(tmp_path.glob(".*milvus*"))
    with pytest.raises(DataError, match="expected ids that the index does not have, found 'paris'"):
        store.add(model, [passages[0], Passage(id="z", title="", text="z")], work=tmp_path / "work", options=SMALL)
    for ids, message in ((["rome"], "no passage has the id 'rome'"), ([p.id for p in store.passages], "all passages")):
        with pytest.raises(ValueError, match=message):
            store.delete(ids)
    same(store, folder)


def test_an_interrupted_build_resumes_and_the_earlier_index_is_searched_until_then(
    model, passages, built, tmp_path, monkeypatch
):
    corpus = list(reversed(passages))
    upsert, sent = Collection.upsert, []

    def interrupted(self, part, vectors, start):
        if len(sent) == 2:
            raise KeyboardInterrupt
        sent.append(start)
        upsert(self, part, vectors, start)

    monkeypatch.setattr(Collection, "upsert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_index(model, corpus, built, tmp_path, options=SMALL)
    assert [p.id for p in open_index(built).passages] == [p.id for p in [*passages, *NASTY]]
    with pytest.raises(ValueError, match="holds an unfinished build of another corpus"):
        build_index(model, passages, built, tmp_path, options=SMALL)

    monkeypatch.setattr(build_module, "embed_sequences", None)  # nothing is embedded again
    monkeypatch.setattr(Collection, "upsert", lambda self, *a: sent.append(a[2]) or upsert(self, *a))
    monkeypatch.setattr(Collection, "take_name", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(model, corpus, built, tmp_path, options=SMALL)
    assert sent == [0, 4, 8], "what was sent whole is not sent again"
    monkeypatch.undo()
    monkeypatch.setattr(build_module, "embed_sequences", None)
    monkeypatch.setattr(Collection, "upsert", None)
    assert build_index(model, corpus, built, tmp_path, options=SMALL) == len(corpus)
    assert [p.id for p in load_index(built, model).passages] == [p.id for p in corpus]


def test_rows_of_an_interrupted_addition_are_not_found(model, passages, built, tmp_path, monkeypatch):
    more = [Passage(id=f"new{i}", title="Same", text="the same text") for i in range(6)]
    store, write_sent = load_index(built, model), Collection.write_sent
    before = store.retrieve_all(store.embeddings, 100)

    def interrupted(self, shards):
        write_sent(self, shards)
        if shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(Collection, "write_sent", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.add(model, more, work=tmp_path / "work", options=SMALL)
    monkeypatch.undo()
    again = load_index(built, model)
    assert "unfinished" in again.describe()
    assert "new0" not in again
    assert again.retrieve_all(again.embeddings, 100) == store.retrieve_all(store.embeddings, 100) == before
    another = [Passage(id="other", title="", text="another addition"), *more[:1]]
    again.add(model, another, work=tmp_path / "other", options=SMALL)
    assert [p.id for p in again.passages][-2:] == ["other", "new0"]
    assert len(again) == len(passages) + len(NASTY) + 2


def test_the_command_line_takes_it_wherever_it_takes_a_folder(
    cosup, checkpoint, model, data_folder, place, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    for entry in checkpoint.iterdir():
        (tmp_path / "run" / entry.name).symlink_to(entry)
    run, corpus, examples = tmp_path / "run", data_folder / "passages.jsonl", data_folder / "examples.jsonl"
    results = {}
    for name, how in ((place, "--store"), (str(tmp_path / "index"), "--output")):
        status, out, err = cosup("index", "build", run, "--corpus", corpus, how, name)
        assert (status, "(11 passages)" in out) == (0, True), err
        outputs = []
        for command in (
            ("index", "search", run, "Where?", "-k", 20),
            ("generate", run, "What is the capital of France?", "--json", "--max-new-tokens", 8, "--ret-first"),
        ):
            status, out, err = cosup(*command, "--index", name)
            assert status == 0, err
            outputs.append(re.sub(r'"[a-z_]*seconds": [0-9.e-]+', "", out))
        mined = tmp_path / f"mined{how}.jsonl"
        options = ["--examples", examples, "--output", mined, "--max-score", "0.99"]
        assert cosup("mine", run, *options, "--index", name)[0] == 0
        outputs.append(mined.read_text())
        evaluated = tmp_path / f"evaluated{how}"
        options = ["--examples", examples, "--max-new-tokens", 4, "--fluency", "none", "--output", evaluated]
        status, _, err = cosup("evaluate", run, *options, "--index", name)
        assert status == 0, err
        report = json.loads((evaluated / "report.json").read_text())
        outputs.append([report["overall"], *((one["ranks"], one["scores"]) for one in report["questions"])])
        write_jsonl(tmp_path / "more.jsonl", [Passage(id="oslo", title="Oslo", text="Oslo is in Norway.")])
        status, out, err = cosup("index", "add", run, tmp_path / "more.jsonl", "--index", name)
        assert (status, "added 1 passages" in out) == (0, True), err
        status, out, err = cosup("index", "delete", name, "rome", "go")
        assert (status, "(10 passages)" in out) == (0, True), err
        status, out, err = cosup("index", "info", name)
        assert (status, "passages │ 10" in " ".join(out.split())) == (0, True), err
        results[how] = outputs
    assert results["--store"] == results["--output"]
    assert "FLAT" in cosup("index", "info", place)[1]
    assert "--verify compares the files" in cosup("index", "info", place, "--verify")[2]
    assert "is searched by Milvus" in cosup("index", "search", run, "x", "--index", place, "--engine", "torch")[2]
    assert "give one of them" in cosup("index", "build", run, "--store", place, "--output", tmp_path / "x")[2]
    from cosup_fast.cli.serve import index_of

    assert len(index_of(run, place, model, False)) == 10


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX processes")
def test_ranks_share_the_embedding_and_one_of_them_writes(checkpoint, model, passages, place, tmp_path):
    write_jsonl(tmp_path / "passages.jsonl", passages)
    script = Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), "ranks", str(checkpoint), str(tmp_path / "passages.jsonl"), place]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    same(load_index(place, model), SequenceIndex.build(model, passages, tmp_path / "index", options=SMALL))


def test_an_approximate_index_is_searched_with_its_parameters(model, passages, place, tmp_path):
    build_index(model, passages, place, tmp_path, factory="HNSW", parameters="ef=32", options=SMALL)
    store = load_index(place, model)
    assert store.describe()["index"] == 'HNSW {"ef": 32}'
    assert store.candidates()[1] is False
    _, rows = store.search(store.embeddings, 1)
    assert rows[:, 0].tolist() == list(range(len(passages)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("milvus:localhost", {}, "is not a Milvus address"),
        ("milvus:x.db#a-b", {}, "'a-b' is not a valid collection name"),
        ("milvus:x.db#a_building", {}, "_building at its end is kept for unfinished builds"),
        ("milvus:x.db", {"factory": "IVF4096,PQ64"}, "in Milvus choose one of FLAT"),
        ("milvus:x.db", {"parameters": "ef=64"}, "an exact search has none"),
        ("milvus:x.db", {"factory": "HNSW", "parameters": "ef"}, "expected NAME=NUMBER"),
    ],
)
def test_mistakes_are_named_before_anything_is_done(model, passages, tmp_path, monkeypatch, name, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_index(model, passages, name, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_passage_that_milvus_cannot_hold_is_named(model, place, tmp_path):
    write_jsonl(tmp_path / "long.jsonl", [Passage(id="a", title="é" * 33000, text="x")])
    with pytest.raises(DataError, match=r"long\.jsonl:1: title: expected at most 65,535 bytes.*found 66,000"):
        build_index(model, tmp_path / "long.jsonl", place, tmp_path, options=SMALL)


def test_without_pymilvus_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'cosup-fast[milvus]'")):
        open_index("milvus:http://127.0.0.1:1")


def test_an_index_of_another_model_or_width_is_refused(make_model, gpt2_folder, built):
    other = make_model(text={"max_passage_tokens": 100})
    with pytest.raises(ValueError, match=r"was not built by this model: its text.max_passage_tokens is 512"):
        load_index(built, other)
    assert len(load_index(built, other, allow_stale=True)) == 17
    with pytest.raises(ValueError, match="would not match the index"):
        load_index(built, other, allow_stale=True).add(other, NASTY)
    with pytest.raises(ValueError, match="has vectors of width 32, this model has 24"):
        load_index(built, make_model(gen=gpt2_folder), allow_stale=True)


def tampered(built: str, change) -> None:
    store = Collection(Place.parse(built))
    change(store, store.stamp())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s, stamp: s.write_stamp(stamp.model_copy(update={"version": 9})),
            "has version 9, this release reads 1",
        ),
        (
            lambda s, stamp: s.call("alter_collection_properties", properties={"cosup.stamp": "{"}),
            "stamp .* is damaged",
        ),
        (lambda s, stamp: s.write_stamp(stamp.model_copy(update={"dim": 64})), "width 32, the stamp says .* width 64"),
        (lambda s, stamp: s.write_stamp(stamp.model_copy(update={"state": "building"})), "is being built"),
        (lambda s, stamp: s.drop(), "has no collection 'cosup'"),
    ],
)
def test_a_collection_that_was_changed_is_refused(built, change, message):
    tampered(built, change)
    with pytest.raises(StoreError, match=message):
        open_index(built)


def test_a_collection_of_something_else_is_left_alone(model, passages, place, tmp_path):
    store = Collection(Place.parse(place))
    store.call("create_collection", dimension=8)
    for use in (open_index, lambda name: build_index(model, passages, name, tmp_path, options=SMALL)):
        with pytest.raises(StoreError, match=r"a collection of something else: name another one, as .*#cosup_2"):
            use(place)
    assert store.exists()
    assert index_exists(place)
    assert not index_exists(f"{place}#other")
    assert not index_exists(f"milvus:{tmp_path / 'mistyped.db'}")
    assert not (tmp_path / "mistyped.db").exists()


def test_a_collection_of_something_else_is_not_dropped_for_a_build(model, passages, place, tmp_path):
    store = Collection(Place.parse(place)).named("cosup_building")
    store.call("create_collection", dimension=8)
    with pytest.raises(StoreError, match="cosup_building is a collection of something else"):
        build_index(model, passages, place, tmp_path, options=SMALL)
    assert store.exists()


@pytest.mark.parametrize("name", ["cosup", "cosup_building"])
def test_a_damaged_index_is_replaced_by_a_build(model, passages, place, tmp_path, name):
    store = Collection(Place.parse(place)).named(name)
    store.call("create_collection", dimension=8, properties={"cosup.stamp": "{"})
    build_index(model, passages, place, tmp_path, options=SMALL)
    assert list(open_index(place).passages) == passages


def test_a_build_that_lost_rows_starts_again(model, passages, place, tmp_path, monkeypatch):
    monkeypatch.setattr(Collection, "count", lambda self, rows: rows - 1)
    with pytest.raises(StoreError, match="holds 10 rows of 11: run the same command again"):
        build_index(model, passages, place, tmp_path, options=SMALL)
    monkeypatch.undo()
    build_index(model, passages, place, tmp_path, options=SMALL)
    assert list(open_index(place).passages) == passages


def test_a_lost_answer_to_the_rename_and_a_kill_after_it_do_no_harm(model, passages, place, tmp_path, monkeypatch):
    call = Collection.call

    def twice(self, method, *arguments, **options):
        if method == "rename_collection":
            call(self, method, *arguments, **options)
        return call(self, method, *arguments, **options)

    monkeypatch.setattr(Collection, "call", twice)
    monkeypatch.setattr(build_module.Build, "discard", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_index(model, passages, place, tmp_path, options=SMALL)
    monkeypatch.undo()
    monkeypatch.setattr(Collection, "upsert", None)  # nothing is sent again
    build_index(model, passages, place, tmp_path, options=SMALL)
    assert list(open_index(place).passages) == passages
    assert not list(tmp_path.glob(".*milvus*"))


def test_a_server_that_never_loads_is_not_asked_forever(built, impatient, monkeypatch):
    store = open_index(built)
    assert isinstance(store, MilvusIndex)

    def refuse(*_, **__):
        raise pymilvus.MilvusException(code=101, message="collection not loaded")

    monkeypatch.setattr(store.collection.client, "query", refuse)
    with pytest.raises(StoreError, match=r"has not answered for 1 s.*not loaded"):
        store.collection.count(1)


def test_connections_end_one_by_one(built):
    store = Collection(Place.parse(built))
    other = store.named("other")
    assert not other.exists()
    client = store.client
    other.close()
    assert store.client is client
    assert store.exists()
    index = open_index(built)
    assert isinstance(index, MilvusIndex)
    index.close()
    assert "paris" in index


def test_what_a_search_found_stays_until_the_next_one(model, built, monkeypatch):
    monkeypatch.setattr(milvus, "REMEMBERED", 2)
    store = load_index(built, model)
    queries = store.embeddings
    expected = [found[0][0] for found in store.retrieve_all(queries, 1)]
    monkeypatch.setattr(Collection, "fetch", None)
    assert [found[0][0] for found in store.retrieve_all(queries, 1)] == expected
    monkeypatch.setattr(search, "NUMBERS_AT_ONCE", 1)  # a part for each query
    store.search(queries, 1)
    assert len(store.near) <= 1 * 2 + 32


def test_a_field_of_another_width_or_none_is_named(built):
    store = Collection(Place.parse(built))
    stamp = store.stamp()
    store.drop()
    schema = pymilvus.MilvusClient.create_schema()
    kinds = pymilvus.DataType
    schema.add_field("key", kinds.VARCHAR, is_primary=True, max_length=32)
    schema.add_field("vector", kinds.FLOAT_VECTOR, dim=8)
    store.call("create_collection", schema=schema, properties={"cosup.stamp": stamp.model_dump_json()})
    with pytest.raises(StoreError, match="was changed, it has no field 'row'"):
        open_index(built)


@contextlib.contextmanager
def answering(reply: bytes):
    """A TCP server that answers everybody with the same bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = server.accept()
                    with client, contextlib.suppress(OSError):
                        client.settimeout(1)
                        client.recv(1024)
                        client.sendall(reply)

        threading.Thread(target=serve, daemon=True).start()
        yield f"milvus:http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("reply", [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", b"\x00garbage", b""])
def test_what_answers_but_is_not_milvus_is_refused(impatient, reply):
    with answering(reply) as place, pytest.raises(StoreError, match="no Milvus answers at http://127"):
        open_index(place)


def test_a_lost_server_is_waited_for_and_then_named(model, passages, tmp_path, monkeypatch):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    folder = str(tmp_path / "served.db")
    server, db, port = start_server_in_thread(data_dir=folder, host="127.0.0.1", port=0)
    place = f"milvus:http://127.0.0.1:{port}"
    build_index(model, passages, place, tmp_path, options=SMALL)
    store = load_index(place, model)
    queries = store.embeddings
    expected = store.retrieve_all(queries, 3)
    server.stop(grace=0).wait()
    db.close()
    monkeypatch.setattr(collection, "PATIENCE", 1.0)
    with pytest.raises(StoreError, match="has not answered for 1 s: check that the server runs"):
        store.search(queries, 3)
    monkeypatch.setattr(collection, "PATIENCE", 60.0)

    def again():
        restarted.extend(start_server_in_thread(data_dir=folder, host="127.0.0.1", port=port))

    restarted: list = []
    timer = threading.Timer(1.0, again)
    timer.start()
    assert store.retrieve_all(queries, 3) == expected
    timer.join()
    restarted[0].stop(grace=0)
    restarted[1].close()


def test_more_passages_than_travel_at_once(model, place, tmp_path):
    many = [Passage(id=f"p{i}", title="", text=f"number {i}") for i in range(AT_ONCE + 40)]
    build_index(model, many, place, tmp_path, options=Options(progress=False))
    store = load_index(place, model)
    assert list(store.passages) == many
    assert len(store.embeddings) == len(many)
