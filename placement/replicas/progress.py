"""What a starting engine is doing, from the lines it logs: for people who wait. Pure."""

from __future__ import annotations

import re

# Most specific first; each is looked for in every line, and the last line that says anything wins.
_STAGES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"Loading \S+ checkpoint shards:\s+(\d+)% Completed"), "loading weights {}%"),
    (re.compile(r"Loading weights took ([\d.]+)"), "weights loaded in {} s"),
    (re.compile(r"Starting to load model|Loading model from scratch"), "loading weights"),
    (re.compile(r"Downloading|Fetching \d+ files"), "downloading"),
    (re.compile(r"torch\.compile takes ([\d.]+)"), "compiled in {} s"),
    (re.compile(r"Dynamo bytecode transform|Compiling a graph|Using cache directory|torch\.compile"), "compiling"),
    (re.compile(r"Capturing CUDA graphs.*?(\d+)%"), "capturing CUDA graphs {}%"),
    (re.compile(r"Graph capturing|Capturing CUDA graphs"), "capturing CUDA graphs"),
    (re.compile(r"Warming up model for the compilation"), "compiling and warming up"),
    (re.compile(r"[Ww]arming up|Memory profiling"), "warming up"),
    (re.compile(r"KV cache size: ([\d,]+) tokens"), "KV cache of {} tokens"),
    (re.compile(r"init engine \(profile, create kv cache, warmup model\)"), "engine initialised"),
    (
        re.compile(r"Starting vLLM (?:API )?server|Application startup complete|Started server process"),
        "starting the server",
    ),
    (re.compile(r"Initializing a V1 LLM engine|Resolved architecture|Using max model len"), "setting up"),
    (re.compile(r"non-default args|vLLM API server version"), "reading the model"),
)
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


def stage(log: str) -> str | None:
    """A few words on the last step that `log` tells of; None where it tells of none.

    The log of a vLLM that has said nothing yet holds the command line that it was started with.
    """
    for line in reversed(re.split(r"[\r\n]+", _ANSI.sub("", log))):
        for pattern, words in _STAGES:
            if match := pattern.search(line):
                return words.format(*match.groups())
    return "importing vLLM" if "vllm" in log else None
