"""Checkpoints for other libraries: sentence-transformers folders, plain Hugging Face folders, each with a model card.

- `retriever`: both sides as one sentence-transformers model, whose `Router` sends queries to Gen and documents to
  Embseq: `encode_query` and `encode_document`, and the MTEB and BEIR tools that call them, need nothing else.
- `query` and `embseq`: one side each, for tools that take a model for queries and another one for documents (BEIR's
  `SentenceBERT`). Embseq has no queries, a query being Gen's hidden state at [NSP].
- `gen`: Gen as any causal LM, with its tokenizer.

No folder needs trust_remote_code. Embseq reads `TextConfig.passage` filled in, and the end-of-sequence token after it;
Gen reads `TextConfig.prompt` filled in, and [NSP] after it. The tokenizers of the folders add all of that but the
passage's own template, and are compared with `Template` when they are written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, normalizers, processors
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast

from cosup_fast.data.records import Passage
from cosup_fast.data.template import Template, passage_text
from cosup_fast.export.card import RunFacts, model_card
from cosup_fast.files import FolderKind, replace_folder
from cosup_fast.model.pretrained import quiet_transformers, read_tokenizer

if TYPE_CHECKING:
    from cosup_fast.model import CoSupervisionModel

Kind = Literal["retriever", "query", "embseq", "gen"]
EXPORT = FolderKind("an export", "export.json", frozenset({"kind", "fingerprint", "files"}))

_MODULES = "sentence_transformers.models"
# AutoTokenizer builds the tokenizers of some architectures (Qwen2's) again from the vocabulary, without the normalizer
# that carries the template. A type that has no class of its own is read from tokenizer.json as it is.
_AS_IT_IS = {"tokenizer_type": "glm"}
# Text that tokenizers like to treat in a way of their own.
_PROBES = ("Who?", " two  spaces ", "a\nb\n", "[NSP] </s> <s> <|im_end|>", "é e\u0301 囲碁 👩‍👧", "x" * 40, "{a} 100%")


def export(model: CoSupervisionModel, folder: str | Path, kind: Kind, facts: RunFacts | None = None) -> None:
    """Writes a model for another library; the folder appears whole or not at all, and replaces an earlier export.

    Args:
        model: the checkpoint.
        folder: where.
        kind: `retriever`, `query`, `embseq` or `gen`.
        facts: what the model card says besides the model itself.

    Raises:
        ValueError: the folder holds something else, `kind` is unknown, or a tokenizer or the template cannot be
            said in a `tokenizer.json`.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind={kind!r}: choose from {', '.join(get_args(Kind))}")
    if kind != "gen":
        model.require_embseq(f"kind={kind!r} cannot be exported")
    with replace_folder(folder, EXPORT) as new, quiet_transformers():
        if kind == "gen":
            _write_gen(model, new)
        elif kind == "retriever":
            _write_retriever(model, new)
        else:
            _write_side(model, _query_side(model) if kind == "query" else _document_side(model), new)
        card = model_card(kind, model.template.config, model.nsp, facts or RunFacts())
        (new / "README.md").write_text(card, encoding="utf-8")
        files = sorted(path.relative_to(new).as_posix() for path in new.rglob("*") if path.is_file())
        _write_json(new / EXPORT.marker, {"kind": kind, "fingerprint": model.fingerprint(), "files": files})


def _write_gen(model: CoSupervisionModel, folder: Path) -> None:
    gen = model.gen
    before = gen.generation_config
    gen.generation_config = GenerationConfig(
        bos_token_id=before.bos_token_id, eos_token_id=model.template.eos, pad_token_id=model.template.pad
    )  # it was trained to end with this token, whatever its base names, and to be read greedily
    try:
        gen.save_pretrained(folder)
    finally:
        gen.generation_config = before
    model.template.tokenizer.save_pretrained(folder)


def _write_side(model: CoSupervisionModel, side: _Side, folder: Path) -> None:
    modules = side.write(folder, lambda i, kind: f"{i}_{kind}" if i else "")
    _write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules.items())],
    )
    _write_settings(model, folder)


def _write_retriever(model: CoSupervisionModel, folder: Path) -> None:
    query = _query_side(model).write(folder, lambda i, kind: f"query_{i}_{kind}")
    document = _document_side(model).write(folder, lambda i, kind: f"document_{i}_{kind}")
    router = {
        "types": query | document,
        "structure": {"query": list(query), "document": list(document)},
        "parameters": {"default_route": "document", "allow_empty_key": True},
    }
    _write_json(folder / "router_config.json", router)
    _write_json(folder / "modules.json", [{"idx": 0, "name": "0", "path": "", "type": f"{_MODULES}.Router"}])
    _write_settings(model, folder)


def _write_settings(model: CoSupervisionModel, folder: Path) -> None:
    settings = {"prompts": {"query": "", "document": ""}, "default_prompt_name": None}
    _write_json(folder / "config_sentence_transformers.json", settings | {"similarity_fn_name": model.nsp.similarity})


