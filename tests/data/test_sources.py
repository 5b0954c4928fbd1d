"""Sources: files, prepared names and hub data sets, and what is said when a name is none of them."""

import json
import os

import pytest

from cosup_fast.data import sources
from cosup_fast.data.prepared import catalog, verify
from cosup_fast.data.records import DataError
from cosup_fast.files import sha256

PASSAGE = {"id": "p", "title": "t", "text": "x"}
EXAMPLE = {"id": "a", "question": "who?", "output": [{"text": "x", "passage": "p"}]}


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("COSUP_HOME", str(tmp_path / "home"))


@pytest.fixture
def ready(tmp_path):
    """Marks a prepared set as complete, with the given files."""

    def mark(name, **files):
        folder = tmp_path / "home" / name
        folder.mkdir(parents=True)
        hashes = {}
        for stem, records in files.items():
            path = folder / f"{stem.replace('_', '-')}.jsonl"
            path.write_text("\n".join(map(json.dumps, records)))
            hashes[path.name] = sha256(path)
        (folder / verify.INFO).write_text(json.dumps({"recipe": catalog.CATALOG[name].recipe, "files": hashes}))
        return folder

    return mark


def test_a_file_and_a_prepared_name(tmp_path, ready):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(PASSAGE))
    ready("wiki-leads", passages=[PASSAGE])
    assert [p.id for p in sources.load_corpus(str(path))] == ["p"]
    assert sources.load_corpus("wiki-leads") == sources.load_corpus(str(path))
    ready("questions", test_in=[EXAMPLE])
    assert [e.id for e in sources.load_examples("questions/test-in", {"p"})] == ["a"]
    with pytest.raises(DataError, match=r"test-in\.jsonl:1: output\.0\.passage: .*found 'p'"):
        sources.load_examples("questions/test-in", {"q"})


def test_what_is_not_prepared_names_the_command(ready):
    for spec, name in [("questions/train", "questions"), ("cloze/dev", "cloze")]:
        with pytest.raises(DataError, match=f"found nothing: run `cosup-fast data prepare {name}`"):
            sources.load_examples(spec, None)
    with pytest.raises(DataError, match="cosup-fast data prepare wiki-leads"):
        sources.load_corpus("wiki-leads")
    with pytest.raises(DataError, match="cosup-fast data prepare smollm2-135m"):
        sources.resolve_model("smollm2-135m")


def test_what_another_version_prepared_is_not_used(ready):
    folder = ready("wiki-leads", passages=[PASSAGE])
    (folder / verify.INFO).write_text('{"recipe": "older"}')
    with pytest.raises(
        DataError, match="found it as another version made it: run `cosup-fast data prepare wiki-leads`"
    ):
        sources.load_corpus("wiki-leads")


def test_a_name_that_is_nothing_gets_the_nearest():
    with pytest.raises(DataError, match=r"corpus 'wiki-lead': .*did you mean 'wiki-leads'"):
        sources.load_corpus("wiki-lead")
    with pytest.raises(DataError, match=r"examples 'question/train': .*did you mean 'questions/train'"):
        sources.load_examples("question/train", None)
    with pytest.raises(DataError, match=r"model 'smollm2-135M': .*did you mean 'smollm2-135m'"):
        sources.resolve_model("smollm2-135M")
    with pytest.raises(DataError, match=r"corpus 'no/such/file.jsonl': expected a JSONL file"):
        sources.load_corpus("no/such/file.jsonl")


def test_models(tmp_path, ready, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    assert sources.resolve_model("runs/one") == "runs/one"
    assert sources.resolve_model("owner/name") == "owner/name"
    assert sources.resolve_model("hf:gpt2") == "gpt2"
    folder = ready("smollm2-135m")
    assert sources.resolve_model("smollm2-135m") == str(folder)
    for missing in ("runs/two", "./owner/name", "/no/such"):
        with pytest.raises(DataError, match="expected a folder, a hub name"):
            sources.resolve_model(missing)


def test_a_hub_data_set_is_validated_by_row(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    other = {"id": "b", "question": "q", "output": [{"text": "free"}, {"text": "x", "passage": "p"}], "answers": ["x"]}
    (folder / "train.jsonl").write_text(json.dumps(EXAMPLE) + "\n" + json.dumps(other) + "\n")
    (folder / "test.jsonl").write_text(json.dumps({**EXAMPLE, "output": []}) + "\n")
    loaded = sources.load_examples(f"hf:{folder}", {"p"})
    assert [(e.id, e.gold) for e in loaded] == [("a", ["p"]), ("b", ["p"])]
    with pytest.raises(DataError, match=r"hub:test:row 0: output: expected at least one segment"):
        sources.load_examples(f"hf:{folder}:test", {"p"})
    with pytest.raises(DataError, match=r"row 0: output.0.passage: .*found 'p'"):
        sources.load_examples(f"hf:{folder}", {"q"})
    with pytest.raises(DataError, match=r"row 0: .*(question|output)"):
        sources.load_corpus(f"hf:{folder}")
    with pytest.raises(DataError, match="expected a data set that `datasets` can load"):
        sources.load_corpus(f"hf:{folder}:nosuch")


def test_a_prepared_file_that_changed_is_not_used(ready, monkeypatch):
    folder = ready("wiki-leads", passages=[PASSAGE])
    sources.load_corpus("wiki-leads")
    with monkeypatch.context() as patch:
        patch.setattr(verify, "sha256", lambda path: pytest.fail("it was hashed again"))
        sources.load_corpus("wiki-leads")
    path = folder / "passages.jsonl"
    before = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"x"', b'"y"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and modification time are as before
    with pytest.raises(DataError, match=r"passages\.jsonl: expected sha256 .*data prepare wiki-leads"):
        sources.load_corpus("wiki-leads")
    path.unlink()
    with pytest.raises(DataError, match=r"passages\.jsonl: expected a file as it was prepared, found none"):
        sources.load_corpus("wiki-leads")


def test_every_file_of_a_prepared_model_is_compared(ready):
    folder = ready("smollm2-135m", model=[PASSAGE], tokenizer=[PASSAGE])
    assert sources.resolve_model("smollm2-135m") == str(folder)
    (folder / "tokenizer.jsonl").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.jsonl: expected sha256"):
        sources.resolve_model("smollm2-135m")
