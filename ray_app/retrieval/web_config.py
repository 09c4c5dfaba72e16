"""What can be set of the web fallback, and where its key comes from.

The key is named here and never held: it is in no config, no argument and no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ray_app.errors import ConfigError
from ray_app.retrieval.build import default_cache_dir
from ray_app.retrieval.tavily import BASE_URL, MAX_RESULTS


class WebConfig(BaseModel):
    """The section `web` of a retriever. Times in seconds, prices in US dollars.

    The prices are those of an advanced search and of an advanced extraction at $0.005 a credit; plans charge
    up to $0.008.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    api_key_env: str = Field("TAVILY_API_KEY", min_length=1, description="variable that holds the key")
    base_url: str = BASE_URL
    max_results: int = Field(MAX_RESULTS, gt=0, le=MAX_RESULTS, description="pages of one search")
    timeout_s: float = Field(30.0, gt=0, description="of a whole fallback")
    call_timeout_s: float = Field(20.0, gt=0, description="of each try of each call")
    max_concurrency: int = Field(40, gt=0, description="calls at once, over all fallbacks")
    search_usd: float = Field(0.01, ge=0, description="list price of a search")
    extract_usd: float = Field(0.002, ge=0, description="list price of a page that was read")
    cache_dir: Path | None = Field(None, description="where answers are kept; default: the user's cache")
    cache_max_age_s: float | None = Field(None, gt=0, description="null keeps answers for ever")
    max_ongoing_requests: int = Field(512, gt=0, description="fallbacks that the replica holds")

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"expected a URL such as {BASE_URL}")
        return base_url

    @property
    def cache_folder(self) -> Path:
        return self.cache_dir or default_cache_dir().with_name("web")


def read_key(variable: str, environ: Mapping[str, str]) -> str:
    """The key that `variable` holds. Raises ConfigError where it is empty."""
    key = environ.get(variable, "").strip()
    if not key:
        raise ConfigError(
            f"web fallback: variable {variable} is empty where its replica runs; "
            "export it before Ray starts, or drop `web` from the retriever's config"
        )
    return key
