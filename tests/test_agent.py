import pytest

from ray_app.agent import Choice, Invalid, choose
from ray_app.chat import ChatRequest
from ray_app.config import RunConfig
from ray_app.errors import EndpointError, LimitReached
from ray_app.hle import HleSolver, make_solver
from ray_app.prompting import load_prompts
from ray_app.records import ChatReply, ExecutionResult, Hit, Task, ToolCall
from ray_app.tools.base import schema
from tests.stand_ins import FixedRetriever, MemoryLog, ScriptedModel, chooses, config, journal, says

TASK = Task("q1", "What is 6 times 7?", "42", scope=(3, 1))
HITS = [Hit(1, "best text", 0.9), Hit(3, "second text", 0.5)]


def orchestrates(*steps: ChatReply, answer: str = "<answer>42</answer>") -> ScriptedModel:
    """Orchestrator replies in order; experts and the judge answer by what their prompt asks for."""
    remaining = list(steps)

    def script(request: ChatRequest) -> ChatReply:
        prompt = request.messages[-1].content
        if request.tools:
            return remaining.pop(0) if remaining else chooses("answer", "answer-1")
        if "<query>" in prompt:
            return says("<query>six seven product</query>")
        if "```python" in prompt and "complete Python program" in prompt:
            return says("```python\nprint(6*7)\n```")
        return says("<correct>True</correct>" if "<correct>" in prompt else answer)

    return ScriptedModel(script)


async def ran(code: str) -> ExecutionResult:
    return ExecutionResult("", "Traceback: boom", 1, False, 0.1)


def solver(model: ScriptedModel, settings: RunConfig | None = None) -> HleSolver:
    return make_solver(settings or config(), load_prompts(), model, FixedRetriever(HITS), ran)


async def test_a_task_goes_from_search_to_code_to_a_judged_answer() -> None:
    model = orchestrates(chooses("search", "search-1"), chooses("enhance_reasoning", "reasoner-1"))
    log = MemoryLog()
    solved = await solver(model).solve(TASK, journal(TASK, log))
    assert solved.prediction == "42" and solved.verdict is not None and solved.verdict.method == "exact"
    assert [event.kind for event in log.events] == (
        ["model_call", "model_call", "retrieval", "tool_call", "turn"]
        + ["model_call", "model_call", "code", "tool_call", "turn"]
        + ["model_call", "model_call", "tool_call", "turn", "verdict"]
    )
    last = model.prompts()[-1]
    assert last.index("Doc 1: second text") < last.index("Doc 2: best text") < last.index("print(6*7)")


async def test_a_failed_program_is_visible_to_the_next_turn() -> None:
    model = orchestrates(chooses("enhance_reasoning", "reasoner-1"))
    await solver(model).solve(TASK, journal(TASK, MemoryLog()))
    second_turn = model.prompts()[2]
    assert "[exit status 1]" in second_turn and "Traceback: boom" in second_turn


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        (says("I think it is 42"), "no tool was called"),
        (ChatReply("", (ToolCall("c", "calculator", "{}"),)), "'calculator' is not offered"),
        (ChatReply("", (ToolCall("c", "search", "not json"),)), "search needs the arguments"),
        (chooses("search", "search-9"), "one of search-1"),
    ],
)
async def test_an_invalid_call_is_explained_in_the_next_turn(reply: ChatReply, told: str) -> None:
    model, log = orchestrates(reply), MemoryLog()
    await solver(model).solve(TASK, journal(TASK, log))
    first, second = model.prompts()[:2]
    assert "About your last call" not in first and told in second
    assert [event.status for event in log.of("turn")] == ["invalid", "ok"]


def test_the_first_valid_call_of_several_is_taken() -> None:
    tools = {tool.name: tool for tool in solver(orchestrates()).agent.tools}
    calls = (ToolCall("a", "nope", "{}"), ToolCall("b", "answer", '{"model": "answer-1"}'))
    chosen = choose(ChatReply("", calls), tools)
    assert isinstance(chosen, Choice) and (chosen.tool.name, chosen.alias) == ("answer", "answer-1")
    assert isinstance(choose(ChatReply("", calls[:1]), tools), Invalid)


