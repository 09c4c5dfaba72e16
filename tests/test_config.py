from pathlib import Path

import pytest
import yaml

from ray_app.config import differing_keys, load
from ray_app.errors import ConfigError

SAMPLE = Path(__file__).parent.parent / "configs" / "hle_sample.yaml"


def written(tmp_path: Path, **changes: object) -> Path:
    values = yaml.safe_load(SAMPLE.read_text()) | changes
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_environment_of_the_earlier_system_is_honoured_and_the_command_line_wins() -> None:
    environ = {"CONCURRENCY": "7", "MAX_ROUNDS": "3", "EXAMPLE_PATH": "/data/x.jsonl", "RUN_NAME": "night 1"}
    config = load(SAMPLE, ["limits.max_rounds=4"], environ)
    assert (config.concurrency, config.limits.max_rounds) == (7, 4)
    assert (config.dataset.path, config.run_name) == ("/data/x.jsonl", "night 1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurency": 3}, "unknown key 'concurency'; did you mean 'concurrency'?"),
        ({"concurrency": 0}, "concurrency: input should be greater than 0, got 0"),
        ({"judge": {"model": "gpt"}}, "judge.model: unknown model 'gpt'; models has baseline"),
        ({"tools": {"serach": {}}}, "tools.serach"),
        ({"tools": {}}, "expected at least `answer`"),
        ({"models": {"baseline": {"endpoints": [{}]}}}, "exactly one of base_url and service"),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_expectation(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, **changes), environ={})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load(tmp_path / "none.yaml", environ={})
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load(tmp_path / "bad.yaml", environ={})
    with pytest.raises(ConfigError, match="expected key=value"):
        load(SAMPLE, ["concurrency"], {})


def test_speed_may_differ_on_a_resume_and_what_is_measured_may_not() -> None:
    base = load(SAMPLE, environ={})
    faster = load(SAMPLE, ["concurrency=99", "workers=3"], {})
    other = load(SAMPLE, ["limits.max_rounds=11", "judge.sampling.temperature=1"], {})
    assert faster.digest == base.digest
    assert differing_keys(base.measured(), other.measured()) == [
        "judge.sampling.temperature",
        "limits.max_rounds",
    ]


def test_an_endpoints_file_replaces_the_addresses_it_lists(tmp_path: Path) -> None:
    listed = tmp_path / "endpoints.json"
    listed.write_text(
        '{"baseline": [{"ip_addr": "10.0.0.5", "port": 1406}, {"ip_addr": "10.0.0.6", "port": "1407"}],'
        ' "other": [], "_comment": "x", "retrieval": [{"ip_addr": "10.0.0.7", "port": 1401}]}'
    )
    config = load(written(tmp_path, endpoints_file=str(listed)), environ={})
    urls = [endpoint.base_url for endpoint in config.models["baseline"].endpoints]
    assert urls == ["http://10.0.0.5:1406/v1", "http://10.0.0.6:1407/v1"]
    assert config.retriever.url == "http://10.0.0.7:1401"
    listed.write_text('{"baseline": [{"host": "x"}]}')
    with pytest.raises(ConfigError, match="ip_addr"):
        load(written(tmp_path, endpoints_file=str(listed)), environ={})


def test_the_full_config_holds_the_alias_map_of_the_paper_and_names_every_key() -> None:
    config = load(SAMPLE.parent / "hle_full.yaml", environ={})
    aliases = {name: alias.model for tool in config.tools.values() for name, alias in tool.items()}
    assert len(aliases) == 12
    assert {name for name, model in aliases.items() if model == "gpt-5"} == {
        "reasoner-1",
        "search-1",
        "answer-1",
    }
    assert aliases["answer-math-2"] == "qwen2.5-math-7b" and aliases["search-3"] == "qwen3-32b"
    assert config.key_names() == ["NEBIUS_API_KEY", "OPENAI_API_KEY", "TOGETHER_API_KEY"]
    assert (config.concurrency, config.limits.max_rounds) == (512, 50)
    assert config.models["gpt-5"].price.input == 1.25


def test_an_anchor_budget_in_use_is_cut_to_what_the_model_can_read() -> None:
    from ray_app.tools.base import INSTRUCTION_TOKENS, Caller
    from tests.stand_ins import ScriptedModel, says

    config = load(SAMPLE.parent / "hle_full.yaml", environ={})
    alias = config.tools["answer"]["answer-math-1"]
    caller = Caller(ScriptedModel(lambda request: says("")), config.models)
    budget = caller.budget(alias.model, alias.budget, alias.sampling)
    assert budget.context_tokens == 4096 - 2000 - INSTRUCTION_TOKENS
