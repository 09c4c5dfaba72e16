from __future__ import annotations

import email.utils
import json
import time

import pytest

from ray_app.errors import AccessDenied, ContextOverflow, EndpointError, Refusal
from ray_app.faults import MAX_RETRY_AFTER_S, Complaint, classify, complaint, of_stream

URL = "http://there/v1"


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        *((status, "", EndpointError) for status in (408, 409, 425, 429, 500, 502, 503, 504, 529)),
        *((status, "", AccessDenied) for status in (301, 307, 401, 402, 403, 404, 405, 410)),
        *((status, "", Refusal) for status in (400, 413, 422)),
        *((status, "context_length_exceeded", ContextOverflow) for status in (400, 413, 422)),
        (400, "unsupported_value", AccessDenied),
        (400, "content_filter", Refusal),
        (429, "insufficient_quota", AccessDenied),
        (500, "context_length_exceeded", EndpointError),
    ],
)
def test_a_status_has_its_class_and_only_endpoint_errors_are_tried_again(
    status: int, code: str, expected: type[Exception]
) -> None:
    fault = classify(status, Complaint("no", code), URL, {})
    assert type(fault.error) is expected and URL in str(fault.error)
    assert fault.is_passing == (expected is EndpointError)
    assert fault.name == str(status)
    assert fault.ending == ("congested" if status in {429, 503} else "broken")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("7", 7.0),
        ("1.5", 1.5),
        ("100000", MAX_RETRY_AFTER_S),
        ("-3", 0.0),
        ("nan", 0.0),
        ("soon", 0.0),
        ("Wed, 21 Oct 99999 07:28:00 GMT", 0.0),
        ("", 0.0),
    ],
)
def test_retry_after_is_seconds_within_bounds(asked: str, expected: float) -> None:
    assert classify(429, Complaint("no"), URL, {"retry-after": asked}).retry_after_s == expected


def test_retry_after_may_be_a_date() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    assert 17 < classify(503, Complaint("no"), URL, {"retry-after": date}).retry_after_s <= 20
    past = email.utils.formatdate(time.time() - 20, usegmt=True)
    assert classify(503, Complaint("no"), URL, {"retry-after": past}).retry_after_s == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"error": {"message": "too\n long", "code": "c"}}, Complaint("too long", "c")),
        ({"error": {"message": "bad", "code": 400}}, Complaint("bad", "400")),
        ({"error": "plain"}, Complaint("plain")),
        ({"object": "error", "message": "old vLLM", "code": 404}, Complaint("old vLLM", "404")),
        ({"detail": [{"loc": ["body"]}]}, Complaint("[{'loc': ['body']}]")),
        (["odd"], Complaint("['odd']")),
    ],
)
def test_what_an_endpoint_complains_of_is_read_from_its_dialects(body: object, expected: Complaint) -> None:
    assert complaint(json.dumps(body).encode()) == expected


def test_a_body_that_is_no_json_is_quoted_in_part() -> None:
    assert complaint(b"<html>\n bad gateway\xff</html>").message == "<html> bad gateway\ufffd</html>"
    assert len(complaint(b"x" * 10_000).message) == 500
    assert complaint(b"").message == "no message"


@pytest.mark.parametrize(
    ("said", "name", "expected"),
    [
        (Complaint("overloaded", "503"), "503", EndpointError),
        (Complaint("the maximum context length is 10", "400"), "400", ContextOverflow),
        (Complaint("bad image", "400"), "400", Refusal),
        (Complaint("server_error", "server_error"), "error", EndpointError),
        (Complaint("no", "context_length_exceeded"), "error", ContextOverflow),
        (Complaint("no", "content_filter"), "error", Refusal),
        (Complaint("code of no status", "7"), "error", EndpointError),
    ],
)
def test_an_error_in_mid_stream_is_judged_as_one_before_it(
    said: Complaint, name: str, expected: type[Exception]
) -> None:
    fault = of_stream(said, URL)
    assert (fault.name, type(fault.error)) == (name, expected)