def test_the_schema_lists_every_alias_in_an_enum() -> None:
    settings = config()
    tool = solver(orchestrates()).agent.tools[0]
    parameters = schema(tool, settings.models)["function"]["parameters"]
    assert parameters["properties"]["model"]["enum"] == ["reasoner-1"]
    assert "$1 in, $2 out per million tokens" in parameters["properties"]["model"]["description"]


async def test_answer_is_not_offered_before_documents_where_the_config_says_so() -> None:
    settings = config(orchestrator={"model": "m", "require_documents": True})
    model = orchestrates(chooses("answer", "answer-1"), chooses("search", "search-1"))
    await solver(model, settings).solve(TASK, journal(TASK, MemoryLog()))
    offered = [
        {tool["function"]["name"] for tool in request.tools} for request in model.asked if request.tools
    ]
    gathering = {"enhance_reasoning", "search"}
    assert offered == [gathering, gathering, gathering | {"answer"}]


async def test_a_tool_used_twice_running_is_hidden_only_when_asked() -> None:
    steps = [chooses("search", "search-1")] * 2
    for rule, expected in (("forbid", {"enhance_reasoning", "answer"}), ("allow", None)):
        model = orchestrates(*steps)
        settings = config(orchestrator={"model": "m", "repeat_tool": rule})
        await solver(model, settings).solve(TASK, journal(TASK, MemoryLog()))
        third = [{t["function"]["name"] for t in r.tools} for r in model.asked if r.tools][2]
        assert third == (expected or {"enhance_reasoning", "search", "answer"})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_rounds": 2}, "2 turns"),
        ({"tokens": 200}, "limits.tokens"),
        ({"cost_usd": 0.0000001}, "limits.cost_usd"),
        ({"wall_s": 0.05}, "limits.wall_s"),
    ],
)
async def test_a_budget_that_is_used_up_ends_the_task_as_limited(
    limits: dict[str, float], message: str
) -> None:
    model = orchestrates(*[says("no idea")] * 1000)
    priced = {"m": {"endpoints": [{"base_url": "http://127.0.0.1:9/v1"}], "price": {"input": 5}}}
    settings = config(limits={"max_rounds": 1000} | limits, models=priced)
    if "cost_usd" in limits:
        model = ScriptedModel(lambda request: ChatReply("no idea", cost_usd=0.01))
    if "wall_s" in limits:
        model = Slow(model.script)
    with pytest.raises(LimitReached, match=message):
        await solver(model, settings).solve(TASK, journal(TASK, MemoryLog()))


async def test_a_spending_limit_stops_a_turn_in_its_middle() -> None:
    def script(request: ChatRequest) -> ChatReply:
        return ChatReply("", chooses("search", "search-1").tool_calls, cost_usd=0.01)

    model, log = ScriptedModel(script), MemoryLog()
    own, settings = journal(TASK, log), config(limits={"cost_usd": 0.01})
    with pytest.raises(LimitReached, match=r"\$0\.0100 spent"):
        await solver(model, settings).solve(TASK, own)
    assert len(model.asked) == 1
    # A resume stops at the same call, and the judge is never stopped.
    with pytest.raises(LimitReached):
        await solver(model, settings).solve(TASK, journal(TASK, MemoryLog(), log.record()))
    assert len(model.asked) == 1 and own.guard is None


async def test_an_aliass_price_is_told_as_it_was_though_the_bill_is_mended() -> None:
    priced = {"m": {"endpoints": [{"base_url": "http://127.0.0.1:9/v1"}]}}
    told = {"answer": {"answer-1": {"model": "m", "told_price": {"input": 7, "output": 8}}}}
    for tools, expected in ((told, "$7 in, $8 out"), ({"answer": {"answer-1": {"model": "m"}}}, "answer-1.")):
        settings = config(models=priced, tools=tools)
        tool = schema(solver(orchestrates(), settings).agent.tools[-1], settings.models)
        text = tool["function"]["parameters"]["properties"]["model"]["description"]
        assert expected in text and ("$" in text) == (expected[0] == "$")


