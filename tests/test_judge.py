import pytest

from ray_app import judge
from ray_app.errors import JudgeError
from ray_app.prompting import load_prompts
from ray_app.records import Task

TASK = Task("t1", "Which colour is the sky?", "Blue")


@pytest.mark.parametrize(
    "reply",
    [
        "<correct> True </correct>",
        "<correct>true.</correct>",
        "<CORRECT>Yes",
        "x <correct>**True**</correct>",
        "<correct>True, the two agree</correct>",
    ],
)
def test_a_true_verdict_is_read_however_it_is_dressed(reply: str) -> None:
    assert judge.read(reply, "azure", "m", "toolorchestra").is_correct


@pytest.mark.parametrize(
    "reply", ["", "True", "<correct>perhaps</correct>", "<think><correct>True</correct>"]
)
def test_a_reply_without_a_verdict_is_an_error_and_never_wrong(reply: str) -> None:
    with pytest.raises(JudgeError, match="judge it again"):
        judge.read(reply, "azure", "m", "toolorchestra")


@pytest.mark.parametrize(
    "reply",
    [
        'Yes: {"extracted_final_answer": "blue", "reasoning": "same", "correct": "Yes", "confidence": "85%"}',
        "extracted_final_answer: blue\nreasoning: same\n**correct**: yes\nconfidence: 85",
    ],
)
def test_the_fields_of_the_hle_judge_are_kept(reply: str) -> None:
    verdict = judge.read(reply, "blue", "m", "hle-style")
    assert (verdict.is_correct, verdict.extracted, verdict.reasoning) == (True, "blue", "same")
    assert verdict.confidence == pytest.approx(0.85)


def test_only_toolorchestra_takes_equal_text_without_asking() -> None:
    equal = judge.without_judge(TASK, " bLUE ", "", "toolorchestra")
    assert equal is not None and equal.is_correct and equal.method == "exact"
    assert judge.without_judge(TASK, "blue", "so it is blue", "hle-style") is None
    assert judge.without_judge(TASK, "azure", "", "toolorchestra") is None


@pytest.mark.parametrize("prediction", ["", "  ", "word " * 501])
def test_no_answer_is_wrong_without_asking(prediction: str) -> None:
    protocols: tuple[judge.Protocol, ...] = ("toolorchestra", "hle-style")
    for protocol in protocols:
        verdict = judge.without_judge(TASK, prediction, "", protocol)
        assert verdict is not None and not verdict.is_correct


def test_the_judge_sees_the_prediction_or_the_whole_response_by_protocol() -> None:
    prompts = load_prompts()
    short = judge.prompt(prompts, TASK, "azure", "Long story: azure, 90 %", "toolorchestra")
    whole = judge.prompt(prompts, TASK, "azure", "Long story: azure, 90 %", "hle-style")
    assert "Candidate answer: azure" in short and "Long story" not in short
    assert "Long story: azure, 90 %" in whole and "Blue" in whole
