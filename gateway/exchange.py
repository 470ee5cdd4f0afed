"""One request from its head to the last byte of its answer, whoever relays it.

An `Exchange` is a context manager that owns everything a request holds: its place in the in-flight count, its deadline, its
measurements. Whatever ends it (an answer, an error, a client that leaves, a timeout, a shutdown) ends in `__exit__`,
so that counters cannot leak. It does no I/O: a relay reads and writes, and asks here what to do.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from msgspec import Struct
from msgspec.structs import replace

from gateway.admission import Admission, Ask, CacheSalts, Claim, rate_limit_headers
from gateway.background import BackgroundResponses
from gateway.config import GatewayConfig
from gateway.digests import LatencyBook, Series
from gateway.error_map import status_and_type
from gateway.errors import (
    BodyReaderGone,
    Draining,
    EngineDied,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
    InvalidKey,
    MalformedRequest,
    RequestTimeout,
    UnknownPreviousResponse,
    UnknownResponse,
    WrongTask,
)
from gateway.keys import Keyring, WallClock
from gateway.large_bodies import LARGE_BYTES, LargeBodies, LargeBody, Pieces
from gateway.request import Body, Route, check_head, credentials, outgoing_body, read_request
from gateway.router import Router, unknown_model
from gateway.sse import StreamMeter, Usage
from gateway.stats import CLIENT_LEFT, Stats
from gateway.stored_responses import ResponseIds
from gateway.surface import Call
from gateway.tenants import UNKNOWN, Directory, Tenant
from gateway.typed_events import TypedEventMeter
from placement.table import ReplicaRow

Clock = Callable[[], float]

# A request that two engines died of may be what kills them; it gets no third.
DEATHS_PER_REQUEST = 2


class ClientLeft(Exception):
    """The client closed its connection; nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What a reload replaces as a whole. `generation_header` tells clients which configuration decided.

    `held_bytes` is how much of a body a relay may hold itself; of more it asks `Exchange.large_body`.
    """

    directory: Directory
    limits: GatewayConfig
    generation_header: tuple[bytes, bytes] = (b"x-sliceway-generation", b"0")
    held_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "held_bytes", min(self.limits.max_body, LARGE_BYTES))


Stage = Literal["body", "reading", "queue", "first byte", "stream"]
"""What the gateway waits for; it decides whose fault a timeout is."""


class Exchanges:
    """Every request in the gateway, and what they share.

    `policy` and `keyring` may be replaced at any time. `draining` refuses new requests. `on_unreachable` is told of replicas that
    accept no connection, and `on_served` of those that answered. `look_again` says whether keys or tenants have just changed.
    `book` has the latencies of requests that somebody waits for, `batch_book` those of batches.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        keyring: Callable[[], Keyring],
        router: Router,
        admission: Admission,
        book: LatencyBook,
        stats: Stats,
        clock: Clock,
        wall: WallClock,
        on_unreachable: Callable[[ReplicaRow, str], None],
        on_served: Callable[[str], None],
        response_ids: ResponseIds | None = None,
        salts: CacheSalts | None = None,
        look_again: Callable[[], bool] = lambda: False,
        batch_book: LatencyBook | None = None,
        background: BackgroundResponses | None = None,
        large_bodies: LargeBodies | None = None,
    ) -> None:
        self.policy = policy
        self.keyring = keyring
        self.router = router
        self.admission = admission
        self.book = book
        self.stats = stats
        self.clock = clock
        self.wall = wall
        self.on_unreachable = on_unreachable
        self.on_served = on_served
        self.response_ids = response_ids
        self.salts = salts
        self.look_again = look_again
        self.batch_book = batch_book or LatencyBook()
        self.background = background
        self.large_bodies = large_bodies or LargeBodies()
        self.draining = False
        self.active: set[Exchange] = set()

    def open(
        self,
        route: Route,
        request_id: bytes,
        on_interrupt: Callable[[], None] | None = None,
        call: Call | None = None,
    ) -> Exchange:
        """A new exchange, to be entered by the task that serves it. `call` says what the path of the route does not.

        `on_interrupt` is called instead of cancelling that task, for a relay that serves without one; `interruption` then tells why.
        """
        now, policy = self.clock(), self.policy
        return Exchange(
            self,
            route,
            request_id,
            on_interrupt,
            call,
            call.tenant if call else None,
            now,
            now + policy.limits.body_timeout_seconds,
            policy.generation_header,
        )

    def authenticate(self, authorization: bytes | None) -> Tenant:
        """The tenant behind an Authorization header. Raises MissingKey, InvalidKey, InvalidToken or TokenKeysUnavailable.

        A key that is not known may have been made a moment ago: before it is refused, the key file is looked at.
        """
        try:
            return self.policy.directory.authenticate(authorization, self.keyring(), self.wall())
        except InvalidKey:
            if not self.look_again():
                raise
        return self.policy.directory.authenticate(authorization, self.keyring(), self.wall())

    def expire(self) -> None:
        """Interrupt every exchange whose deadline has passed."""
        now = self.clock()
        for exchange in [e for e in self.active if e.deadline < now]:
            exchange.interrupt(exchange.timeout_error())

    def interrupt_all(self, error: GatewayError) -> None:
        """End every exchange with `error`."""
        for exchange in list(self.active):
            exchange.interrupt(error)