class Slow(ScriptedModel):
    async def complete(self, request: ChatRequest) -> ChatReply:
        import asyncio

        await asyncio.sleep(0.02)
        return await super().complete(request)


async def test_a_judge_that_fails_leaves_the_rollout_and_owes_the_verdict() -> None:
    replies = iter(["<correct>maybe</correct>"])

    def script(request: ChatRequest) -> ChatReply | Exception:
        if request.tools:
            return chooses("answer", "answer-1")
        if "<correct>" in request.messages[-1].content:
            return says(next(replies, "<correct>True</correct>"))
        return says("<answer>forty-two</answer>")

    model, log = ScriptedModel(script), MemoryLog()
    first = journal(TASK, log)
    solved = await solver(model).solve(TASK, first)
    assert solved.verdict is None and solved.prediction == "forty-two" and "expected a verdict" in solved.owed
    again = journal(TASK, log, log.record())
    solved = await solver(model).solve(TASK, again)
    assert solved.verdict is not None and solved.verdict.is_correct
    assert (again.replayed, again.live_model_calls) == (2, 1)


def by_context(request: ChatRequest) -> ChatReply:
    """Searches, then runs code, then answers, by what the prompt already holds."""
    prompt = request.messages[-1].content
    if not request.tools:
        return orchestrates().script(request)  # type: ignore[return-value]
    if "Doc 1" not in prompt:
        return chooses("search", "search-1")
    return chooses("answer", "answer-1") if "boom" in prompt else chooses("enhance_reasoning", "reasoner-1")


async def test_a_task_that_broke_anywhere_goes_on_from_its_last_call() -> None:
    whole = MemoryLog()
    expected = await solver(ScriptedModel(by_context)).solve(TASK, journal(TASK, whole))
    made = len(whole.record().calls)
    assert made == 8
    for kept in range(made + 1):
        resumed = journal(TASK, MemoryLog(), whole.record(kept))
        assert await solver(ScriptedModel(by_context)).solve(TASK, resumed) == expected
        assert (resumed.replayed, resumed.made) == (kept, made)


async def test_what_a_resume_serves_from_the_record_is_marked_and_not_counted_again() -> None:
    whole = MemoryLog()
    await solver(ScriptedModel(by_context)).solve(TASK, journal(TASK, whole))
    log = MemoryLog()
    # The first turn (orchestrator, query, retrieval) is recorded; the rest is live.
    await solver(ScriptedModel(by_context)).solve(TASK, journal(TASK, log, whole.record(3)))
    assert [event.is_replayed for event in log.of("turn")] == [True, False, False]
    assert [event.is_replayed for event in log.of("tool_call")] == [True, False, False]
    assert {event.is_replayed for event in log.of("model_call")} == {False}


async def test_a_recorded_reply_to_another_request_is_not_used() -> None:
    whole = MemoryLog()
    await solver(ScriptedModel(by_context)).solve(TASK, journal(TASK, whole))
    other = Task("q1", "What is 6 times 8?", "48", scope=(3, 1))
    resumed = journal(other, MemoryLog(), whole.record())
    await solver(ScriptedModel(by_context)).solve(other, resumed)
    # The retrieval and the program are the same requests; every prompt holds the new question.
    assert resumed.replayed == 2


async def test_an_endpoint_failure_is_recorded_and_raised() -> None:
    model, log = ScriptedModel(lambda request: EndpointError("endpoint down")), MemoryLog()
    with pytest.raises(EndpointError):
        await solver(model).solve(TASK, journal(TASK, log))
    (event,) = log.of("model_call")
    assert (event.status, event.error_kind, event.error) == ("error", "infrastructure", "endpoint down")


async def test_the_scope_of_the_task_reaches_the_retriever() -> None:
    model = orchestrates(chooses("search", "search-1"))
    retriever = FixedRetriever(HITS)
    await make_solver(config(), load_prompts(), model, retriever, ran).solve(TASK, journal(TASK, MemoryLog()))
    assert retriever.queries == [("six seven product", "q1")]