@dataclass(frozen=True)
class _Side:
    """What turns text into vectors: backbone, last hidden state, projection, norm."""

    backbone: Any
    tokenizer: PreTrainedTokenizerFast
    longest: int
    projection: Tensor | None
    cosine: bool
    expected: Callable[[str], tuple[str, list[int]]]
    """From a probe to what a user would encode, and to the tokens that it should become."""

    def write(self, folder: Path, name: Callable[[int, str], str]) -> dict[str, str]:
        """Writes the modules into folders of these names; returns the type of each, in order."""
        modules = [name(0, "Transformer"), name(1, "Pooling")]
        self.backbone.save_pretrained(folder / modules[0])
        self.tokenizer.save_pretrained(folder / modules[0])
        self._check(folder / modules[0])
        settings = {"max_seq_length": self.longest, "do_lower_case": False, "tokenizer_args": _AS_IT_IS}
        _write_json(folder / modules[0] / "sentence_bert_config.json", settings)
        modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
        pooling = {f"pooling_mode_{mode}": mode == "lasttoken" for mode in modes}
        width = self.backbone.config.get_text_config().hidden_size
        _write_json(
            folder / modules[1] / "config.json", {"word_embedding_dimension": width, **pooling, "include_prompt": True}
        )
        if self.projection is not None:
            modules.append(name(2, "Dense"))
            rows, columns = self.projection.shape
            dense = {"in_features": columns, "out_features": rows, "bias": False}
            dense["activation_function"] = "torch.nn.modules.linear.Identity"
            _write_json(folder / modules[-1] / "config.json", dense)
            weight = self.projection.detach().cpu().contiguous()
            save_file({"linear.weight": weight}, folder / modules[-1] / "model.safetensors")
        if self.cosine:
            modules.append(name(len(modules), "Normalize"))
            (folder / modules[-1]).mkdir()
        kinds = ["Transformer", "Pooling", *(["Dense"] * (self.projection is not None)), *(["Normalize"] * self.cosine)]
        return {module: f"{_MODULES}.{kind}" for module, kind in zip(modules, kinds, strict=True)}

    def _check(self, folder: Path) -> None:
        tokenizer = read_tokenizer(folder, **_AS_IT_IS)
        for probe in _PROBES:
            text, tokens = self.expected(probe)
            if (found := tokenizer(text, truncation=True)["input_ids"]) != tokens:
                raise ValueError(
                    f"the tokenizer {self.tokenizer.name_or_path!r} cannot be exported: with the template in it, it "
                    f"reads {text!r} as {found}, training read {tokens}"
                )


def _document_side(model: CoSupervisionModel) -> _Side:
    template = model.template
    cutting = Template(
        template.config.model_copy(update={"long_passages": "truncate"}), template.tokenizer, template.embseq_tokenizer
    )

    def expected(probe: str) -> tuple[str, list[int]]:
        passage = Passage(id="probe", title=probe, text=probe)
        return passage_text(template.config.passage, probe, probe), cutting.sequence(passage)

    start, end = template.embseq_start, template.embseq_end
    longest = min(template.config.max_passage_tokens + len(start) + len(end), template.embseq_max_length)
    return _Side(
        model.gen.base_model if model.embseq is None else model.embseq,
        _tokenizer(template.embseq_tokenizer, longest, start, end),
        longest,
        None if model.projection is None else model.projection.weight,
        model.nsp.unit,
        expected,
    )


def _query_side(model: CoSupervisionModel) -> _Side:
    template = model.template
    before, *after = template.config.prompt.format(instruction="", question="\0").split("\0")
    if len(after) != 1:
        raise ValueError(
            f"text.prompt={template.config.prompt!r} has {{question}} more than once: export embseq or gen"
        )

    def expected(probe: str) -> tuple[str, list[int]]:
        return probe, [*template.prompt(probe), template.nsp]

    longest = min(template.max_length, 1 << 20)
    tokenizer = _tokenizer(template.tokenizer, longest, template.start, [template.nsp], before, after[0])
    return _Side(model.gen.base_model, tokenizer, longest, None, model.nsp.unit, expected)


def _tokenizer(
    source: Any, longest: int, start: list[int], end: list[int], before: str = "", after: str = ""
) -> PreTrainedTokenizerFast:
    """A tokenizer that puts text before and after a text, and tokens before and after all that."""
    if not source.is_fast:
        raise ValueError(f"the tokenizer {source.name_or_path!r} has no tokenizer.json form: it cannot be exported")
    backend = Tokenizer.from_str(source.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    steps = [
        *([normalizers.Prepend(before)] if before else []),
        *([normalizers.Replace(Regex(r"\z"), after)] if after else []),
        *([backend.normalizer] if backend.normalizer is not None else []),
    ]
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    names = {token: source.convert_ids_to_tokens(token) for token in (*start, *end)}
    backend.post_processor = processors.TemplateProcessing(
        single=[*(names[token] for token in start), "$A", *(names[token] for token in end)],
        special_tokens=[(name, token) for token, name in names.items()],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        name_or_path=source.name_or_path,
        bos_token=source.bos_token,
        eos_token=source.eos_token,
        unk_token=source.unk_token,
        pad_token=source.pad_token or source.eos_token,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=True,
        model_max_length=longest,
    )


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
