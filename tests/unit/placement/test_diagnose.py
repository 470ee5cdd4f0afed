"""Why engines end, told from logs in vLLM's own wording."""

from __future__ import annotations

import pytest

from placement.replicas.diagnose import diagnose, how_it_ended, last_error
from placement.replicas.journal import ExitRecord
from placement.replicas.progress import stage


def record(code: int | None = 1, signal: int | None = None, **more: int) -> ExitRecord:
    return ExitRecord(engine_pid=7, code=code, signal=signal, **more)  # type: ignore[arg-type]


HEAD = "--- 2026-11-21T03:00:00Z chat-0 on cpu-0: /env/bin/python\n"
CORE = "(EngineCore_0 pid=12) ERROR 11-21 03:08:26 [core.py:700] "
SERVER = "(APIServer pid=11) "

KV_TOO_SMALL = (
    HEAD
    + f"{CORE}EngineCore failed to start.\n{CORE}Traceback (most recent call last):\n{CORE}ValueError: To serve at least one request with the "
    "models's max seq len (131072), (5.25 GiB KV cache is needed, which is larger than the available KV cache memory (2.1 GiB).\n"
    + f"{SERVER}RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}\n"
)


@pytest.mark.parametrize(
    ("log", "words"),
    [
        (
            "RuntimeError: NVML_SUCCESS == r INTERNAL ASSERT FAILED at CUDACachingAllocator.cpp:1131",
            "it asserts on MIG",
        ),
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "CUDA ran out of memory"),
        (
            "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            "leaves no memory for any KV cache",
        ),
        (KV_TOO_SMALL, "too small for one request of max_model_len"),
        (
            "ValueError: Free memory on device cuda:0 (8.9/9.5 GiB) on startup is less than desired GPU memory utilization (0.97, 9.2 GiB).",
            "less free memory",
        ),
        (
            "ValueError: Available memory on node 0 (1.5/23.5 GiB) on startup is less than desired CPU memory utilization (0.92)",
            "machine has less free memory",
        ),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.",
            "no memory left",
        ),
        ("terminate called after throwing an instance of 'std::bad_alloc'", "no memory left"),
    ],
)
def test_out_of_memory_in_all_its_wordings(log: str, words: str) -> None:
    found = diagnose(record(), log)
    assert found.cause == "out_of_memory"
    assert words in found.message
    assert "sliceway size" in found.remedy


def test_the_engines_own_error_goes_with_it() -> None:
    assert "131072" in diagnose(record(), KV_TOO_SMALL).message


