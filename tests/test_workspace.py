import random

import pytest

from ray_app.config import ContextBudget
from ray_app.records import ExecutionResult, Hit
from ray_app.tokens import TokenCounter, WordTokens
from ray_app.workspace import CodeRun, Context, Workspace, expert_context, orchestrator_context

TOKENS = WordTokens()


class Reading(WordTokens):
    """Word tokens that tell how many characters they had to read."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def spans(self, text: str) -> list[tuple[int, int]]:
        self.read += len(text)
        return super().spans(text)

    def _measure(self, text: str) -> int:
        return len(self.spans(text))


def filled(documents: int, runs: int) -> Workspace:
    space = Workspace()
    space.add_hits([Hit(n, f"document number {n} text", 1.0 - n / 100) for n in range(documents)])
    space.runs += [CodeRun(f"print({n})", f"result {n}") for n in range(runs)]
    return space


def budget(code: int = 1000, chars: int | None = None) -> ContextBudget:
    return ContextBudget(code_tokens=code, document_chars=chars)


def test_the_best_hit_stands_last_and_no_text_twice() -> None:
    space = Workspace()
    assert space.add_hits([Hit(1, "best", 0.9), Hit(2, "next", 0.8), Hit(3, "best", 0.7)]) == 2
    assert space.documents == ["next", "best"]
    assert space.add_hits([Hit(1, "best", 0.9), Hit(4, "new", 0.5)]) == 1
    assert space.documents == ["next", "best", "new"]


def test_a_tight_budget_drops_the_lowest_ranked_documents_first_and_keeps_code() -> None:
    context = expert_context(filled(20, 2), 79, budget(), TOKENS)
    # Hits are added best last, so the first of the list (number 19) is the one that ranks lowest.
    assert "document number 0 text" in context.text and "document number 19 text" not in context.text
    assert context.text.endswith("```output\nresult 1\n```\n\n")


@pytest.mark.parametrize("room", [0, -50])
def test_no_room_leaves_an_empty_context_and_not_everything(room: int) -> None:
    for shape in (expert_context, orchestrator_context):
        context = shape(filled(5, 1), room, budget(), TOKENS)
        assert (context.text, context.tokens) == ("", 0) and context.cut > 50


def test_code_that_fills_the_orchestrators_room_stands_alone_with_its_fence_mended() -> None:
    text = orchestrator_context(filled(5, 40), 299, budget(code=60), TOKENS).text
    assert "Doc" not in text and text.startswith("```")
    assert "result 39" in text and "result 1\n" not in text


def test_a_context_keeps_inside_its_room_and_accounts_for_what_it_left_out() -> None:
    rng, space = random.Random(5), filled(30, 6)
    whole = sum(map(TOKENS.count, space.document_texts(None) + space.run_texts()))
    for shape in (expert_context, orchestrator_context):
        for _ in range(200):
            room, code = rng.randrange(0, 900), rng.randrange(1, 400)
            context = shape(space, room, budget(code), TOKENS)
            assert TOKENS.count(context.text) == context.tokens <= room
            # Headings, and a fence that mends a cut, are no part of what was gathered.
            assert 0 <= context.tokens - (whole - context.cut) <= 15
        assert shape(space, 10**6, budget(10**6), TOKENS).cut == 0


def test_a_text_that_was_counted_in_an_earlier_turn_is_not_read_again() -> None:
    space, tokens = filled(50, 0), Reading()
    everything = sum(map(len, space.document_texts(None)))

    def turn(room: int) -> Context:
        return orchestrator_context(space, room, budget(), tokens)

    turn(10**6)
    first, tokens.read = tokens.read, 0
    for _ in range(50):
        turn(200)
    assert first >= everything
    assert tokens.read < 50 * 300, "only the document at the cut is read again"


def test_what_a_counter_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray_app.tokens.REMEMBERED", 3)
    tokens: TokenCounter = Reading()
    assert [tokens.count("word " * n) for n in (1, 2, 3, 1, 4, 1)] == [1, 2, 3, 1, 4, 1]
    assert len(tokens._counts) == 3
    assert isinstance(tokens, Reading) and tokens.read == 5 * (1 + 2 + 3 + 4)


def test_documents_are_shown_by_their_first_characters() -> None:
    space = Workspace(documents=["a" * 50])
    assert space.document_texts(10) == ["Doc 1: aaaaaaaaaa ...\n\n"]
    assert space.document_texts(None) == [f"Doc 1: {'a' * 50}\n\n"]


def test_what_a_program_did_is_told_even_when_it_printed_nothing() -> None:
    assert CodeRun.of("x", ExecutionResult("", "", 0, False, 0.1)).output == "[no output]"
    failed = CodeRun.of("x", ExecutionResult("part", "ValueError: bad", 1, False, 0.1)).output
    assert failed == "part\n[exit status 1]\nValueError: bad"
    assert "time limit" in CodeRun.of("x", ExecutionResult("", "", -9, True, 60.0)).output
