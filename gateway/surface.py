"""The surface: every path that is passed on to engines, and what the gateway must know to pass it on. Nothing else is forwarded.

The rows are what vLLM serves (0.32.0, 0.33.0: `vllm/entrypoints/*/**/api_router.py`) and clients of inference use; its operations,
its development mode and its scale-out paths are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gateway.tenants import Tenant

Task = Literal["generate", "embed", "any"]
Dialect = Literal["openai", "anthropic"]
Framing = Literal["chunks", "messages", "responses"]


@dataclass(frozen=True, slots=True)
class Route:
    """One path that is relayed to engines.

    `task` is the kind of model that serves it ("any": the engine decides). `body` is how the request comes: a JSON object, a
    multipart form, or nothing (the model follows from the path). `dialect` is whose errors and keys its clients know. `stream` is how
    a streamed answer is framed, None where there is none: `chunks` are chat's, ended by `[DONE]`, with the usage in a chunk that has
    to be asked for; `messages` (Anthropic) and `responses` are named events with the usage in them. `stored` routes
    belong to state that lies in one engine. `batch` routes may be named in a batch. Answers of routes that are not `metered` have no
    usage, or that of a response that was counted when it was made.
    """

    path: str
    task: Task
    summary: str
    method: Literal["GET", "POST"] = "POST"
    body: Literal["json", "form", "none"] = "json"
    dialect: Dialect = "openai"
    stream: Framing | None = None
    stored: bool = False
    batch: bool = False
    metered: bool = True

    @property
    def plain(self) -> bool:
        """A JSON POST whose answer is JSON or chunks: all that a relay has to know is in the table and the body."""
        return self.body == "json" and self.dialect == "openai" and self.stream in ("chunks", None) and not self.stored

    @property
    def salted(self) -> bool:
        """Whether its requests reach the prefix cache of an engine, and their body can name a salt for it."""
        return self.body == "json" and self.path not in _WITHOUT_CACHE

    def takes(self, task: str) -> bool:
        """Whether a model of kind `task`, as the routing table has it, may serve this route."""
        return self.task == "any" or task in (self.task, "unknown")


_WITHOUT_CACHE = frozenset(("/tokenize", "/detokenize", "/v1/messages/count_tokens"))

CALL = "sliceway.call"  # the key in a scope under which the ingress says what a path does not


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose path alone does not tell its route.

    `response_id` is the stored response it is about. `target` is the path, with its query, that the engine is asked; the route's own where
    it is empty. `tenant` is set where the gateway itself acts for a tenant, as it does for batches: no key is asked for.
    `priority` goes before the tenant's own. A request of a `batch` has nobody waiting for it: its latencies are kept apart.
    """

    route: Route
    response_id: str | None = None
    target: str = ""
    tenant: Tenant | None = None
    priority: int | None = None
    batch: bool = False


_CHUNKS: Framing = "chunks"

_ALL = (
    Route(
        "/v1/chat/completions",
        "generate",
        "Chat, streamed or not; the body is OpenAI's, with vLLM's extra fields",
        stream=_CHUNKS,
        batch=True,
    ),
    Route("/v1/completions", "generate", "Completion of a prompt, streamed or not", stream=_CHUNKS, batch=True),
    Route("/v1/embeddings", "embed", "Embeddings of one or several inputs", batch=True),
    Route(
        "/v1/responses",
        "generate",
        "A response; with `previous_response_id` it goes to the engine that holds that one",
        stream="responses",
        stored=True,
        batch=True,
    ),
    Route(
        "/v1/messages",
        "generate",
        "A message in Anthropic's shape, streamed or not",
        dialect="anthropic",
        stream="messages",
    ),
    Route(
        "/v1/messages/count_tokens",
        "generate",
        "How many tokens a message of Anthropic's shape would take",
        dialect="anthropic",
        metered=False,
    ),
    *(
        Route(path, "embed", "Documents in the order of their relevance to a query", batch=path == "/v1/rerank")
        for path in ("/v1/rerank", "/rerank", "/v2/rerank")
    ),
    *(
        Route(path, "embed", "How alike texts are, pair by pair", batch=path == "/v1/score")
        for path in ("/v1/score", "/score")
    ),
    Route("/classify", "embed", "Classes of one or several inputs, with their probabilities"),
    Route("/pooling", "embed", "What a pooling model gives for an input, as it gives it"),
    Route("/tokenize", "any", "Token ids of a prompt or of messages", metered=False),
    Route("/detokenize", "any", "The text of token ids", metered=False),
    Route("/v1/audio/transcriptions", "generate", "Speech to text, streamed or not", body="form", stream=_CHUNKS),
    Route("/v1/audio/translations", "generate", "Speech to English text, streamed or not", body="form", stream=_CHUNKS),
)

ROUTES: Mapping[str, Route] = {route.path: route for route in _ALL}
"""The routes whose path is fixed, all of them POST; hot paths are looked up here."""

PLAIN: Mapping[str, Route] = {path: route for path, route in ROUTES.items() if route.plain}
"""The part of ROUTES that a relay below ASGI can take."""

CREATE_RESPONSE = "/v1/responses"
RESPONSES = "/v1/responses/"
GET_RESPONSE = Route(
    f"{RESPONSES}{{response_id}}",
    "generate",
    "A stored response, from the engine that holds it; `stream=true` follows one that runs in the background",
    method="GET",
    body="none",
    stream="responses",
    stored=True,
    metered=False,
)
CANCEL_RESPONSE = Route(
    f"{RESPONSES}{{response_id}}/cancel",
    "generate",
    "Cancel a response that runs in the background",
    body="none",
    stored=True,
    metered=False,
)
BY_ID = (GET_RESPONSE, CANCEL_RESPONSE)
"""The routes with the id of a stored response in their path."""


def by_id(path: str) -> tuple[Route, str] | None:
    """The route of BY_ID that `path` belongs to, and the id in it; None for other paths. The method is the caller's to check."""
    if not path.startswith(RESPONSES):
        return None
    response_id, slash, action = path[len(RESPONSES) :].partition("/")
    if not response_id or (slash and action != "cancel"):
        return None
    return (CANCEL_RESPONSE if slash else GET_RESPONSE), response_id
