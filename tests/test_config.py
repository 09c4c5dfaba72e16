import math
from pathlib import Path

import pytest
import yaml

from ray_app.chat import cost
from ray_app.config import Adaptive, Price, RunConfig, differing_keys, load
from ray_app.errors import ConfigError
from ray_app.preview import caveats
from ray_app.records import Usage

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


def baseline(**settings: object) -> dict[str, object]:
    return {"models": {"baseline": {"endpoints": [{"base_url": "http://h/v1"}], **settings}}}


def limited(concurrency: object) -> dict[str, object]:
    endpoint = {"base_url": "http://h/v1", "concurrency": concurrency}
    return {"models": {"baseline": {"endpoints": [endpoint]}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concurency": 3}, "unknown key 'concurency'; did you mean 'concurrency'?"),
        ({"concurrency": 0}, "concurrency: input should be greater than 0, got 0"),
        ({"judge": {"model": "gpt"}}, "judge.model: unknown model 'gpt'; models has baseline"),
        ({"tools": {"serach": {}}}, "tools.serach"),
        ({"tools": {}}, "expected at least `answer`"),
        ({"models": {"baseline": {"endpoints": [{}]}}}, "exactly one of base_url and service"),
        ({"limits": {"wall_s": math.inf}}, "limits.wall_s: input should be a finite number, got inf"),
        ({"limits": {"run_cost_usd": math.nan}}, "limits.run_cost_usd: input should be a finite number"),
        (baseline(price={"input": math.inf}), "price.input: input should be a finite number, got inf"),
        (baseline(price=math.nan), "models.baseline.price: input should be a valid dictionary"),
        (baseline(timeout_s="1e999"), "timeout_s: input should be a finite number, got '1e999'"),
        (baseline(context_length=math.inf), "context_length: input should be a finite number, got inf"),
        (baseline(extra_body={"top_k": math.nan}), "extra_body: expected what JSON can say"),
        (limited("fast"), "concurrency.word: input should be 'adaptive', got 'fast'"),
        (limited(0), "concurrency.number: input should be greater than 0, got 0"),
        (limited({"start": 3000}), "expected start <= max, got 3000 > 1024"),
        (
            {
                "models": {
                    "baseline": {"endpoints": [{"base_url": url} for url in ("http://h/v1", "http://h/v1/")]}
                }
            },
            "models.baseline: endpoints: expected each address once, got http://h/v1 2 times",
        ),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_expectation(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, **changes), environ={})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_ceiling_alone_is_a_limit_that_starts_within_it(tmp_path: Path) -> None:
    (endpoint,) = load(written(tmp_path, **limited({"max": 64})), environ={}).models["baseline"].endpoints
    assert endpoint.concurrency == Adaptive(start=64, max=64)
    assert Adaptive() == Adaptive(start=128, max=1024)


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


def test_the_shipped_prices_are_dollars_per_million_tokens() -> None:
    config = load(SAMPLE.parent / "hle_full.yaml", environ={})
    prices = {name: config.models[name].price for name in ("gpt-5", "gpt-5-mini")}
    assert prices == {
        "gpt-5": Price(input=1.25, output=10, cached_input=0.125),
        "gpt-5-mini": Price(input=0.25, output=2, cached_input=0.025),
    }
    # 120,000 tokens in, 100,000 of them cached, and 16,384 out.
    usage = Usage(120_000, 16_384, cached_tokens=100_000)
    assert cost(usage, config.models["gpt-5"]) == pytest.approx(0.025 + 0.0125 + 0.16384)
    assert cost(usage, config.models["gpt-5-mini"]) == pytest.approx(0.005 + 0.0025 + 0.032768)
    assert cost(Usage(1_000_000, 0), config.models["gpt-5"]) == pytest.approx(1.25)
    assert config.code.usd_per_s * 3600 == pytest.approx(0.02988)  # an hour of an interpreter: three cents
    assert (config.unpriced(), config.estimated()) == ([], [])


def full(*changes: str) -> RunConfig:
    return load(SAMPLE.parent / "hle_full.yaml", changes, {})


def test_a_run_may_go_on_with_more_money_and_other_limits_of_calls() -> None:
    base = full()
    assert full("limits.run_cost_usd=5").digest == base.digest != full("limits.cost_usd=5").digest
    endpoint = '[{"base_url": "http://127.0.0.1:1/v1", "concurrency": 40}]'
    assert full(f"models.gpt-5.endpoints={endpoint}").digest == base.digest
    with pytest.raises(ConfigError, match=r"limits\.run_cost_usd: models\.gpt-5 has no price"):
        full("limits.run_cost_usd=5", "models.gpt-5.price=null")


def test_a_price_may_be_mended_in_mid_run_but_not_what_the_orchestrator_was_told() -> None:
    base = full()
    assert full("models.orchestrator-8b.price.output=9", "code.usd_per_s=1").digest == base.digest
    assert full("models.gpt-5.price.cached_input=0.5").digest == base.digest
    mended = full("models.gpt-5.price.input=1.5")
    told = "tools.{}.{}.told_price.input"
    differing = [told.format(*place) for place in TOLD_OF_GPT_5]
    assert differing_keys(base.measured(), mended.measured()) == differing
    kept = [f"{key.removesuffix('.input')}={{input: 1.25, output: 10}}" for key in differing]
    assert full("models.gpt-5.price.input=1.5", *kept).digest == base.digest


TOLD_OF_GPT_5 = [("answer", "answer-1"), ("enhance_reasoning", "reasoner-1"), ("search", "search-1")]


def test_a_model_without_a_price_is_named_and_takes_no_spending_limit(tmp_path: Path) -> None:
    path = written(tmp_path, models={"baseline": {"endpoints": [{"service": "baseline"}]}})
    config = load(path, environ={})
    assert config.unpriced() == ["baseline"] and cost(Usage(10**6, 10**6), config.models["baseline"]) == 0
    assert [line.split(":")[0] for line in caveats(config)] == ["unpriced", "tokens estimated"]
    with pytest.raises(ConfigError, match=r"limits.cost_usd: models.baseline has no price"):
        load(path, ["limits.cost_usd=1"], {})
    assert load(SAMPLE, ["limits.cost_usd=1"], {}).unpriced() == []
