"""One line that says why a service does not start."""

from __future__ import annotations

from ray_app.failure import MAX_CHARS, root_cause

SERVE = """The deployment failed to start 2 times in a row. See controller logs for details. Error:
ray::ServeReplica:app:LLMServer:m.initialize_and_get_metadata() (pid=1, actor_id=2)
  File "engine.py", line 3, in start
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"""

LOG = """\x1b[0;36m(EngineCore pid=9)\x1b[0;0m Process EngineCore:
\x1b[0;36m(EngineCore pid=9)\x1b[0;0m Traceback (most recent call last):
\x1b[0;36m(EngineCore pid=9)\x1b[0;0m ValueError: 3 GiB KV cache is needed, of which 1 GiB is there
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_an_engine_that_died_is_explained_by_its_own_log() -> None:
    assert root_cause([SERVE, LOG]) == "ValueError: 3 GiB KV cache is needed, of which 1 GiB is there"


def test_an_error_that_says_what_is_wrong_below_its_first_line_is_told_whole() -> None:
    text = "x\npydantic_core.ValidationError: 1 error for Model\n  dtype\n    no such dtype: int3\nend"
    assert root_cause([text]) == "ValidationError: 1 error for Model dtype no such dtype: int3"


def test_without_any_telling_error_the_end_of_what_serve_says_remains() -> None:
    assert root_cause([SERVE, "nothing here"]) == " ".join(SERVE.split())[-MAX_CHARS:]
    assert root_cause([]) == ""
