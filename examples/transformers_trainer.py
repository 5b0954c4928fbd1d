"""The losses of cosup-fast in a `transformers.Trainer`: co-supervision where a training script is there already.

    cosup-fast data prepare smollm2-135m
    python examples/transformers_trainer.py data.jsonl --gen ~/.cache/cosup-fast/smollm2-135m --steps 100

Each line of data.jsonl has a question, an answer and the passage that the answer is from. Gen reads
"question [NSP] answer"; its hidden state at [NSP] is contrasted with Embseq's of every passage of the batch. This is
the plain form, with padding and the negatives of one micro-batch; `cosup-fast train` does without both.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from cosup_fast.losses import CoSupervisionLoss, InfoNCELoss

NSP = "[NSP]"


class CoSupervised(nn.Module):
    """Gen and Embseq; `forward` returns a dictionary with `loss`, as Trainer wants it."""

    def __init__(self, gen: Any, embseq: Any, nsp_weight: float = 1.0):
        super().__init__()
        self.gen, self.embseq = gen, embseq
        self.criterion = CoSupervisionLoss(nsp_weight, nsp=InfoNCELoss(temperature=0.05, normalize=True))

    def forward(
        self,
        input_ids: Tensor,  # (B, T)
        attention_mask: Tensor,
        labels: Tensor,  # (B, T), -100 where nothing is learnt
        nsp_at: Tensor,  # (B,), where the question's [NSP] stands
        passage_ids: Tensor,  # (B, S), passage i answers question i
        passage_mask: Tensor,
    ) -> dict[str, Tensor]:
        hidden = self.gen.base_model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        states = self.embseq(passage_ids, attention_mask=passage_mask, use_cache=False).last_hidden_state
        rows, last = torch.arange(len(nsp_at), device=nsp_at.device), passage_mask.sum(dim=1) - 1
        out = self.criterion(
            hidden[:, :-1].flatten(0, 1),
            self.gen.get_output_embeddings().weight,
            labels[:, 1:].flatten(),
            query=hidden[rows, nsp_at],
            keys=states[rows, last],
        )
        return {"loss": out.loss, "ntp": out.ntp.detach(), "nsp": out.nsp.detach()}


class CoSupervisionTrainer(Trainer):
    """Trainer that also logs both losses."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(**inputs)
        if model.training and self.state.global_step % self.args.logging_steps == 0:
            self.log({"ntp": float(out["ntp"]), "nsp": float(out["nsp"])})
        return (out["loss"], out) if return_outputs else out["loss"]


class Collator:
    """Tokenizes records and pads them on the right; the question and [NSP] are read, the answer is learnt.

    A question that leaves no room for [NSP] is cut, never [NSP]: without it all later queries would change passages.
    """

    def __init__(self, tokenizer: Any, embseq_tokenizer: Any, max_length: int = 256):
        self.tokenizer, self.embseq_tokenizer, self.max_length = tokenizer, embseq_tokenizer, max_length

    def __call__(self, records: list[dict[str, str]]) -> dict[str, Tensor]:
        rows, labels, nsp_at = [], [], []
        for record in records:
            nsp = self.tokenizer.convert_tokens_to_ids(NSP)
            question = [*self.tokenizer(record["question"])["input_ids"][: self.max_length - 1], nsp]
            answer = self.tokenizer(" " + record["answer"], add_special_tokens=False)["input_ids"]
            answer = [*answer, self.tokenizer.eos_token_id]
            nsp_at.append(len(question) - 1)
            rows.append([*question, *answer][: self.max_length])
            labels.append([*[-100] * (len(question) - 1), question[-1], *answer][: self.max_length])
        end = self.embseq_tokenizer.eos_token_id
        passages = [
            [*self.embseq_tokenizer(record["passage"])["input_ids"][: self.max_length - 1], end] for record in records
        ]
        input_ids, mask = _padded(rows, 0)
        passage_ids, passage_mask = _padded(passages, 0)
        return {
            "input_ids": input_ids,
            "attention_mask": mask,
            "labels": _padded(labels, -100)[0],
            "nsp_at": torch.tensor(nsp_at),
            "passage_ids": passage_ids,
            "passage_mask": passage_mask,
        }


def _padded(rows: list[list[int]], value: int) -> tuple[Tensor, Tensor]:
    """Padding is known by its place, never by its id: many tokenizers pad with the end of sequence."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [value] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def main(arguments: list[str] | None = None) -> CoSupervisionTrainer:
    """Trains as told on the command line."""
    parser = argparse.ArgumentParser(description="Co-supervision with transformers.Trainer")
    parser.add_argument("data", type=Path, help="JSON lines with question, answer and passage")
    parser.add_argument("--gen", required=True, help="a folder or a Hugging Face name")
    parser.add_argument("--embseq", help="likewise; default: the same model")
    parser.add_argument("--output", default="runs/transformers-trainer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-5)
    given = parser.parse_args(arguments)
    with given.data.open(encoding="utf-8-sig") as file:  # a text may hold what str.splitlines takes for a line's end
        records = [json.loads(line) for line in file if line.strip()]
    embseq_name = given.embseq or given.gen
    tokenizer, embseq_tokenizer = (AutoTokenizer.from_pretrained(name) for name in (given.gen, embseq_name))
    tokenizer.add_special_tokens({"additional_special_tokens": [NSP]})
    gen = AutoModelForCausalLM.from_pretrained(given.gen, use_safetensors=True, dtype=torch.float32)
    gen.resize_token_embeddings(max(len(tokenizer), gen.get_input_embeddings().num_embeddings))
    embseq = AutoModel.from_pretrained(embseq_name, use_safetensors=True, dtype=torch.float32)
    trainer = CoSupervisionTrainer(
        model=CoSupervised(gen, embseq),
        args=TrainingArguments(
            output_dir=given.output,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch_size,
            learning_rate=given.lr,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            remove_unused_columns=False,
            dataloader_drop_last=True,
            disable_tqdm=True,
        ),
        train_dataset=records,  # pyright: ignore[reportArgumentType]  a list will do
        data_collator=Collator(tokenizer, embseq_tokenizer),
    )
    trainer.train()
    trainer.model.gen.save_pretrained(Path(given.output) / "gen")  # pyright: ignore
    tokenizer.save_pretrained(Path(given.output) / "gen")
    trainer.model.embseq.save_pretrained(Path(given.output) / "embseq")  # pyright: ignore
    embseq_tokenizer.save_pretrained(Path(given.output) / "embseq")
    return trainer


if __name__ == "__main__":
    main()
