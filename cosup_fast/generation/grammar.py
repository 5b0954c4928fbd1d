"""Which token comes next: what the training text allows, and how one is chosen from the logits.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cosup_fast.config.generation import GenerationConfig

if TYPE_CHECKING:
    from cosup_fast.data.template import Template


class State(Enum):
    """Where in the text the next token stands."""

    FREE = "free"  # free text, [NSP] or </s>
    PASSAGE = "passage"  # after [NSP]: the passage and [Cs] are given, nothing is chosen
    GROUNDED = "grounded"  # after [Cs]: grounded text or [Ce]
    END = "end"


class Grammar:
    """Which tokens may come next, and what each of them leads to.

    FREE -text-> FREE, FREE -[NSP]-> PASSAGE, FREE -</s>-> END; PASSAGE -[Cs]-> GROUNDED; GROUNDED -text-> GROUNDED,
    GROUNDED -[Ce]-> FREE. Text is every token but the tokenizer's special ones and the rows beyond its vocabulary.

    Args:
        template: whose tokenizer says which tokens are special.
        vocabulary: V, the rows of Gen's head.
        device: where the logits are.
    """

    def __init__(self, template: Template, vocabulary: int, device: torch.device | str = "cpu"):
        self.template = template
        tokenizer = template.tokenizer
        special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        special |= {*tokenizer.all_special_ids, template.nsp, template.context_start, template.context_end}
        special |= {template.pad, template.eos, *range(len(tokenizer), vocabulary)}
        self._vocabulary = vocabulary
        self._special = frozenset(special)
        column = {token: i for i, token in enumerate(sorted(special))}

        def banned(*allowed: int) -> Tensor:
            mask = torch.ones(len(column), dtype=torch.bool)
            mask[[column[token] for token in allowed]] = False
            return mask

        # A row a kind of place: free text, free text that may retrieve, grounded text.
        self._banned = torch.stack(
            [banned(template.eos), banned(template.eos, template.nsp), banned(template.context_end)]
        ).to(device)
        self._columns = torch.tensor(sorted(special), device=device)

    def restrict(self, logits: Tensor, states: Sequence[State], may_retrieve: Sequence[bool]) -> Tensor:
        """Logits (R, V) with -inf at the tokens that may not be chosen, in place.

        Args:
            logits: a row a request.
            states: where each request stands.
            may_retrieve: whether each may write [NSP] in free text.
        """
        kinds = []
        for state, retrieve in zip(states, may_retrieve, strict=True):
            assert state in (State.FREE, State.GROUNDED), f"nothing is chosen in {state}"
            kinds.append(2 if state is State.GROUNDED else int(retrieve))
        banned = self._banned[torch.tensor(kinds, device=logits.device)]
        logits[:, self._columns] = logits[:, self._columns].masked_fill(banned, -torch.inf)
        return logits

    def check(self, state: State, may_retrieve: bool, token: int) -> None:
        """A token that was not chosen from restricted logits.

        Raises:
            ValueError: it has no place in this state.
        """
        assert state in (State.FREE, State.GROUNDED), f"nothing is chosen in {state}"
        structure = {self.template.context_end} if state is State.GROUNDED else {self.template.eos}
        if state is State.FREE and may_retrieve:
            structure.add(self.template.nsp)
        if not 0 <= token < self._vocabulary or (token in self._special and token not in structure):
            raise ValueError(
                f"Request.forced has the token {token} where the text is {state.value}, which does not allow it: "
                f"text and {sorted(structure)} may stand there"
            )

    def next(self, state: State, token: int) -> State:
        """The state after a token that was allowed in `state`."""
        match state:
            case State.FREE if token == self.template.nsp:
                return State.PASSAGE
            case State.FREE if token == self.template.eos:
                return State.END
            case State.PASSAGE if token == self.template.context_start:
                return State.GROUNDED
            case State.GROUNDED if token == self.template.context_end:
                return State.FREE
        return state


def choose(logits: Tensor, config: GenerationConfig, random: torch.Generator) -> int:
    """A token from logits (V,): the likeliest, or one sampled by `temperature` and `top_p` (Holtzman et al. 2020).

    One uniform number is drawn for each sampled token, and looked up among the cumulative probabilities: rounding
    that differs between batches changes a token only where that number falls between two of them.
    """
    if config.temperature == 0:
        return int(logits.argmax())
    # On the CPU and in fp64: the same seed gives the same tokens on every device.
    logits = logits.double().cpu()
    logits = (logits - logits.max()) / config.temperature
    tokens = None
    if config.top_p < 1:
        logits, tokens = _nucleus(logits, config.top_p)
    cumulative = torch.softmax(logits, dim=-1).cumsum(dim=-1)
    drawn = torch.rand((), generator=random, dtype=torch.float64) * cumulative[-1]
    row = int(torch.searchsorted(cumulative, drawn, right=True))
    return row if tokens is None else int(tokens[row])


def _nucleus(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The fewest likeliest tokens whose probabilities have the sum `top_p`: their logits, best first, and ids."""
    total = torch.logsumexp(logits, dim=-1)
    if len(logits) > 1024:  # a full sort is slow, and few tokens are nearly always enough
        best, tokens = logits.topk(512)
        if torch.exp(best - total).sum() >= top_p:
            return _head(best, tokens, total, top_p)
    return _head(*logits.sort(descending=True, stable=True), total, top_p)


def _head(best: Tensor, tokens: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    probability = torch.exp(best - total)
    kept = int((probability.cumsum(dim=-1) - probability < top_p).sum())
    return best[:kept], tokens[:kept]