class Exchange(Struct, eq=False):
    """See the module. The order of calls is: enter, `admit`, `take_body`, `place` (again after EngineUnreachable, and after an
    EngineDied that `died` lets pass) and, where it gave none, `placed`; `dispatched`, then `stream_meter` or `whole`, `complete`, exit; `failed` or
    `client_left` may come at any time.
    """

    _desk: Exchanges
    route: Route
    request_id: bytes
    _on_interrupt: Callable[[], None] | None
    _call: Call | None
    tenant: Tenant | None
    received_at: float
    deadline: float
    generation: tuple[bytes, bytes]
    model: str = UNKNOWN  # for metrics: a name that exists, so that clients cannot invent series
    meter: StreamMeter | TypedEventMeter | None = None
    usage: Usage | None = None
    status: int = 500
    answering: bool = False  # the status line is out
    streaming: bool = False  # the answer is a stream of events
    complete: bool = False  # the client has the whole answer
    _stage: Stage = "body"
    _content_type: bytes | None = None
    _deadline_ms: bytes | None = None
    _raw: bytes = b""
    _body: Body = Body()
    _large: LargeBody | None = None  # a body too long to lie in `_raw`, which has the beginning of its prompt then
    _holder: ReplicaRow | None = None  # of the stored response that the request is about
    _response_id: str | None = None  # of the response that the request makes
    _claim: Claim | None = None
    _on_placed: Callable[[], None] | None = None
    _refused: frozenset[str] = frozenset()  # replicas that accepted no connection
    _deaths: frozenset[str] = frozenset()  # replicas whose connection ended before the client had a byte
    _series: Series | None = None
    _overhead_seconds: float | None = None  # None: nobody wants to know
    _head_seconds: float = 0.0
    _waiting_since: float = 0.0
    _waited_seconds: float = 0.0
    _dispatched_at: float = 0.0
    _first_content_at: float | None = None
    _answered_at: float = 0.0
    _task: asyncio.Task[None] | None = None
    _interruption: GatewayError | ClientLeft | None = None

    # ---- before an engine is asked

    def admit(self, headers: Mapping[bytes, bytes]) -> None:
        """Decide on the head alone. Raises Draining, MissingKey, InvalidKey, BodyTooLarge, MalformedRequest, RateLimited, BodiesFull."""
        if self._desk.draining:
            raise Draining("The gateway is stopping.", retry_after_seconds=1.0)
        policy = self._desk.policy
        self._content_type = headers.get(b"content-type")
        self._deadline_ms = headers.get(b"x-sliceway-deadline-ms")
        if policy.limits.overhead_header or b"x-sliceway-overhead" in headers:
            self._overhead_seconds = 0.0
        if self.tenant is None:
            self.tenant = self._desk.authenticate(credentials(headers))
        announced = check_head(headers, max_body_bytes=policy.limits.max_body)
        if announced > LARGE_BYTES:
            self.large_body(announced)
        if self._overhead_seconds is not None:
            self._head_seconds = self._desk.clock() - self.received_at

    def large_body(self, announced: int = 0) -> LargeBody:
        """Where the body goes of which more has come, or is to come, than `Policy.held_bytes`.

        Raises RateLimited, BodiesFull, MalformedRequest; its `append` also BodyTooLarge.
        """
        if self._large is None:
            assert self.tenant is not None
            limits = self._desk.policy.limits
            self._large = self._desk.large_bodies.open(self.tenant.name, self.route, limits, announced)
        return self._large

    def read_large_body(self, on_read: Callable[[], None]) -> None:
        """The large body is whole: have it read. `on_read` is called once when it is, unless the exchange ends before; then `take_large_body`.

        Raises BodyReaderGone, MalformedRequest.
        """
        assert self._large is not None
        self.received_at = self._desk.clock()
        self._wait("reading", self._desk.policy.limits.body_timeout_seconds)
        self._large.read(self._content_type, on_read)

    def take_large_body(self) -> None:
        """As `take_body`, after `read_large_body`; it may also raise BodyTooLarge and BodyReaderGone."""
        assert self._large is not None
        body, beginning = self._large.result()
        self.take_body(beginning, body)

    def take_body(self, raw: bytes, read: Body | None = None) -> None:
        """Decide on the body; from here on latencies count. Raises MalformedRequest, UnknownModel, WrongTask, UnknownResponse."""
        assert self.tenant is not None
        if read is None:
            self.received_at = self._desk.clock()
            body = read_request(self.route, raw, self._content_type)
        else:
            body = read
        if self.route.stored:
            body = self._bound(body, self.tenant)
        self._raw, self._body = raw, body
        assert body.model is not None
        model = self.tenant.resolve(body.model)
        if not self.tenant.may_use(model):
            raise unknown_model(body.model)
        task = self._desk.router.model(model).card.task
        if not self.route.takes(task):
            does = "embeds text; use /v1/embeddings" if task == "embed" else "generates text; use /v1/chat/completions"
            raise WrongTask(f"The model {body.model!r} {does}.", param="model")
        self.model = model
        self._desk.stats.arrivals[model] += 1
        self._desk.stats.tenant_arrivals[model, self.tenant.name] += 1

    def _bound(self, body: Body, tenant: Tenant) -> Body:
        """Bind the request to the engine that holds the response it names, if it names one. Raises UnknownResponse."""
        by_path = self._call.response_id if self._call else None
        response_id = by_path or body.previous_response_id
        if response_id is None:
            return body
        ids = self._desk.response_ids
        self._holder = ids.holder(str(response_id), tenant.name, self._desk.router.replicas()) if ids else None
        if self._holder is None:
            message = f"There is no stored response {str(response_id)[:80]!r}: its engine may have been started again."
            if by_path:
                raise UnknownResponse(message, param="response_id")
            raise UnknownPreviousResponse(message, param="previous_response_id")
        return body if body.model else replace(body, model=self._holder.model)

    def place(self, on_placed: Callable[[], None]) -> ReplicaRow | None:
        """The replica to try next, or None where the request has to wait for one.

        After None, `on_placed` is called once, in the event loop, when the wait is over, and `placed` tells how it ended.
        It is not called after the exchange has ended. What is refused at once is raised here: RateLimited, NoReadyReplica, QueueFull,
        DeadlineTooClose, EngineUnreachable.
        """
        desk = self._desk
        now = desk.clock()
        claim = self._claim
        if claim is None:
            claim = self._claim = self._make_claim(now)
        else:
            claim.leave(now)
        self._on_placed = on_placed
        replica = desk.admission.place(claim, self._turn_came, now, self._refused, self._deaths)
        limits = desk.policy.limits
        if replica is not None:
            self._stage, self.deadline = "first byte", now + limits.first_byte_timeout_seconds
        else:
            self._waiting_since = now
            self._stage, self.deadline = "queue", min(now + limits.queue.max_wait_seconds, claim.deadline)
        return replica

    def placed(self) -> ReplicaRow:
        """The replica that `place` had to wait for. Raises the GatewayError that ended the wait."""
        assert self._claim is not None
        return self._claim.placed()

    def _make_claim(self, now: float) -> Claim:
        tenant, route, body = self.tenant, self.route, self._body
        assert tenant is not None
        call = self._call
        ask = Ask(
            tenant.name,
            self.model,
            self._raw,
            tenant.weight,
            tenant.priority if call is None or call.priority is None else call.priority,
            body.most_output(route.path),
            body.sequences,
            route.task == "generate",
            route.path == "/v1/completions",
            self._last_moment(now, tenant.default_deadline_seconds),
            self._holder.replica if self._holder else None,
            self._large.size if self._large is not None else 0,
        )
        return self._desk.admission.claim(ask, self._desk.router.model(self.model), now)

    def _last_moment(self, now: float, default_seconds: float | None) -> float:
        """When the request has to be with an engine: as its head says in milliseconds, else as its tenant's configuration does."""
        if self._deadline_ms is not None:
            if not self._deadline_ms.isdigit() or len(self._deadline_ms) > 12:
                raise MalformedRequest("x-sliceway-deadline-ms must be a whole number of milliseconds.")
            return self.received_at + int(self._deadline_ms) / 1000
        return now + default_seconds if default_seconds is not None else math.inf

    def _turn_came(self) -> None:
        """Have the loop tell whoever waits: not from here, where another request is just giving its place back."""
        asyncio.get_running_loop().call_soon(self._tell_placed)

    def _tell_placed(self) -> None:
        callback, self._on_placed = self._on_placed, None
        if callback is not None:
            self._waited_seconds += self._desk.clock() - self._waiting_since
            self._wait("first byte", self._desk.policy.limits.first_byte_timeout_seconds)
            callback()

    def unreachable(self, error: EngineUnreachable) -> None:
        """The replica last given accepts no connection; `place` will give another."""
        replica = self._given
        self._refused |= {replica.replica}
        self._desk.stats.connect_failures[replica.replica] += 1
        self._desk.on_unreachable(replica, error.message)

    def died(self, error: EngineDied) -> None:
        """The replica last given ended its connection. `place` will give another, or the same once more, if that is safe.

        It is while the client has not had a byte: a completion leaves nothing behind in an engine. A kept connection
        that the engine closed at the same moment looks the same. Raises `error` where the answer has begun, and
        EngineUnreachable after `DEATHS_PER_REQUEST`.
        """
        if self.answering or self.route.stored:  # a response may have called tools, which nobody can take back
            raise error
        replica = self._given
        self._desk.stats.connect_failures[replica.replica] += 1
        self._desk.on_unreachable(replica, error.message)
        if len(self._deaths) + 1 >= DEATHS_PER_REQUEST or replica.replica in self._deaths:
            raise EngineUnreachable(
                "The engine stopped before it answered, and so did the next one.", replica=replica.replica
            ) from error
        self._deaths |= {replica.replica}

    def outgoing(self, replica: ReplicaRow) -> bytes:
        """The body for this replica, of a request without a large one. The client's own bytes are let go when its answer begins (`begun`)."""
        sets = self._sets(replica)
        return outgoing_body(
            self._raw,
            self._body,
            engine_model=replica.engine_model,
            sets=sets if self.route.body == "json" else {},
            ask_usage=self.route.stream == "chunks",
        )

    @property
    def large(self) -> bool:
        """Whether the body is a large one, of which an engine gets `outgoing_pieces`."""
        return self._large is not None

    def make_way(self, on_ready: Callable[[], None], replica: ReplicaRow | None = None) -> bool:
        """Have a large body ready for whichever engine gets it, before it takes a place at one: True if it is so at once.

        Else `on_ready` is called once, unless the exchange ends before; then `way_made`. `replica` is one that it does not fit (`fits`): its
        place is given back meanwhile. Raises BodyReaderGone.
        """
        assert self._large is not None
        names, ask_usage = self._may_set(), self.route.stream == "chunks"
        if replica is None:
            known = {row.engine_model for row in self._desk.router.model(self.model).replicas} or {self.model}
            if all(self._large.fits(engine_model, names, ask_usage=ask_usage) for engine_model in known):
                return True
        elif self._claim is not None:
            self._claim.leave(self._desk.clock())
        self._wait("reading", self._desk.policy.limits.body_timeout_seconds)
        self._large.make_way(names, ask_usage=ask_usage, on_done=on_ready)
        return False

    def way_made(self) -> None:
        """The large body is ready. Raises MalformedRequest, BodyReaderGone, BodyTooLarge."""
        assert self._large is not None
        self._large.way_made()

    def fits(self, replica: ReplicaRow) -> bool:
        """Whether this replica can have the large body as it is. If not, `make_way` for it."""
        assert self._large is not None
        return self._large.fits(replica.engine_model, self._may_set(), ask_usage=self.route.stream == "chunks")

    def outgoing_pieces(self, replica: ReplicaRow) -> Pieces:
        """The large body for this replica, which it `fits`."""
        assert self._large is not None
        sets = self._sets(replica) if self.route.body == "json" else {}
        return self._large.pieces(replica.engine_model, sets, ask_usage=self.route.stream == "chunks")

    def _may_set(self) -> tuple[str, ...]:
        """The names that `_sets` may have for some replica, told before there is one."""
        route = self.route
        if route.body != "json":
            return ()
        open_ended = (
            route.task == "generate" and route.path != "/v1/completions" and self._body.most_output(route.path) is None
        )
        names = ("cache_salt" if route.salted else "", self._cap_name if open_ended else "")
        return tuple(name for name in (*names, "request_id" if route.stored else "") if name)

    @property
    def _cap_name(self) -> str:
        return "max_output_tokens" if self.route.path == "/v1/responses" else "max_tokens"

    def _sets(self, replica: ReplicaRow) -> dict[str, object]:
        """What the gateway says in the body, whatever the client said."""
        sets: dict[str, object] = {}
        if self._desk.salts is not None and self.tenant is not None and self.route.salted:
            sets["cache_salt"] = self._desk.salts.of(self.tenant.name)
        if self._claim is not None and self._claim.output_cap is not None:
            sets[self._cap_name] = self._claim.output_cap
        if self.route.stored and self.tenant is not None and self._desk.response_ids is not None:
            sets["request_id"] = self._response_id = self._desk.response_ids.make(self.tenant.name, replica.replica)
        return sets

    @property
    def target(self) -> str:
        """The path, with its query, that the engine is asked."""
        return self._call.target if self._call and self._call.target else self.route.path

    @property
    def content_type(self) -> str | None:
        """What the engine is told of the body; None where there is none."""
        return self._body.content_type if self.route.body != "none" else None

    # ---- while an engine answers

    def dispatched(self, sent_at: float) -> None:
        """The engine took the request, sent to it at `sent_at`."""
        replica, tenant = self._given, self.tenant
        batch = self._call is not None and self._call.batch
        book = self._desk.batch_book if batch else self._desk.book
        self._series = book.series(replica.slice.id, tenant.name if tenant else UNKNOWN, sent_at)
        took_seconds = sent_at - self.received_at
        own_seconds = took_seconds - self._waited_seconds
        self._series.queue_seconds.add(took_seconds, sent_at)
        self._series.gateway_seconds.add(own_seconds, sent_at)
        self._dispatched_at = sent_at
        if self._overhead_seconds is not None:
            self._overhead_seconds = self._head_seconds + own_seconds
        self._desk.on_served(replica.replica)

    def stream_meter(self) -> StreamMeter | TypedEventMeter:
        """Begin a stream; the meter records into this exchange's series."""
        assert self._series is not None
        gap = self._series.itl_seconds.add if self._body.single_choice else None
        self.streaming = True
        if self.route.stream in ("messages", "responses"):
            self.meter = TypedEventMeter(first=self._first_content, gap=gap)
            return self.meter
        self.meter = StreamMeter(keep_usage=self._body.wants_usage, first=self._first_content, gap=gap)
        return self.meter

    def _first_content(self, now: float) -> None:
        assert self._series is not None
        self._series.ttft_seconds.add(now - self.received_at, now)
        self._series.engine_seconds.add(now - self._dispatched_at, now)
        self._first_content_at = now

    def begun(self, status: int) -> None:
        """The status line is out."""
        self.answering = True
        self.status = status
        self._raw = b""
        if self._large is not None and self._large.sent:
            self._large.close()
        self._wait("stream", self._desk.policy.limits.idle_timeout_seconds)

    @property
    def idle_timeout_seconds(self) -> float:
        """How far to push `deadline` whenever something moves."""
        return self._desk.policy.limits.idle_timeout_seconds

    def finished(self) -> None:
        """The client has the whole answer."""
        self.complete = True
        if self._series is not None and self.status < 400:
            now = self._desk.clock()
            self._series.e2e_seconds.add(now - self.received_at, now)
            if self._first_content_at is None:
                self._series.engine_seconds.add(now - self._dispatched_at, now)
            else:
                self._series.streaming_seconds.add(now - self._first_content_at, now)

    # ---- ends that nobody planned

    def failed(self, error: GatewayError) -> None:
        """The client is told of `error`."""
        self.status, _ = status_and_type(error)
        self._desk.stats.errors[error.code] += 1

    def client_left(self) -> None:
        """The client closed its connection; whatever waits is woken up, unless the answer is complete anyway."""
        if not self.complete:
            self.interrupt(ClientLeft())

    def left(self) -> None:
        """Count a client that did not wait."""
        self.status = CLIENT_LEFT
        self._desk.stats.disconnects[self.model] += 1

    def interrupt(self, reason: GatewayError | ClientLeft) -> None:
        """Stop whoever serves this exchange; `interruption` tells it why. The first reason stands."""
        if self._interruption is not None:
            return
        if self._on_interrupt is not None:
            self._interruption = reason
            self._on_interrupt()
        elif self._task is not None:
            self._interruption = reason
            self._task.cancel()

    def interruption(self) -> GatewayError | ClientLeft | None:
        """Why the task was cancelled, taking the cancellation back; None if somebody else cancelled it."""
        if self._interruption is not None and self._task is not None:
            self._task.uncancel()
        return self._interruption

    def timeout_error(self) -> GatewayError:
        """What is to be said when the deadline passes."""
        limits = self._desk.policy.limits
        if self._stage == "body":
            return RequestTimeout(f"The request body did not arrive within {limits.body_timeout_seconds:g} s.")
        if self._stage == "reading":
            return BodyReaderGone(
                f"The request's long body was not read within {limits.body_timeout_seconds:g} s; others were before it.",
                retry_after_seconds=1.0,
            )
        if self._stage == "queue" and self._claim is not None and self._claim.pool is not None:
            return self._claim.pool.give_up(self._claim, self._desk.clock())
        if self._stage in ("queue", "first byte"):
            return EngineTimeout(f"The engine sent nothing for {limits.first_byte_timeout_seconds:g} s.")
        return EngineTimeout(f"The stream stood still for {limits.idle_timeout_seconds:g} s.")

    def _wait(self, stage: Stage, seconds: float) -> None:
        self._stage = stage
        self.deadline = self._desk.clock() + seconds

    # ---- the account

    @property
    def replica(self) -> ReplicaRow | None:
        """The replica last given."""
        return self._claim.replica if self._claim is not None else None

    @property
    def _given(self) -> ReplicaRow:
        assert self._claim is not None
        return self._claim.placed()

    @property
    def tells_overhead(self) -> bool:
        """Whether the answer's head is to say what the gateway took; then `answer_came` has to be called."""
        return self._overhead_seconds is not None

    def answer_came(self) -> None:
        """What the client is to get first has just arrived from the engine."""
        self._answered_at = self._desk.clock()

    def overhead_headers(self) -> list[tuple[bytes, bytes]]:
        """`x-sliceway-overhead-ms`, where it is asked for: the gateway's own time until the head of the answer is written.

        It is the time that the request's head took (whose key it is, and what can be refused without a body), from the whole request to its
        hand-over to an engine, without the wait for a place, and from the engine's first bytes to this moment. What clients, engines and the
        network between take is not in it.
        """
        if self._overhead_seconds is None:
            return []
        seconds = self._overhead_seconds + self._desk.clock() - self._answered_at
        return [(b"x-sliceway-overhead-ms", b"%.3f" % (max(0.0, seconds) * 1000))]

    def limit_headers(self) -> list[tuple[bytes, bytes]]:
        """`x-sliceway-generation` and `x-ratelimit-*`, for answers and errors alike.

        Of limits there is nothing where none applies, or the request did not get that far.
        """
        claim = self._claim
        if claim is None or not claim.gauges:
            return [self.generation]
        return [self.generation, *rate_limit_headers(claim.gauges, self._desk.clock())]

    def __enter__(self) -> Self:
        if self._on_interrupt is None:
            self._task = asyncio.current_task()
        self._desk.active.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._desk.active.discard(self)
        self._task = self._on_interrupt = self._on_placed = None
        tenant = self.tenant.name if self.tenant else UNKNOWN
        model, stats = self.model, self._desk.stats
        stats.requests[model, tenant, self.status] += 1
        if self.meter is not None:
            stats.stream_events[model] += self.meter.events
            self.usage = self.meter.usage
        if not self.route.metered:
            self.usage = None  # of a stored response it was counted when it was made
        if self.usage is not None:
            stats.tokens[model, tenant, "prompt"] += self.usage.prompt_tokens
            stats.tokens[model, tenant, "completion"] += self.usage.completion_tokens or 0
        elif self._series is not None and self.status < 400 and self.route.metered and not self._goes_on:
            stats.without_usage[model] += 1
        if self._large is not None:
            self._large.close()
        if self._claim is not None:
            self._end_claim(self._claim)
        self.meter = None  # it calls us: parted, both are freed without a garbage collection

    @property
    def _goes_on(self) -> bool:
        """Whether the engine goes on with the response when the request is over: it runs in the background, and has not been refused."""
        asked = self._body.background is True and self._response_id is not None and self._series is not None
        return asked and self.usage is None and not 400 <= self.status < CLIENT_LEFT

    def _end_claim(self, claim: Claim) -> None:
        """Charge what was used, as the engine told it; where it did not, what was relayed. What failed costs nothing."""
        desk, usage = self._desk, self.usage
        now = desk.clock()
        if self._goes_on and desk.background is not None and claim.replica is not None and self._response_id:
            desk.background.follow(self._response_id, claim.replica, claim)
            return
        relayed = self.meter.events if self.meter is not None else 0
        if usage is not None:
            desk.admission.ratio(claim.model).learn(claim.body_bytes, usage.prompt_tokens)
            claim.settle(now, usage.prompt_tokens, usage.completion_tokens or 0, complete=self.complete)
        elif self._series is None or (self.status >= 500 and not relayed):
            desk.admission.abandon(claim)
            claim.refund(now)
        elif 400 <= self.status < CLIENT_LEFT or not self.route.metered:
            claim.settle(now, 0, 0, complete=False)
        else:
            claim.settle(now, claim.estimate.prompt, relayed, complete=self.complete)
