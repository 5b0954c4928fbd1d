"""The server's own description: what it promises holds for requests that schemathesis makes from it."""

import pytest

from cosup_fast.serve.errors import ErrorBody


def test_every_operation_describes_its_errors(server):
    schema = server.http.get("/openapi.json").json()
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for path in schema["paths"].values():
        for operation in path.values():
            content = operation["responses"]["400"]["content"]["application/json"]["schema"]
            assert content == {"$ref": f"#/components/schemas/{ErrorBody.__name__}"}
            assert "422" not in operation["responses"]


@pytest.mark.slow
def test_requests_made_from_the_description_are_answered_as_it_says(server):
    """No server error, no status, content type or body that the description does not know."""
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    wanted = [
        checks.CHECKS.get_one(name)
        for name in (
            "not_a_server_error",
            "status_code_conformance",
            "content_type_conformance",
            "response_schema_conformance",
        )
    ]
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        def run(case):
            nonlocal tried
            tried += 1
            case.call_and_validate(checks=wanted, timeout=60)

        run()
    assert tried > 50
    assert server.engine.ready
