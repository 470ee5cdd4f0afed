"""`python -m placement.fake_engine`: a simulated engine as a process."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from placement.engine_guard import VARIABLE
from placement.engine_tls import server_context
from placement.errors import EngineTlsError, SimulatorError
from placement.fake_engine.engine import Behaviour, FakeEngine, listening
from placement.simulator import join

log = logging.getLogger("fake_engine")

_DEVICE_BYTES = 2**30
"""What it takes of a simulated device, so that it does not look idle."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the process listens and how it comes up."""

    uds: Path | None
    host: str
    port: int
    load_seconds: float
    fail_at_start: str | None
    exit_code: int
    shutdown_timeout_seconds: float
    certificate: Path | None = None
    key: Path | None = None


def parse(arguments: Sequence[str]) -> tuple[Behaviour, Start]:
    """Read the command line. Unknown flags (vLLM's own) are ignored."""
    parser = argparse.ArgumentParser(
        prog="python -m placement.fake_engine", description="A simulated vLLM engine.", allow_abbrev=False
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--uds", type=Path, help="listen on this Unix socket")
    where.add_argument("--port", type=int, help="listen on this TCP port; 0 takes a free one and logs it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--served-model-name", nargs="+", help="names clients may send; the model's if unset")
    parser.add_argument("--task", choices=("generate", "embed"), default="generate")
    parser.add_argument(
        "--runner", choices=("auto", "generate", "pooling"), default="auto", help="vLLM's flag: pooling means embed"
    )
    parser.add_argument("--ttft-seconds", type=float, default=0.0)
    parser.add_argument("--itl-seconds", type=float, default=0.0)
    parser.add_argument("--output-tokens", type=int, default=16)
    parser.add_argument("--max-concurrency", type=int, default=0, help="requests that run at once; 0: no bound")
    parser.add_argument("--max-model-len", type=int, default=8192)
    parser.add_argument("--gpu-memory-utilization", type=float, help="told in the metrics, as vLLM does")
    parser.add_argument("--kv-cache-memory-bytes", type=int, help="told in the metrics, as vLLM does")
    parser.add_argument("--load-seconds", type=float, default=0.0, help="time until it listens")
    parser.add_argument(
        "--fail-at-start", metavar="MESSAGE", help="print MESSAGE as an engine's error after --load-seconds and exit"
    )
    parser.add_argument("--exit-code", type=int, default=1, help="status of --fail-at-start")
    parser.add_argument(
        "--fail-after", type=int, metavar="N", help="after N requests die in the middle of the next answer"
    )
    parser.add_argument("--hang-after", type=int, metavar="N", help="after N requests answer nothing but /health")
    parser.add_argument(
        "--error-status", type=int, metavar="CODE", help="answer every inference request with this status"
    )
    parser.add_argument(
        "--enable-sleep-mode", action="store_true", help="vLLM's flag; with VLLM_SERVER_DEV_MODE=1 it can sleep"
    )
    parser.add_argument("--sleep-seconds", type=float, default=0.0, help="time to fall asleep")
    parser.add_argument("--wake-seconds", type=float, default=0.0, help="time to wake")
    parser.add_argument("--wake-fails", action="store_true", help="it never wakes")
    parser.add_argument("--error-message", default="simulated error")
    parser.add_argument("--error-shape", choices=("vllm", "plain", "detail", "html"), default="vllm")
    parser.add_argument("--events-per-write", type=int, default=1)
    parser.add_argument(
        "--shutdown-timeout", type=float, default=0.0, help="seconds that running requests may go on after SIGTERM"
    )
    parser.add_argument("--ssl-certfile", type=Path, help="vLLM's flag; with --ssl-keyfile it speaks TLS")
    parser.add_argument("--ssl-keyfile", type=Path, help="vLLM's flag")
    a, ignored = parser.parse_known_args(arguments)
    if ignored:
        log.info("simulated engine: ignoring %s", " ".join(ignored))
    behaviour = Behaviour(
        secret=os.environ.get(VARIABLE),
        names=tuple(a.served_model_name or [a.model]),
        task="embed" if a.runner == "pooling" else a.task,
        ttft_seconds=a.ttft_seconds,
        itl_seconds=a.itl_seconds,
        output_tokens=a.output_tokens,
        max_concurrency=a.max_concurrency,
        max_model_len=a.max_model_len,
        fail_after=a.fail_after,
        hang_after=a.hang_after,
        error_status=a.error_status,
        error_message=a.error_message,
        error_shape=a.error_shape,
        events_per_write=max(1, a.events_per_write),
        gpu_memory_utilization=a.gpu_memory_utilization,
        kv_cache_memory_bytes=a.kv_cache_memory_bytes,
        sleep_mode=a.enable_sleep_mode and os.environ.get("VLLM_SERVER_DEV_MODE") == "1",
        sleep_seconds=a.sleep_seconds,
        wake_seconds=a.wake_seconds,
        wake_fails=a.wake_fails,
    )
    return behaviour, Start(
        a.uds,
        a.host,
        a.port or 0,
        a.load_seconds,
        a.fail_at_start,
        a.exit_code,
        a.shutdown_timeout,
        a.ssl_certfile,
        a.ssl_keyfile,
    )


async def _run(behaviour: Behaviour, start: Start) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    began = time.monotonic()
    log.info(
        "simulated engine %s: no model is loaded, answers are made up (pid %d)", ", ".join(behaviour.names), os.getpid()
    )
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), start.load_seconds)
    if stop.is_set():
        return 0
    if start.fail_at_start is not None:
        log.error("EngineCore failed to start.\n%s", start.fail_at_start)
        return start.exit_code
    tls = server_context(start.certificate, start.key) if start.certificate and start.key else None
    join(_DEVICE_BYTES, name="simulated-engine")  # on a simulated GPU it is seen, as CUDA would see to on a real one
    async with listening(
        FakeEngine(behaviour),
        uds=start.uds,
        host=start.host,
        port=start.port,
        grace_seconds=start.shutdown_timeout_seconds,
        tls=tls,
    ) as address:
        log.info(
            "simulated engine: listening on %s after %.2f s. Application startup complete.",
            address,
            time.monotonic() - began,
        )
        await stop.wait()
        log.info("simulated engine: stopping")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a simulated engine until SIGTERM; the exit status."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(asctime)s [fake_engine] %(message)s"
    )
    behaviour, start = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        return asyncio.run(_run(behaviour, start))
    except EngineTlsError as error:
        log.error("simulated engine: %s", error)
        return 1
    except SimulatorError as error:
        log.error("simulated engine: cannot take its slice: %s", error)
        return 1
    except OSError as error:
        log.error("simulated engine: cannot listen: %s", error)
        return 1


if __name__ == "__main__":
    raise SystemExit(main())
