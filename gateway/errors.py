"""Errors of the gateway: what a client is told, and what an operator is told.

GatewayError
├── RequestError              the request is at fault; 4xx
│   ├── HeadTooLarge, BodyTooLarge, RequestTimeout
│   ├── MalformedRequest      not JSON, not an object, a field of the wrong type
│   ├── MissingKey, InvalidKey, InvalidToken
│   ├── UnknownModel          also a model that this tenant may not use
│   ├── WrongTask             chat with an embedding model, and the like
│   ├── UnknownResponse, UnknownPreviousResponse    no stored response of this name, for this tenant
│   ├── UnknownObject, BatchNotOpen, StorageFull    files and batches
│   └── UnknownPath, MethodNotAllowed
│   └── RateLimited           a limit of the tenant itself is exhausted; 429
├── CapacityError             nothing is wrong with the request, come back later; 503
│   ├── NoReadyReplica, QueueFull, QueueTimeout, DeadlineTooClose
│   ├── TokenKeysUnavailable
│   └── Draining
├── EngineError               an engine failed the request
│   ├── EngineUnreachable     nothing came from it, and another replica may be asked; 503
│   ├── EngineDied            it ended in the middle
│   ├── EngineTimeout
│   └── EngineRefused         it answered with an error of its own
├── InternalError             a fault of ours; 500
├── StorageError              files and batches cannot be kept; 500
├── OperatorError             what an operator asked for cannot be done
│   ├── UnknownTenant, UnknownKey, UnknownReplica, UnknownSlice
│   └── ConflictingChange     it is the configuration's, or something already stands there
└── KeystoreError, StoreUnavailable, OverlayError, SecretUnavailable, AuditError, TlsError, AddressInUse    told to the operator, never to a client

`gateway.error_map` says which status, type and code each has on the wire.
"""

from __future__ import annotations

from model_registry.errors import SlicewayError


class GatewayError(SlicewayError):
    """A request could not be served, or the gateway could not run."""

    code = "gateway_error"


class RequestError(GatewayError):
    """The request is at fault. `param` names the field, as OpenAI's clients show it."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.param = param


class HeadTooLarge(RequestError):
    """Request line and headers exceed `gateway.max_header`."""

    code = "header_too_large"


class BodyTooLarge(RequestError):
    """The body exceeds `gateway.max_body`."""

    code = "body_too_large"


class RequestTimeout(RequestError):
    """The client took too long to send its request."""

    code = "request_timeout"


class MalformedRequest(RequestError):
    """The body is not the JSON object that the route takes, or the request is not HTTP."""

    code = "invalid_request"


class MissingKey(RequestError):
    """No API key came with the request."""

    code = "missing_api_key"


class InvalidKey(RequestError):
    """The API key is unknown, revoked, expired, or its tenant is gone."""

    code = "invalid_api_key"


class InvalidToken(RequestError):
    """A token (JWT) was sent that this gateway does not accept."""

    code = "invalid_token"


class UnknownModel(RequestError):
    """No such model for this tenant."""

    code = "model_not_found"


class WrongTask(RequestError):
    """The model exists but does not serve this route."""

    code = "unsupported_operation"


class UnknownResponse(RequestError):
    """No stored response has this id, or it is another tenant's, or its engine has been started again."""

    code = "response_not_found"


class UnknownPreviousResponse(UnknownResponse):
    """The same, for a response that a new one is to follow."""

    code = "previous_response_not_found"


class UnknownObject(RequestError):
    """No file or batch has this id, or it is another tenant's."""

    code = "not_found"


class BatchNotOpen(RequestError):
    """The batch has ended, and cannot be changed any more."""

    code = "batch_not_open"


class StorageFull(RequestError):
    """The tenant keeps as much as it may."""

    code = "storage_full"


class UnknownPath(RequestError):
    """The gateway does not serve this path."""

    code = "unknown_path"


