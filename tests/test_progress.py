import io
from dataclasses import replace

from rich.console import Console

from ray_app.planning import Tally, WorkItem
from ray_app.progress import Display, clock
from ray_app.records import Outcome, Task, TaskResult, Verdict


def result(name: str, outcome: Outcome = "ok", correct: bool = True) -> TaskResult:
    task = Task(name, "q", "a")
    made = TaskResult(name, task.rollout_key, task.judge_key, 0, 1, outcome, cost_usd=0.5)
    if outcome == "ok":
        return replace(made, verdict=Verdict(correct, "judge"))
    return replace(made, error_kind="infrastructure")


class Watched:
    """A display on a file, with a clock that the test moves."""

    def __init__(self, planned: int, skipped: int) -> None:
        self.now, self.out = 0.0, io.StringIO()
        self.tally = Tally(planned)
        self.tally.counts["ok"] = skipped
        self.display = Display(self.tally, console=Console(file=self.out, width=300), timer=lambda: self.now)

    def finish(self, item: TaskResult) -> None:
        self.display.started(WorkItem(Task(item.task_id, "q", "a"), 0))
        self.tally.counts[item.outcome] += 1
        self.display.committed(item, self.tally)

    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def test_the_markers_of_the_earlier_system_stand_on_lines_of_their_own() -> None:
    watched = Watched(planned=3, skipped=1)
    watched.display.skipped("q0")
    watched.now = 60.0
    watched.finish(result("q1", correct=False))
    watched.finish(result("[red]q2[/red]", "failed"))
    assert watched.lines()[:2] == [
        "[HLE_TASK_COMPLETE] id=q0 status=skipped",
        "[HLE_TASK_COMPLETE] id=q1 status=done correct=False",
    ]
    assert (
        "[HLE_TASK_COMPLETE] id=[red]q2[/red] status=error correct=False error_type=infrastructure"
        in watched.lines()
    )
    assert "[OVERALL_ETA] done=3/3 elapsed=01:00 eta=00:00" in watched.lines()


def test_skipped_tasks_do_not_make_the_eta_optimistic() -> None:
    watched = Watched(planned=100, skipped=89)
    watched.now = 100.0
    watched.finish(result("q1"))
    # One task took 100 s and ten are left; counting the 89 skipped ones would say eleven seconds.
    assert watched.display.eta() == "16:40"


def test_without_a_terminal_a_line_comes_every_thirty_seconds_even_if_nothing_ends() -> None:
    watched = Watched(planned=5, skipped=0)
    for second in range(1, 91):
        watched.now = float(second)
        watched.display.tick()
    assert [line.split()[0] for line in watched.lines()] == ["[OVERALL_ETA]", "progress:"] * 3


def test_the_status_shows_counts_rate_and_cost() -> None:
    watched = Watched(planned=10, skipped=2)
    watched.now = 30.0
    watched.finish(result("q1"))
    status = watched.display.status()
    assert "3 ok, 0 failed, 0 limited, 0 owed" in status
    assert "2.0/min" in status and "$0.50" in status


def test_a_clock_has_hours_only_when_needed() -> None:
    assert [clock(seconds) for seconds in (59.6, 3599, 3600, 90061)] == [
        "01:00",
        "59:59",
        "01:00:00",
        "25:01:01",
    ]
