"""What the endpoints' requests share: strict fields, how to write, and how messages become a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Discriminator, Field, Tag, ValidationError, model_validator

from cosup_fast.data.records import String
from cosup_fast.data.strict import Strict
from cosup_fast.generation import GenerationConfig
from cosup_fast.serve.errors import LIST, TEXT, ApiError

if TYPE_CHECKING:
    from cosup_fast.data.template import Template

MAX_CANDIDATES = 100
text_or_list = Discriminator(lambda value: TEXT if isinstance(value, str) else LIST)
"""Of a field with these two forms: an error is about the form that the value has."""


class Fields(Strict):
    """A request's fields: one that is not supported is refused, never ignored.

    `neutral` lists fields of OpenAI's API that are not supported, with the values that ask for nothing: clients send
    them, and they change nothing. `null` asks for nothing in any field.
    """

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _asks_for_nothing(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {
            name: value
            for name, value in data.items()
            if value is not None
            and not (name in cls.neutral and any(value == v and type(value) is type(v) for v in cls.neutral[name]))
        }


class Writing(Fields):
    """How to write, shared by chat completions and responses."""

    model: String = Field(description="one of GET /v1/models")
    stream: bool = False
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the likeliest token")
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    stop: (
        Annotated[Annotated[String, Tag(TEXT)] | Annotated[list[String], Field(max_length=16), Tag(LIST)], text_or_list]
        | None
    ) = Field(default=None, description="texts that end the answer and are not part of it")
    max_retrievals: int | None = Field(default=None, ge=0, le=64, description="0 answers without passages")
    ret_first: bool | None = Field(default=None, description="retrieve before the first word")
    ctx_truncate: bool | None = Field(default=None, description="drop a passage once its text is written")
    candidates: int | None = Field(
        default=None, ge=1, le=MAX_CANDIDATES, description="passages listed for each retrieval"
    )

    def generation(self, base: GenerationConfig, most: int | None, *, retrieves: bool) -> GenerationConfig:
        """How the decoder is to write.

        Args:
            base: what the server was started with.
            most: the most tokens to choose.
            retrieves: whether the system that was asked for retrieves.

        Raises:
            ApiError: the values contradict each other.
        """
        given = {
            name: getattr(self, name)
            for name in ("temperature", "top_p", "seed", "max_retrievals", "ret_first", "ctx_truncate", "candidates")
        }
        given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        given["max_new_tokens"] = most
        settings = base.model_dump() | {name: value for name, value in given.items() if value is not None}
        if not retrieves:
            for name in ("max_retrievals", "ret_first"):
                if given[name]:
                    message = f"{name}={given[name]} retrieves, and the model {self.model!r} does not"
                    raise ApiError(400, message, param=name, code="invalid_value")
            settings |= {"max_retrievals": 0, "ret_first": False}
        if given["max_retrievals"] == 0 and given["ret_first"] is None:
            settings["ret_first"] = False
        try:
            return GenerationConfig.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            param = ".".join(map(str, first["loc"])) or "ret_first"
            message = first["msg"].removeprefix("Value error, ")
            raise ApiError(400, f"{param}: {message}", param=param, code="invalid_value") from None


class TextPart(Fields):
    """A part of a message's content."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"logprobs": ([],)}

    type: Literal["text", "input_text", "output_text"]
    text: String
    annotations: list[Any] = Field(default=[])
    """Of an answer that a client sends back; the text says what it says without them."""


class Message(Fields):
    """A message; the last one is the question, those before it are its instruction."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"type": ("message",), "status": ("completed", "incomplete")}

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[String, Tag(TEXT)] | Annotated[list[TextPart], Field(min_length=1), Tag(LIST)], text_or_list
    ]
    id: String | None = None
    annotations: list[Any] = Field(default=[])

    @model_validator(mode="after")
    def _answers_alone_have_annotations(self) -> Self:
        if self.annotations and self.role != "assistant":
            raise ValueError(f"annotations belong to messages of the assistant, not of role {self.role!r}")
        return self

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=1000)]


def to_prompt(messages: Sequence[Message], template: Template, where: str) -> tuple[str, str]:
    """Question and instruction of a conversation.

    The last message is the question. The instruction is what stands before it: texts of system and developer messages,
    each with an empty line after it, and earlier turns as the template writes them, so that they look like what Gen
    was trained on: `## Input:`, the question, `## Output:`, the answer.

    Args:
        messages: of the conversation.
        template: writes earlier turns.
        where: the field that holds the last of them, for errors.

    Raises:
        ApiError: there is no message, or the last one is not the user's, or is blank.
    """
    if not messages:
        raise ApiError(400, "the last item must be a message of the user, found no message at all", param=where)
    *before, last = messages
    if last.role != "user":
        message = f"the last message must be the user's, found role {last.role!r}"
        raise ApiError(400, message, param=f"{where}.role")
    if not last.text.strip():
        raise ApiError(400, "the last message is the question, and it is empty", param=f"{where}.content")
    parts = []
    for message in before:
        if message.role == "user":
            parts.append(template.config.prompt.format(instruction="", question=message.text))
        else:
            parts.append(f"{message.text}\n\n")
    return last.text, "".join(parts)
