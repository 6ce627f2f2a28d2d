"""Who annotates: a server, a local model, or rules; behind one client with a cache that can be told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from .answer_cache import AnswerCache, CachedClient
from .chat import ChatClient, ChatRequest, ChatResult, Interrupted
from .request_limits import RequestLimits
from .rule_annotator import RuleAnnotator


@dataclass(frozen=True)
class Annotator:
    """
    Args:
        kind: "openai" for any server that speaks its chat-completions protocol, "local" for a transformers
            image-text-to-text model, "rules" for templates about masks whose labels are known.
        model: Its name; folder or hub id of a local one.
        base_url: Of the server; OpenAI's own without it.
        api_key_env: Environment variable that holds the key. The key itself is never an argument.
        concurrency: Requests in flight at most.
        requests_per_minute, tokens_per_minute: Limits of the server.
        max_total_tokens: Hard budget of the run folder, over all runs.
        timeout: Seconds until a request is given up, and tried again.
        max_retries: Of a request that the server did not answer.
    """

    kind: Literal["openai", "local", "rules"] = "openai"
    model: str | None = None
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_total_tokens: int | None = None
    timeout: float = 120.0
    max_retries: int = 5

    def __post_init__(self) -> None:
        if self.kind != "rules" and not self.model:
            raise ValueError(f"--annotator {self.kind} needs --model: the name of the model that answers")
        if self.kind == "rules" and self.model:
            raise ValueError("--annotator rules takes no --model")
        if self.base_url:
            checked_address(self.base_url)

    @property
    def model_name(self) -> str:
        """As it stands in the keys of requests."""
        return self.model or RuleAnnotator.model


class Gate:
    """For who answers on this machine: one request at a time, and none any more once `stop` is set."""

    def __init__(self, client: ChatClient, stop: asyncio.Event):
        self.model, self._client, self._stop = client.model, client, stop
        self._turn = asyncio.Lock()

    async def complete(self, request: ChatRequest) -> ChatResult:
        async with self._turn:
            if self._stop.is_set():
                raise Interrupted("stopped by a signal")
            return await self._client.complete(request)


@asynccontextmanager
async def open_client(
    annotator: Annotator, cache_folder: Path, shard: str, stop: asyncio.Event, workers: int = 1
) -> AsyncIterator[CachedClient]:
    """
    The client of a run, in a running event loop.

    Args:
        cache_folder: Answers of this and earlier runs.
        shard: Names the file to which this process adds answers.
        stop: When set, no further request goes out.
        workers: How many processes share the limits; each gets its part.
    """
    with AnswerCache(cache_folder, shard) as cache:
        if annotator.kind == "rules":
            yield CachedClient(Gate(RuleAnnotator(), stop), cache)
        elif annotator.kind == "local":
            from .local_model import LocalModelClient

            local = LocalModelClient(annotator.model_name)
            try:
                yield CachedClient(Gate(local, stop), cache)
            finally:
                await local.close()
        else:
            from .openai_client import OpenAIClient

            limits = RequestLimits(
                concurrency=max(1, annotator.concurrency // workers),
                requests_per_minute=_share(annotator.requests_per_minute, workers),
                tokens_per_minute=_share(annotator.tokens_per_minute, workers),
                # What is left is shared out; what the cache holds has been spent by all of them.
                max_total_tokens=_budget(annotator.max_total_tokens, cache.spent_tokens, workers),
                spent_tokens=cache.spent_tokens,
                stop=stop,
            )
            client = OpenAIClient(
                annotator.model_name,
                annotator.base_url,
                api_key_env=annotator.api_key_env,
                limits=limits,
                timeout=annotator.timeout,
                max_retries=annotator.max_retries,
            )
            try:
                yield CachedClient(client, cache)
            finally:
                await client.close()


def checked_address(url: str) -> str:
    """Scheme, host and path of a server. The error does not repeat an address that may hold a secret."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError(
            "the address of the server holds more than scheme, host and path: keys belong into the environment"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server, such as http://localhost:8000/v1")
    return url.rstrip("/")


def _share(limit: int | None, workers: int) -> int | None:
    return None if limit is None else max(1, limit // workers)


def _budget(total: int | None, spent: int, workers: int) -> int | None:
    return None if total is None else spent + max(0, total - spent) // workers