def test_the_root_cause_is_told_and_not_its_consequence() -> None:
    log = (
        f"{CORE}Traceback (most recent call last):\n{CORE}KeyError: 'model.embed_tokens.weight'\n"
        f"{SERVER}Traceback (most recent call last):\n{SERVER}RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_error(log) == "KeyError: 'model.embed_tokens.weight'"
    assert diagnose(record(), log).message == "exit code 1: KeyError: 'model.embed_tokens.weight'"


def test_a_consequence_is_better_than_nothing() -> None:
    assert last_error("vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.") is not None


def test_a_part_that_was_killed_says_where_to_look() -> None:
    log = "(APIServer pid=1) ERROR 11-21 04:32:14 [async_llm.py:906] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
    found = diagnose(record(code=0), log)
    assert "dmesg" in found.remedy
    assert "dmesg" not in diagnose(record(), "ValueError: bad\n" + log).remedy


def test_an_argument_parsers_error_is_one_too() -> None:
    log = HEAD + "usage: api_server.py [-h]\napi_server.py: error: unrecognized arguments: --nonsense\n"
    assert (
        diagnose(record(code=2), log).message == "exit code 2: api_server.py: error: unrecognized arguments: --nonsense"
    )


def test_colours_do_not_hide_an_error() -> None:
    assert last_error("\x1b[0;36m(EngineCore pid=3)\x1b[0;0m \x1b[31mValueError: bad\x1b[0m") == "ValueError: bad"


def test_without_an_error_the_last_line_is_told() -> None:
    assert diagnose(record(code=3), HEAD + "loading\nI give up\n").message == "exit code 3: I give up"
    assert diagnose(record(code=3), HEAD).message == "exit code 3"


def test_ends_of_the_kernels_making() -> None:
    assert how_it_ended(record(code=None, signal=9)) == "killed by SIGKILL"
    assert how_it_ended(record(code=None, signal=64)) == "killed by SIGRTMAX"
    assert how_it_ended(None) == "its process was killed together with its shim"
    found = diagnose(record(code=None, signal=9, oom_kills=1), "")
    assert (found.cause, "kernel killed it" in found.message) == ("out_of_memory", True)
    assert diagnose(record(code=None, signal=9), "").cause == "exit"


def test_a_stop_that_was_asked_for_is_not_blamed_on_memory() -> None:
    assert diagnose(record(code=None, signal=15, oom_kills=2, stop_requested=1), "").cause == "exit"


def test_what_the_controller_did_is_said_first() -> None:
    budget = diagnose(record(code=None, signal=9), "ValueError: x", budget_exceeded=(3 * 2**30, 2**31))
    assert budget.message == "it used 3.00 GiB of memory; its slice has 2.00 GiB"
    late = diagnose(
        record(code=None, signal=9), "still loading shard 3", ended_by_us="start_timeout", waited_seconds=900
    )
    assert late.message == "it was not ready after 900 s: still loading shard 3"
    assert "start_timeout_seconds" in late.remedy
    hung = diagnose(record(code=None, signal=9), "", ended_by_us="unresponsive", waited_seconds=15)
    assert (hung.cause, hung.message) == ("unresponsive", "it did not serve for 15 s")


def test_the_misleading_words_about_architectures_are_translated_and_the_cause_is_told() -> None:
    misleading = (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n"
        "  Value error, Model architectures ['LlamaForCausalLM'] failed to be inspected. Please check the logs for more details.\n"
    )
    cause = "ValueError: invalid literal for int() with base 10: 'MIG-1'\n"
    found = diagnose(record(), cause + misleading)
    assert found.message == f"exit code 1: {cause.strip()}"
    assert "whatever the reason" in found.remedy
    assert "failed to be inspected" in diagnose(record(), misleading).message, "better than nothing"


def test_what_pydantic_says_below_its_first_line_is_told() -> None:
    log = "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, User-specified max_model_len (9) is greater\n"
    assert "User-specified max_model_len (9)" in diagnose(record(), log).message


def test_a_long_error_is_cut() -> None:
    assert len(diagnose(record(), "ValueError: " + "x" * 5000).message) < 700


# ---- progress


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", None),
        (
            "--- 2026-11-21T03:00:00Z chat-0 on cpu-0: /env/bin/python -m vllm.entrypoints.openai.api_server\n",
            "importing vLLM",
        ),
        ("--- 2026-11-21T03:00:00Z chat-0 on cpu-0: /bin/llama-server\n", None),
        ("nothing known\n", None),
        (
            "(APIServer pid=1) INFO 11-21 04:25:00 [api_utils.py:286] non-default args: {'uds': '/x', 'load_format': 'dummy'}",
            "reading the model",
        ),
        (
            "Loading safetensors checkpoint shards:  25% Completed | 1/4\rLoading safetensors checkpoint shards:  75% Completed | 3/4",
            "loading weights 75%",
        ),
        ("INFO [loader.py] Loading weights took 3.20 seconds", "weights loaded in 3.20 s"),
        ("INFO [kv_cache_utils.py] GPU KV cache size: 55,356 tokens", "KV cache of 55,356 tokens"),
        ("Loading weights took 1.0 seconds\nINFO Warming up model for the compilation...", "compiling and warming up"),
        ("INFO:     Application startup complete.", "starting the server"),
    ],
)
def test_what_a_starting_engine_is_doing(log: str, words: str | None) -> None:
    assert stage(log) == words
