"""How Gen writes: the settings of an answer."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from cosup_fast.data.strict import Section


class GenerationConfig(Section):
    """How Gen writes, and how often it may retrieve."""

    max_new_tokens: int = Field(
        default=256, ge=1, description="most tokens that Gen chooses; inserted passages do not count"
    )
    max_retrievals: int = Field(
        default=4, ge=0, description="[NSP] is banned after so many; 0 answers without passages"
    )
    ret_first: bool = Field(default=False, description="force [NSP] as the first token of the output")
    ctx_truncate: bool = Field(
        default=False,
        description="drop a passage from the context at its [Ce]; the text grounded on it is read again without it",
    )
    candidates: int = Field(
        default=5, ge=1, description="passages reported for each retrieval; only the best is inserted"
    )
    temperature: float = Field(default=0.0, ge=0, description="logits are divided by it; 0 takes the likeliest token")
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="sample from the smallest set of likeliest tokens with this probability in sum",
    )
    seed: int = Field(default=0, ge=0, description="random seed of every answer when temperature > 0")
    stop: list[str] = Field(
        default=[], description="texts that end an answer where they appear; they are not part of it"
    )

    @field_validator("stop")
    @classmethod
    def _no_empty_stop(cls, stop: list[str]) -> list[str]:
        if "" in stop:
            raise ValueError(f"stop={stop} holds an empty text, which appears everywhere: leave it out")
        return stop

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.ret_first and self.max_retrievals == 0:
            raise ValueError("ret_first=true forces a retrieval and max_retrievals=0 forbids it: change one of them")
        return self
