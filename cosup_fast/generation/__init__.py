"""Generation with retrieval: Gen writes, asks for a passage with [NSP], is given it, and continues.

1. Gen decodes until [NSP], or [NSP] is forced as its first token.
2. Gen's hidden state at [NSP] is the query; the passage whose sequence embedding has the largest inner product is
   taken from the nonparametric index.
3. The passage and [Cs] are appended; Gen writes the grounded text and [Ce], perhaps another [NSP], or ends.

request.py    a question, and what is asked of an index
listener.py   what may be heard of a request on its way
grammar.py    which token may come next, and how one is chosen
answer.py     answers, and tokens to text as they come in
task.py       one request on its way
cache.py      keys and values of many requests, attention without pad tokens
runner.py     one forward for the new tokens of all
decoder.py    continuous batching
generator.py  questions to answers

Source: Lee et al. 2024, arXiv 2403.09024, section 3.
"""

from cosup_fast.config.generation import GenerationConfig
from cosup_fast.generation.answer import Answer, AnswerSegment, Candidate, Retrieval
from cosup_fast.generation.decoder import Decoder, Ticket
from cosup_fast.generation.generator import Generator
from cosup_fast.generation.grammar import Grammar, State, choose
from cosup_fast.generation.listener import Listener, Phase
from cosup_fast.generation.request import Asked, PromptError, Request, Retrieve, Searcher

__all__ = [
    "Answer",
    "AnswerSegment",
    "Asked",
    "Candidate",
    "Decoder",
    "GenerationConfig",
    "Generator",
    "Grammar",
    "Listener",
    "Phase",
    "PromptError",
    "Request",
    "Retrieval",
    "Retrieve",
    "Searcher",
    "State",
    "Ticket",
    "choose",
]
