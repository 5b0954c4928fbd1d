"""What is written appears whole or not at all, whoever is killed when."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from cosup_fast.files import remove_unfinished, replace_file, replace_folder


def _write(folder, text):
    with replace_folder(folder, "marker") as new:
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
        with pytest.raises(error), replace_folder(tmp_path / "x", "marker") as new:  # noqa: PT012
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
        from cosup_fast.files import replace_folder
        rename = Path.rename
        def kill_at_the_second(path, target):
            if path.name.endswith(".new"):
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(path, target)
        Path.rename = kill_at_the_second
        with replace_folder(sys.argv[1], "marker") as new:
            (new / "marker").write_text("two")
    """
    assert _python(code, tmp_path / "x").wait() == -9
    with pytest.raises(RuntimeError), replace_folder(tmp_path / "x", "marker"):
        raise RuntimeError  # a later writer that fails as well
    assert (tmp_path / "x" / "marker").read_text() == "one"
    assert _visible(tmp_path) == ["x"]


def test_two_writers_wait_for_each_other(tmp_path):
    code = """
        import sys, time
        from cosup_fast.files import replace_folder
        for _ in range(5):
            with replace_folder(sys.argv[1], "marker") as new:
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
