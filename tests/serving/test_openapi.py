"""Requests that are made from the OpenAPI document, valid and mutated: every answer is one that the document has."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error


EXAMPLES = int(os.environ.get("OPENVLA_SERVING_EXAMPLES", "10"))
OPERATIONS = ["/v1/act"]
