"""What is written appears whole or not at all, whoever is killed when."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from cosup_fast.files import (
    FolderKind,
    check_replaceable,
    check_writable,
    held,
    remove_unfinished,
    replace_file,
    replace_folder,
)

THING = FolderKind("a thing", "marker", files=("*",))
RESULT = FolderKind("a result", "result.json", frozenset({"kind", "files"}))


def _write(folder, text):
    with replace_folder(folder, THING) as new:
        (new / "marker").write_text(text)
        (new / "deep").mkdir()
        (new / "deep" / "file").write_text(text * 1000)


def _visible(parent):
    return sorted(path.name for path in parent.iterdir())


def test_a_folder_is_replaced_and_nothing_else_is_left(tmp_path):
    for text in ("one", "two"):
        _write(tmp_path / "x", text)
        assert (tmp_path / "x" / "deep" / "file").read_text() == text * 1000
    assert _visible(tmp_path) == ["x"]


def test_a_failure_leaves_the_earlier_folder(tmp_path):
    _write(tmp_path / "x", "one")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), replace_folder(tmp_path / "x", THING) as new:  # noqa: PT012
            (new / "marker").write_text("half")
            raise error
    assert (tmp_path / "x" / "marker").read_text() == "one"
    assert _visible(tmp_path) == ["x"]


@pytest.mark.parametrize("interrupted", ["first", "second"])
def test_an_interrupt_between_the_renames_leaves_the_earlier_folder(tmp_path, monkeypatch, interrupted):
    _write(tmp_path / "x", "one")
    rename, calls = type(tmp_path).rename, []

    def interrupt(path, target):
        calls.append(path)
        if len(calls) == ("first", "second").index(interrupted) + 1:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "x", "two")
    assert (tmp_path / "x" / "marker").read_text() == "one"


def _python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)])


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    _write(tmp_path / "x", "one")
    code = """
        import os, signal, sys
        from pathlib import Path
        from cosup_fast.files import FolderKind, replace_folder
        THING = FolderKind("a thing", "marker", files=("*",))
        rename = Path.rename
        def kill_at_the_second(path, target):
            if path.name.endswith(".new"):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)
        Path.rename = kill_at_the_second
        with replace_folder(sys.argv[1], THING) as new:
            (new / "marker").write_text("two")
    """
    assert _python(code, tmp_path / "x").wait() == -9
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "x", THING):
        raise RuntimeError  # a later writer that fails as well
    assert (tmp_path / "x" / "marker").read_text() == "one"
    assert _visible(tmp_path) == ["x"]


def test_two_writers_wait_for_each_other(tmp_path):
    code = """
        import sys, time
        from cosup_fast.files import FolderKind, replace_folder
        THING = FolderKind("a thing", "marker", files=("*",))
        for _ in range(5):
            with replace_folder(sys.argv[1], THING) as new:
                (new / "marker").write_text(sys.argv[2])
                time.sleep(0.02)
                (new / "other").write_text(sys.argv[2])
    """
    writers = [_python(code, tmp_path / "x", name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "x" / "marker").read_text() == (tmp_path / "x" / "other").read_text()
    assert _visible(tmp_path) == ["x"]


def test_what_is_something_else_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else, it has no marker"):
        _write(tmp_path / "x", "one")
    assert (tmp_path / "x" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("marker", "others", "said"),
    [
        ('{"kind": "x"}', [], "its result.json is not that of a result"),
        ('{"name": "my web page"}', ["index.html"], "its result.json is not that of a result"),
        ("[1, 2]", [], "is not that of a result"),
        ('{"kind": "x", "files": [["a"], 3]}', ["a"], "is not that of a result"),
        ("[" * 100_000, [], "is not that of a result"),
        ("\xff", [], "is not that of a result"),
        ('{"kind": "x", "files": ["a"]}', ["a", "thesis.tex"], "thesis.tex in it is not part of a result"),
        ('{"kind": "x", "files": ["a"]}', ["a", "deep/notes"], "deep/notes in it is not part of a result"),
    ],
)
def test_a_folder_with_a_marker_of_the_same_name_is_not_deleted(tmp_path, marker, others, said):
    folder = tmp_path / "x"
    (folder / "deep").mkdir(parents=True)
    (folder / "result.json").write_text(marker, encoding="latin-1")
    for name in others:
        (folder / name).write_text("years of work")
    with pytest.raises(ValueError, match=said), replace_folder(folder, RESULT):
        pass
    assert all((folder / name).read_text() == "years of work" for name in others)


def test_an_earlier_result_is_replaced_whatever_a_file_manager_left_in_it(tmp_path):
    folder = tmp_path / "x"
    for text in ("one", "two"):
        with replace_folder(folder, RESULT) as new:
            (new / "a").write_text(text)
            (new / "result.json").write_text('{"kind": "x", "files": ["a"]}')
        (folder / ".DS_Store").write_text("")
    assert (folder / "a").read_text() == "two"
    assert check_replaceable(folder, RESULT) == folder


def test_leftovers_of_the_killed_are_removed(tmp_path):
    for name in (".step-1.new", ".step-2.new", ".other.new"):
        (tmp_path / name).mkdir()
    remove_unfinished(tmp_path, "step-*")
    assert _visible(tmp_path) == [".other.new"]


def test_a_file_is_replaced_whole_or_not(tmp_path):
    path = tmp_path / "f.txt"
    with replace_file(path) as file:
        file.write("one\n")
    with pytest.raises(RuntimeError), replace_file(path) as file:  # noqa: PT012
        file.write("two\n")
        raise RuntimeError
    assert path.read_bytes() == b"one\n"
    assert os.listdir(tmp_path) == ["f.txt"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_only_regular_files_are_replaced(tmp_path):
    """A device, a pipe and a link stay as they are; for root a rename over /dev/null would remove it."""
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / "link").symlink_to(target)
    os.mkfifo(tmp_path / "pipe")
    for path, said in ((tmp_path / "link", "is a link to"), (tmp_path / "pipe", "a pipe"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=said), replace_file(path) as file:
            file.write("ours")
        with pytest.raises(ValueError, match=said):
            check_writable(path)
    assert target.read_text() == "theirs"
    assert (tmp_path / "link").is_symlink()


def test_a_link_planted_under_a_temporary_name_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / f".f.txt.{os.getpid()}.new").symlink_to(target)
    with replace_file(tmp_path / "f.txt") as file:
        file.write("ours")
    assert target.read_text() == "theirs"
    assert (tmp_path / "f.txt").read_text() == "ours"


def test_a_lock_is_not_written_through_a_planted_link(tmp_path):
    target = tmp_path / "target"
    target.write_text("theirs")
    (tmp_path / ".out.lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"\.out\.lock is a link"), held(tmp_path / "out", "generate"):
        pass
    assert target.read_text() == "theirs"


def test_one_process_at_a_time_writes_an_output_and_the_other_is_told_which(tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from cosup_fast.files import held
        with held(Path(sys.argv[1]), "generate"):
            print("held", flush=True)
            time.sleep(60)
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said = rf"is being written by process {holder.pid} on .*: wait for that generate"
    with pytest.raises(ValueError, match=said), held(tmp_path / "out", "generate"):
        pass
    holder.kill()
    holder.wait()
    with held(tmp_path / "out", "generate"):
        pass
