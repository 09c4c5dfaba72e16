"""Prompt templates: one text file each, loaded once, digested, replaceable by the user's folder.

A template uses `${name}` placeholders; what is filled in is never expanded again, so a question
may hold any character.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template

from ray_app.errors import ConfigError
from ray_app.records import digest

BUNDLED = Path(__file__).parent / "prompts"


@dataclass(frozen=True)
class Prompts:
    """The templates of a run; `digest` names their exact wording beside every score."""

    texts: dict[str, str]
    is_bundled: bool

    @property
    def digest(self) -> str:
        return digest(self.texts)[:12]

    def digest_of(self, name: str) -> str:
        return digest(self.texts[name])[:12]

    def render(self, name: str, **values: str) -> str:
        return Template(self.texts[name]).substitute(values)


def load_prompts(folder: str | None = None, bundled: Path = BUNDLED) -> Prompts:
    """Our templates, or the user's: a folder replaces the templates that it holds, by file name."""
    texts = {path.stem: path.read_text() for path in sorted(bundled.glob("*.txt"))}
    if folder is None:
        return Prompts(texts, is_bundled=True)
    theirs = {path.stem: path.read_text() for path in sorted(Path(folder).glob("*.txt"))}
    if not theirs:
        raise ConfigError(f"prompts {folder!r}: expected a folder with .txt templates, found none")
    unknown = sorted(set(theirs) - set(texts))
    if unknown:
        raise ConfigError(f"prompts {folder}/{unknown[0]}.txt: no such prompt; known: {', '.join(texts)}")
    for name, text in theirs.items():
        _check_placeholders(f"{folder}/{name}.txt", text, texts[name])
    return Prompts(texts | theirs, is_bundled=False)


def _check_placeholders(where: str, text: str, ours: str) -> None:
    template = Template(text)
    extra = sorted(set(template.get_identifiers()) - set(Template(ours).get_identifiers()))
    if not template.is_valid() or extra:
        known = ", ".join(f"${{{name}}}" for name in Template(ours).get_identifiers())
        raise ConfigError(
            f"prompts {where}: bad placeholder {extra[0] if extra else '$'!r}; known: {known}; "
            "write $$ for a dollar sign"
        )