class MethodNotAllowed(RequestError):
    """The path exists, for other methods. `allowed` lists them."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class RateLimited(RequestError):
    """One of the tenant's own limits is exhausted.

    `limit` is its name in the configuration, `kind` what it counts, and `since_seconds` how long it has been exhausted.
    `retry_after_seconds` is None where waiting does not help. `gauge` is for admission itself: more of it may be had from the store.
    """

    code = "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        limit: str,
        kind: str,
        retry_after_seconds: float | None,
        should_retry: bool,
        since_seconds: float = 0.0,
        remedy: str | None = None,
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.limit = limit
        self.kind = kind
        self.retry_after_seconds = retry_after_seconds
        self.should_retry = should_retry
        self.since_seconds = since_seconds
        self.gauge: object | None = None


class CapacityError(GatewayError):
    """Nothing can serve the request at the moment. `retry_after_seconds` is when to come back."""

    code = "capacity"

    def __init__(self, message: str, *, retry_after_seconds: float, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.retry_after_seconds = retry_after_seconds


class NoReadyReplica(CapacityError):
    """The model is known, and none of its replicas takes requests."""

    code = "model_unavailable"


class QueueFull(CapacityError):
    """As many requests wait for the model as may."""

    code = "queue_full"


class QueueTimeout(CapacityError):
    """The request waited for a replica for as long as requests may."""

    code = "queue_timeout"


class DeadlineTooClose(CapacityError):
    """The request would wait past its deadline, so it is not made to wait."""

    code = "deadline_too_close"


class TokenKeysUnavailable(CapacityError):
    """A token may be good, but its issuer's public keys are not here yet."""

    code = "token_keys_unavailable"


class BodiesFull(CapacityError):
    """As many bytes of long request bodies wait in the gateway as may."""

    code = "bodies_full"


class BodyReaderGone(CapacityError):
    """The process that reads long request bodies ended, or was too slow, while this one was in it."""

    code = "body_reader_gone"


class Draining(CapacityError):
    """The gateway is stopping and finishes only what it has."""

    code = "gateway_draining"


class EngineError(GatewayError):
    """An engine failed the request. `replica` names it."""

    code = "engine_error"

    def __init__(self, message: str, *, replica: str | None = None) -> None:
        super().__init__(message, where=replica)
        self.replica = replica


class EngineUnreachable(EngineError):
    """No replica took the request: connections were refused, or ended before an answer began."""

    code = "engine_unreachable"


class EngineDied(EngineError):
    """The engine's connection ended before its answer did."""

    code = "engine_died"


class EngineTimeout(EngineError):
    """The engine sent nothing for longer than it may."""

    code = "engine_timeout"


class EngineRefused(EngineError):
    """The engine answered with an error; the fields are already in OpenAI's terms."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        kind: str,
        code: str,
        param: str | None = None,
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.param = param
        self.retry_after_seconds = retry_after_seconds


class InternalError(GatewayError):
    """A fault in the gateway."""

    code = "internal_error"


class StoreUnavailable(GatewayError):
    """The store of shared limits does not answer."""

    code = "limit_store_unavailable"


class StorageError(GatewayError):
    """The disk, or the database on it, fails."""

    code = "storage_error"


class KeystoreError(GatewayError):
    """The file with the tenants' keys cannot be used."""

    code = "keystore_error"


class OperatorError(GatewayError):
    """An operator asked for something that there is not, or that cannot be."""

    code = "invalid_change"


class UnknownTenant(OperatorError):
    """The configuration has no such tenant."""

    code = "unknown_tenant"


class UnknownKey(OperatorError):
    """The keystore has no such key."""

    code = "unknown_key"


class UnknownReplica(OperatorError):
    """No replica has this name."""

    code = "unknown_replica"


class UnknownSlice(OperatorError):
    """No slice has this name."""

    code = "unknown_slice"


class ConflictingChange(OperatorError):
    """What is there stands in the way of the change."""

    code = "conflict"


class SecretUnavailable(GatewayError):
    """A secret that the configuration names is not where it says."""

    code = "secret_unavailable"


class OverlayError(GatewayError):
    """The file with what operators changed at run time cannot be used."""

    code = "overlay_error"


class AuditError(GatewayError):
    """The audit log cannot be written, so nothing is changed; or it has been tampered with."""

    code = "audit_error"


class TlsError(GatewayError):
    """The certificate or the key cannot be used."""

    code = "tls_error"


class AddressInUse(GatewayError):
    """The gateway cannot listen where the configuration says."""

    code = "address_in_use"
