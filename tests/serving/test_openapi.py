"""Requests made from the OpenAPI document: every answer is one that the document describes."""

import os

import httpx
import pytest
from hypothesis import HealthCheck, given, settings


EXAMPLES = int(os.environ.get("OPENVLA_FUZZ_EXAMPLES", "5"))


@pytest.fixture(scope="module")
def url(plain_policy, serve):
    with serve(plain_policy, max_sessions=10_000) as url:
        yield url


@pytest.fixture(scope="module")
def document(url):
    import schemathesis

    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_answer_is_one_of_the_document(document):
    from schemathesis.generation import GenerationMode

    for found in document.get_all_operations():
        operation = found.ok()
        check_operation(operation, GenerationMode.POSITIVE)
        if operation.body:
            check_operation(operation, GenerationMode.NEGATIVE)


def check_operation(operation, mode):
    """Send requests that fit the document, or that don't."""
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(operation.as_strategy(generation_mode=mode))
    def check(case):
        case.call_and_validate(
            checks=(
                not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
            )
        )

    check()


def test_the_document_names_every_error(url):
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert paths["/v1/act"]["post"]["responses"].keys() >= {
        *("200", "400", "401", "403", "408", "409", "410", "413", "415", "422", "429", "500", "503")
    }
    assert {"/act", "/v1/sessions", "/health", "/ready", "/info", "/metrics"} <= paths.keys()
