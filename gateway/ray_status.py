"""A Ray Serve application that tells how the cluster is: KubeRay's RayService asks after one. Tokens never pass through it.

Ray is imported when the application is built, by the Ray that runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OK, UNAVAILABLE = 200, 503


def answer(status: Mapping[str, Any] | None) -> tuple[int, dict[str, Any]]:
    """The HTTP status and the body for the head's `status`: 200 as soon as one replica is ready. None: there is no head."""
    if status is None:
        return UNAVAILABLE, {"ready": False, "reason": "this cluster has no head yet"}
    replicas = [{"replica": r["replica"], "state": r["state"], "reason": r["reason"]} for r in status["replicas"]]
    ready = any(r["state"] == "ready" for r in replicas)
    return OK if ready else UNAVAILABLE, {"ready": ready, "replicas": replicas, "unplaced": dict(status["unplaced"])}


def application(arguments: Mapping[str, Any]) -> Any:
    """The application, as `import_path` of a Serve configuration names it. It takes no arguments."""
    if arguments:
        raise ValueError(f"this application takes no arguments, and was given {', '.join(sorted(arguments))}")
    from ray import serve

    deployment = serve.deployment(name="status", num_replicas=1, ray_actor_options={"num_cpus": 0})
    return deployment(Status).bind()


class Status:
    """Answers every request with what the head says."""

    async def __call__(self, request: Any) -> Any:
        """The cluster's status as JSON."""
        from starlette.responses import JSONResponse

        code, body = answer(await self._status())
        return JSONResponse(body, status_code=code)

    async def _status(self) -> Mapping[str, Any] | None:
        import ray

        from placement.cluster.actors import HEAD, NAMESPACE

        try:
            head: Any = ray.get_actor(HEAD, namespace=NAMESPACE)
        except ValueError:
            return None
        status: Mapping[str, Any] = await head.status.remote()
        return status
