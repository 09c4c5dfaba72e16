from ray_app.config import ContextBudget
from ray_app.records import ExecutionResult, Hit
from ray_app.tokens import WordTokens, count
from ray_app.workspace import CodeRun, Workspace, expert_context, orchestrator_context

TOKENS = WordTokens()


def filled(documents: int, runs: int) -> Workspace:
    space = Workspace()
    space.add_hits([Hit(n, f"document number {n} text", 1.0 - n / 100) for n in range(documents)])
    space.runs += [CodeRun(f"print({n})", f"result {n}") for n in range(runs)]
    return space


def budget(tokens: int, code: int = 1000, chars: int | None = None) -> ContextBudget:
    return ContextBudget(context_tokens=tokens, code_tokens=code, document_chars=chars)


def test_the_best_hit_stands_last_and_no_text_twice() -> None:
    space = Workspace()
    assert space.add_hits([Hit(1, "best", 0.9), Hit(2, "next", 0.8), Hit(3, "best", 0.7)]) == 2
    assert space.documents == ["next", "best"]
    assert space.add_hits([Hit(1, "best", 0.9), Hit(4, "new", 0.5)]) == 1
    assert space.documents == ["next", "best", "new"]


def test_a_tight_budget_drops_the_lowest_ranked_documents_first_and_keeps_code() -> None:
    text = expert_context(filled(20, 2), "question", budget(80), TOKENS)
    assert "document number 0 text" in text and "document number 19 text" not in text
    assert text.endswith("```output\nresult 1\n```\n\n")
    assert count(text, TOKENS) <= 80


def test_a_question_longer_than_the_budget_leaves_an_empty_context_and_not_everything() -> None:
    long_question = "word " * 200
    assert expert_context(filled(5, 1), long_question, budget(100), TOKENS) == ""
    assert orchestrator_context(filled(5, 1), long_question, budget(100), TOKENS) == ""


def test_code_that_fills_the_orchestrators_room_stands_alone_with_its_fence_mended() -> None:
    text = orchestrator_context(filled(5, 40), "question", budget(300, code=60), TOKENS)
    assert "Doc" not in text and text.startswith("```")
    assert "result 39" in text and "result 1\n" not in text


def test_documents_are_shown_by_their_first_characters() -> None:
    space = Workspace(documents=["a" * 50])
    assert space.documents_text(10) == "Doc 1: aaaaaaaaaa ...\n\n"
    assert space.documents_text(None) == f"Doc 1: {'a' * 50}\n\n"


def test_what_a_program_did_is_told_even_when_it_printed_nothing() -> None:
    assert CodeRun.of("x", ExecutionResult("", "", 0, False, 0.1)).output == "[no output]"
    failed = CodeRun.of("x", ExecutionResult("part", "ValueError: bad", 1, False, 0.1)).output
    assert failed == "part\n[exit status 1]\nValueError: bad"
    assert "time limit" in CodeRun.of("x", ExecutionResult("", "", -9, True, 60.0)).output
