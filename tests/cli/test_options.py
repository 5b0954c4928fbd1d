"""Commands whose options are the fields of settings objects."""

from __future__ import annotations

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from cosup_fast.cli.common import Writing
from cosup_fast.cli.evaluate import EvaluateOptions
from cosup_fast.cli.options import with_options


class Options(BaseModel):
    """Of the command below."""

    many: list[str] = Field(default=[], description="several words")
    count: int = Field(default=3, ge=1, description="a number")
    maybe: bool | None = Field(default=None, description="yes, no or neither")
    loud: bool = Field(default=False, description="loudly")


def run(*arguments: str):
    app, seen = typer.Typer(), []

    @app.command()
    @with_options
    def command(name: str, options: Options) -> None:
        """A command."""
        seen.append((name, options))

    done = CliRunner().invoke(app, arguments)
    return done, seen


def test_options_are_the_fields():
    done, seen = run("x")
    assert (done.exit_code, seen) == (0, [("x", Options())])
    _, seen = run("x", "--many", "a", "--many", "b", "--count", "5", "--no-maybe", "--loud")
    assert seen == [("x", Options(many=["a", "b"], count=5, maybe=False, loud=True))]
    done, _ = run("--help")
    assert all(word in done.output for word in ("several words", "--no-maybe", "loudly", "A command."))
    assert "--no-loud" not in done.output


def test_a_value_that_a_field_refuses():
    done, seen = run("x", "--count", "0")
    assert isinstance(done.exception, ValueError)
    assert "count" in str(done.exception)
    assert not seen


def test_every_option_of_evaluate_says_what_it_is():
    assert all(field.description for field in EvaluateOptions.model_fields.values())
    assert Writing(max_new_tokens=5, ret_first=False).given == {"max_new_tokens": 5, "ret_first": False}
    with pytest.raises(ValueError, match="limit"):
        EvaluateOptions(limit=0)
