"""A corpus left on disk: the same passages, ids and errors as one in memory, and memory that does not grow with it."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from cosup_fast import files
from cosup_fast.data import mapped
from cosup_fast.data.mapped import MappedCorpus, sorted_ids
from cosup_fast.data.records import DataError, read_passages, write_jsonl
from cosup_fast.data.sources import open_corpus_by_id


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that keeps the array of the smallest file."""
    monkeypatch.setattr(mapped, "KEPT_FROM", 0)
    return tmp_path / "corpora"


@pytest.fixture
def path(tmp_path, passages):
    write_jsonl(tmp_path / "passages.jsonl", passages)
    return tmp_path / "passages.jsonl"


def line(name: str) -> str:
    return json.dumps({"id": name, "title": "", "text": "x"}) + "\n"


def test_it_holds_what_is_read_into_memory(path, cache):
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n\n \t\x0b\n") + line("last").rstrip().encode()
    )
    expected = {passage.id: passage for passage in read_passages(path)}
    for _ in range(2):  # made, then found
        corpus = MappedCorpus(path, cache)
        assert dict(corpus) == expected
        assert list(corpus) == list(expected)
        assert list(sorted_ids(corpus)) == sorted_ids(expected) == sorted(expected)
        assert "paris" in corpus
        assert "Paris" not in corpus
        with pytest.raises(KeyError):
            corpus["Paris"]


def test_a_file_is_read_once_by_all_processes_and_never_again(path, cache, monkeypatch):
    whole, read = mapped.read_whole, []
    monkeypatch.setattr(mapped, "read_whole", lambda *a: read.append(a) or whole(*a))
    monkeypatch.setattr(mapped, "sha256", lambda path: read.append(path) or files.sha256(path))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: dict(MappedCorpus(path, cache)), range(4)))
    assert len(read) == 1
    assert all(one == found[0] for one in found)
    MappedCorpus(path, cache, checksum=True)
    assert read[1:] == [path]
    read.pop()
    next(cache.glob("*.npy")).write_bytes(b"cut short")
    MappedCorpus(path, cache)
    assert len(read) == 2
    path.write_text(path.read_text() + line("new"))
    assert "new" in MappedCorpus(path, cache)
    assert len(list(cache.glob("*.npy"))) == 1, "the array of the earlier file is gone"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " \n\n",
        line("a") + line("b") + "\n" + line("b") + line("a"),
        line("a") + line("b") + line("a") + "broken\n",
        line("a") + "broken\n" + line("a"),
        line("a") + line("a") + line("a"),
        line("a") + '{"id": "b", "title": "", "txt": ""}\n',
    ],
)
def test_errors_are_those_of_a_corpus_in_memory(path, cache, text):
    path.write_text(text)
    with pytest.raises(DataError) as expected:
        read_passages(path)
    with pytest.raises(DataError) as found:
        MappedCorpus(path, cache)
    assert str(found.value) == str(expected.value)
    assert not list(cache.glob("*.npy"))


def append(path):
    path.write_text(path.read_text() + line("new"))


def cut_short(path):
    os.truncate(path, 10)


def replace(path):
    shutil.copy(path, path.with_suffix(".other"))
    path.with_suffix(".other").replace(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (append, "found it changed"),
        (cut_short, "found it changed"),
        (replace, "found it changed"),
        (os.unlink, "the corpus file is gone"),
    ],
)
def test_a_file_that_changes_while_it_is_used_is_refused(path, cache, change, message):
    corpus = MappedCorpus(path, cache)
    assert corpus["paris"].title == "Paris"
    change(path)
    assert corpus["paris"].title == "Paris", "what was read already stays right"
    with pytest.raises(DataError, match=message):
        corpus["rome"]


def test_the_same_size_and_time_are_seen_through_by_a_checksum_alone(path, cache):
    MappedCorpus(path, cache)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"rome"', b'"roma"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "roma" not in MappedCorpus(path, cache)
    assert "roma" in MappedCorpus(path, cache, checksum=True)


def test_a_file_of_the_same_size_and_another_time_is_read_again(path, cache):
    MappedCorpus(path, cache)
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"rome"', b'"roma"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    assert "roma" in MappedCorpus(path, cache)


def test_a_cache_that_cannot_be_written_is_warned_of(path, cache):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="set COSUP_HOME"):
        corpus = MappedCorpus(path, cache)
    assert dict(corpus) == {passage.id: passage for passage in read_passages(path)}


def test_a_source_names_it(path, tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))
    assert open_corpus_by_id(str(path))["rome"].title == "Rome"
    assert not (tmp_path / "home").exists(), "the array of a small file is not kept"
    monkeypatch.setattr(mapped, "KEPT_FROM", 0)
    open_corpus_by_id(str(path))
    assert list((tmp_path / "home" / "corpora").glob("*.npy"))


RANK = """
import random, sys
from pathlib import Path
from cosup_fast.data.mapped import MappedCorpus, sorted_ids
corpus = MappedCorpus(Path(sys.argv[1]), Path(sys.argv[2]))
draw = random.Random(0)
for row in draw.sample(range(len(corpus)), 10_000):
    assert corpus[f"p{row}"].id == f"p{row}"
ids = sorted_ids(corpus)
assert ids[0] == "p0"
(peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
print(int(peak.split()[1]) / 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_rank_does_not_grow_with_the_passages(tmp_path):
    """Peak memory at 20,000 and at 200,000 passages: apart by less than 8 MiB, once the array is there."""
    peaks = {}
    text = "some of the words of a passage " * 20
    for count in (20_000, 200_000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            file.writelines(f'{{"id": "p{i}", "title": "Title {i}", "text": "{text}"}}\n' for i in range(count))
        MappedCorpus(path, tmp_path / "corpora")
        command = [sys.executable, "-c", RANK, str(path), str(tmp_path / "corpora")]
        peaks[count] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        path.unlink()
    assert peaks[200_000] - peaks[20_000] < 8, peaks
