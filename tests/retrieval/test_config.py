from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ray_app.errors import ConfigError
from ray_app.retrieval.config import Autoscaling, Knobs, RetrieverConfig, knobs_of_environment
from ray_app.services import check, read_serve_config

ROOT = Path(__file__).resolve().parents[2]
BASE = {"index_dir": "a", "unscoped": "search"}


def test_the_gpu_config_is_valid_and_its_knobs_reach_the_builder() -> None:
    from ray_app.app import RetrieverArgs
    from ray_app.retrieval.deployment import retriever_app

    config = read_serve_config(str(ROOT / "configs" / "serve_retriever_gpu.yaml"))
    check(config, ["retriever"])
    args = RetrieverArgs.model_validate(dict(config.services["retriever"].args))
    assert args.user_config["max_batch_size"] == 64
    app = retriever_app(args, "digest", args.user_config)
    deployment = app._bound_deployment
    assert deployment.ray_actor_options is not None and deployment.ray_actor_options["num_gpus"] == 1
    assert deployment._deployment_config.autoscaling_config.max_replicas == 2


def test_a_service_is_the_same_whatever_its_knobs_were_turned_to() -> None:
    from ray_app.app import RetrieverArgs, service_digest

    path = "ray_app.app:retriever"
    first, turned, other = (
        service_digest(path, RetrieverArgs.model_validate({**BASE, **more}))
        for more in ({}, {"user_config": {"min_score": 0.3}}, {"min_score": 0.3})
    )
    assert first == turned != other


def test_a_job_refuses_settings_of_a_deployment_that_it_could_not_apply(tmp_path: Path) -> None:
    app = {
        "name": "retriever",
        "import_path": "ray_app.app:retriever",
        "deployments": [{"name": "retriever", "num_replicas": 3}],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump({"applications": [app]}))
    with pytest.raises(ConfigError, match="'num_replicas' is not carried over to a job; set it in `args`"):
        read_serve_config(str(path))


def test_faiss_k_is_the_parity_mode_by_another_name() -> None:
    assert Knobs.model_validate({"faiss_k": 100}).mode == "postfilter:100"
    assert Knobs.model_validate({"faiss_k": None}).mode == "exact"
    assert Knobs(mode="postfilter:7").changed({"faiss_k": None}).mode == "exact"
    assert Knobs(mode="postfilter:7", min_chars=5).changed({"max_batch_size": 9}) == Knobs(
        mode="postfilter:7", min_chars=5, max_batch_size=9
    )


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"faiss_k": 5, "mode": "exact"}, "differ; give one"),
        ({"faiss_k": 0}, "expected 'exact' or 'postfilter:K'"),
        ({"max_batch_size": 0}, "greater than 0"),
        ({"encoder": "minilm"}, "Extra inputs are not permitted"),
    ],
)
def test_a_knob_that_does_not_exist_or_fit_is_refused(knobs: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Knobs().changed(knobs)


def test_the_older_variables_set_knobs() -> None:
    environ = {
        "RETRIEVAL_FAISS_K": "100",
        "RETRIEVAL_MAX_BATCH_SIZE": "256",
        "RETRIEVAL_MAX_WAIT_MS": "5",
        "OTHER": "1",
    }
    knobs = Knobs.model_validate(knobs_of_environment(environ))
    assert (knobs.mode, knobs.max_batch_size, knobs.batch_wait_s) == ("postfilter:100", 256, 0.005)
    assert knobs_of_environment({"RETRIEVAL_FAISS_K": ""}) == {}
    with pytest.raises(ConfigError, match=r"RETRIEVAL_FAISS_K is '1e3'; expected a whole number"):
        knobs_of_environment({"RETRIEVAL_FAISS_K": "1e3"})


def test_replicas_are_given_in_one_way() -> None:
    with pytest.raises(ValueError, match="num_replicas or autoscaling, and not both"):
        RetrieverConfig.model_validate({**BASE, "num_replicas": 2, "autoscaling": {"max_replicas": 3}})
    with pytest.raises(ValueError, match="min_replicas 4 is over max_replicas 3"):
        Autoscaling(min_replicas=4, max_replicas=3)
