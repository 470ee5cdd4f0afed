"""What the gateway tells of itself before a load begins: slices, models, and how prompts are tokenised."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.client import Connection
from loadtests.lengths import longest
from loadtests.load import Places, needs_lexicon, read_places
from loadtests.problems import LoadTestError, Problem, ScenarioError
from loadtests.scenario import TenantLoad
from loadtests.tokens import Count, Lexicon, calibrate

Keys = Mapping[str, str | None]
"""API keys by tenant."""

ASK_SECONDS = 60.0


class Target:
    """A running gateway. Every method raises ScenarioError where nobody answers."""

    def __init__(self, base_url: str, keys: Keys) -> None:
        self._base_url = base_url
        self._keys = keys
        self._lexicons: dict[tuple[str, str], Lexicon] = {}
        self._slices: list[dict[str, Any]] | None = None

    def slices(self) -> list[dict[str, Any]]:
        """The rows of `/slices`, asked for once; [] where the gateway has no such thing."""
        if self._slices is None:
            shown = self._ask("GET", "/slices", None, next(iter(self._keys.values()), None))
            self._slices = [row for row in shown if isinstance(row, dict)] if isinstance(shown, list) else []
        return self._slices

    def places(self) -> Places:
        """Which slice answers for what."""
        return read_places(self.slices())

    def max_model_len(self, model: str, tenant: str) -> int | None:
        """The model's context in tokens; None where the gateway does not tell."""
        shown = self._ask("GET", "/v1/models", None, self._keys.get(tenant))
        cards = shown.get("data", []) if isinstance(shown, dict) else []
        found = [card.get("max_model_len") for card in cards if card.get("id") == model]
        return int(found[0]) if found and found[0] else None

    def lexicons(self, tenants: Sequence[TenantLoad], tokenizers: Mapping[str, Path]) -> dict[str, Lexicon]:
        """The words of every tenant that counts in tokens. `tokenizers` are `tokenizer.json` files by model."""
        found = {}
        for tenant in filter(needs_lexicon, tenants):
            kind = (tenant.model, tenant.task)
            if kind not in self._lexicons:
                self._lexicons[kind] = self._lexicon(tenant, tokenizers.get(tenant.model))
            found[tenant.name] = self._lexicons[kind]
            _check_room(tenant, self._lexicons[kind])
        return found

    def _lexicon(self, tenant: TenantLoad, tokenizer: Path | None) -> Lexicon:
        key = self._keys.get(tenant.name)
        usage = self._counts_by_usage(tenant, key)
        if tokenizer is not None:
            count, source = _counts_locally(tokenizer), f"tokenizer file {tokenizer.name}"
            # What the template and special tokens add is the server's business; one request tells.
            added = usage("time") - count("time")
            return calibrate(lambda text: count(text) + added, source)
        if self._ask("POST", "/tokenize", _tokenize(tenant, "time"), key) is not None:
            return calibrate(lambda text: self._tokenized(tenant, text, key), "the server's /tokenize")
        return calibrate(usage, "the server's usage of one-token requests")

    def _tokenized(self, tenant: TenantLoad, text: str, key: str | None) -> int:
        return int(self._ask("POST", "/tokenize", _tokenize(tenant, text), key)["count"])

    def _counts_by_usage(self, tenant: TenantLoad, key: str | None) -> Count:
        from loadtests.bodies import PATHS

        def count(text: str) -> int:
            body: dict[str, Any] = {"model": tenant.model}
            if tenant.task == "embedding":
                body |= {"input": text}
            elif tenant.task == "chat":
                body |= {"messages": [{"role": "user", "content": text}], "max_tokens": 1}
            else:
                body |= {"prompt": text, "max_tokens": 1}
            answer = self._ask("POST", PATHS[tenant.task], body, key)
            try:
                return int(answer["usage"]["prompt_tokens"])
            except (TypeError, KeyError) as error:
                raise LoadTestError(
                    f"{tenant.model!r} does not tell how many tokens a prompt has, so prompt_tokens cannot be kept",
                    remedy="Check that the model answers this tenant; or give `tokenizers: {MODEL: path/tokenizer.json}`, or prompt_words.",
                ) from error

        return count

    def _ask(self, method: str, path: str, body: object, key: str | None) -> Any:
        connection = Connection(self._base_url, timeout_seconds=ASK_SECONDS, clock=time.perf_counter)
        try:
            return connection.get_json(path, key=key) if method == "GET" else connection.post_json(path, body, key=key)
        except OSError as error:
            raise ScenarioError(
                Problem(
                    f"nobody answers at {self._base_url} ({error})",
                    remedy="Start the gateway: sliceway up CONFIG",
                )
            ) from error
        finally:
            connection.close()


def _check_room(tenant: TenantLoad, lexicon: Lexicon) -> None:
    """Raises ScenarioError where the model's template alone is longer than any prompt that is asked for."""
    least = lexicon.overhead_tokens + 1
    if tenant.prompt_tokens is not None and longest(tenant.prompt_tokens) < least:
        raise ScenarioError(
            Problem(
                f"prompts of {longest(tenant.prompt_tokens)} tokens cannot be made: the template of {tenant.model!r} and one word are {least}",
                f"tenant {tenant.name!r}: prompt_tokens",
                f"Ask for {least} or more.",
            )
        )


def _tokenize(tenant: TenantLoad, text: str) -> dict[str, Any]:
    if tenant.task == "chat":
        return {"model": tenant.model, "messages": [{"role": "user", "content": text}]}
    return {"model": tenant.model, "prompt": text}


def _counts_locally(path: Path) -> Count:
    """Counts by a `tokenizer.json`, special tokens left out."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ScenarioError(
            Problem(
                "a tokenizer file needs the package tokenizers", str(path), "pip install tokenizers, or leave it out."
            )
        ) from error
    try:
        tokenizer = Tokenizer.from_str(json.dumps(json.loads(path.read_text(encoding="utf-8"))))
    except Exception as error:
        raise ScenarioError(Problem(f"no tokenizer can be read: {error}", str(path))) from error
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
