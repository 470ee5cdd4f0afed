from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model_registry.errors import ConfigError
from model_registry.model import EngineLimits, Footprint, SliceFit
from model_registry.schema import ModelConfig
from placement.engines import find_engine_python
from placement.errors import EngineMissing
from placement.goals import slice_kind
from placement.guarding import MIDDLEWARE
from placement.launch import Endpoint, LaunchSpec, SizedModel, build_launch, kv_cache_tokens
from placement.schema import EngineConfig
from placement.slices import Gpu, Slice, SliceKind

GIB = 2**30
CPU = Slice("cpu-0", SliceKind.CPU, None, 8 * GIB, cores=(0, 1, 2, 5))
MIG = Slice("GPU-a/1g.10gb@0", SliceKind.MIG, "1g.10gb", 9 * GIB, uuid="MIG-1", gpu=Gpu("GPU-a", 0, "H100", 80 * GIB))
LIMITS = EngineLimits(max_model_len=2048, max_num_seqs=8, max_num_batched_tokens=2048)
FOOTPRINT = Footprint(GIB, 0, 0, 0, 16, 2**20, 32, 2**16)
FIT = SliceFit(True, "fits", 8 * GIB, 4 * GIB, 4096, 8.0, 8192, 1)
TLS = {"certificate": "/tls/node.pem", "key": "/tls/node.key", "authority": "/tls/authority.pem"}
UDS = Endpoint(uds=Path("/run/x.sock"))


def sized(task: str = "generate", **config: object) -> SizedModel:
    model = ModelConfig.model_validate({"name": "chat", "source": "org/name", **config})
    return SizedModel(model, "org/name", task, 2048, LIMITS, FOOTPRINT)  # type: ignore[arg-type]


def launch(
    model: SizedModel | None = None,
    target: Slice = CPU,
    fit: SliceFit = FIT,
    *,
    sleep_mode: bool = False,
    guarded: bool = False,
    **engine: object,
) -> LaunchSpec:
    return build_launch(
        "chat-0",
        model or sized(),
        target,
        fit,
        EngineConfig.model_validate(engine),
        vllm_python=Path("/env/bin/python"),
        own_python=Path("/own/bin/python"),
        cache=Path("/state/cache/x"),
        sleep_mode=sleep_mode,
        guarded=guarded,
    )


def flag(spec: LaunchSpec, name: str) -> str | None:
    command = spec.command(UDS, drain_seconds=12.4)
    assert command.count(name) <= 1, f"{name} is given twice"
    return command[command.index(name) + 1] if name in command else None


def test_every_limit_is_explicit() -> None:
    spec = launch()
    command = spec.command(UDS, drain_seconds=12.4)
    assert command[:3] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert flag(spec, "--max-model-len") == "2048"
    assert flag(spec, "--max-num-seqs") == "8"
    assert flag(spec, "--max-num-batched-tokens") == "2048"
    assert flag(spec, "--gpu-memory-utilization") == "0.92"
    assert flag(spec, "--served-model-name") == "chat"
    assert flag(spec, "--uds") == "/run/x.sock"
    assert flag(spec, "--shutdown-timeout") == "13", "rounded up: vLLM takes whole seconds"
    assert "--runner" not in command


def test_a_cpu_slice_pins_threads_hides_gpus_and_bounds_the_kv_pool() -> None:
    spec = launch()
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert spec.environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-2,5"
    assert spec.full_environment({"OMP_NUM_THREADS": "64"})["OMP_NUM_THREADS"] == "4"
    assert spec.environment["VLLM_USE_AOT_COMPILE"] == "0", "its cache never loads on a CPU"
    assert flag(spec, "--kv-cache-memory-bytes") == str((8 * 32 + 1) * 2**20), (
        "eight sequences of full length, and the block that vLLM never hands out"
    )


def test_a_model_without_kv_cache_claims_no_share_of_the_machine() -> None:
    embedder = replace(sized("embed"), footprint=replace(FOOTPRINT, kv_block_bytes=0))
    assert flag(launch(embedder), "--kv-cache-memory-bytes") == str(2**20)


def test_the_pool_never_exceeds_what_is_left() -> None:
    assert flag(launch(fit=replace(FIT, available_kv_bytes=2**20)), "--kv-cache-memory-bytes") == str(2**20)


def test_the_pool_leaves_free_what_the_estimate_may_be_off() -> None:
    """A slice filled to the last byte by the estimate ends as soon as the engine takes a little more."""
    model = replace(sized(), footprint=replace(FOOTPRINT, margin_bytes=2**19))
    fit = replace(FIT, available_kv_bytes=3 * 2**20)
    assert flag(launch(model, fit=fit), "--kv-cache-memory-bytes") == str(3 * 2**20 - 2**19)
    assert kv_cache_tokens(model, CPU, fit) == (3 * 2**20 - 2**19) * 2048 // (32 * 2**20)
    assert flag(launch(model), "--kv-cache-memory-bytes") == str((8 * 32 + 1) * 2**20), "there is room enough"


def test_a_gpu_slice_is_pinned_by_uuid_and_keeps_its_own_pool_size() -> None:
    spec = launch(target=MIG)
    assert spec.environment["CUDA_VISIBLE_DEVICES"] == "MIG-1"
    assert "VLLM_CPU_OMP_THREADS_BIND" not in spec.environment
    assert flag(spec, "--kv-cache-memory-bytes") is None


def test_the_sizings_own_arguments_win_and_are_not_repeated() -> None:
    fit = replace(
        FIT, engine_args=("--max-model-len", "1024", "--block-size=32", "--enforce-eager", "--no-enable-prefix-caching")
    )
    spec = launch(fit=fit)
    assert flag(spec, "--max-model-len") == "1024"
    assert flag(spec, "--block-size") == "32"
    assert "--enforce-eager" in spec.argv
    assert "--no-enable-prefix-caching" in spec.argv


def test_what_the_operator_says_comes_last() -> None:
    spec = launch(sized(engine_args=["--seed", "7"], chat_template="/t.jinja", revision="v2", trust_remote_code=True))
    assert spec.argv[-2:] == ("--seed", "7")
    assert flag(spec, "--chat-template") == "/t.jinja"
    assert flag(spec, "--revision") == "v2"
    assert "--trust-remote-code" in spec.argv
    spec = launch(environment={"HF_HOME": "/hf", "OMP_NUM_THREADS": "1"})
    assert spec.environment["HF_HOME"] == "/hf"
    assert spec.environment["OMP_NUM_THREADS"] == "1"


def test_embedding_models_run_as_poolers() -> None:
    assert flag(launch(sized("embed")), "--runner") == "pooling"


def test_usage_is_reported_only_if_the_operator_turns_it_on() -> None:
    silent = launch().environment
    assert (silent["VLLM_NO_USAGE_STATS"], silent["DO_NOT_TRACK"]) == ("1", "1")
    assert not {"VLLM_NO_USAGE_STATS", "DO_NOT_TRACK"} & set(launch(usage_reporting=True).environment)


def test_tcp_is_loopback_only() -> None:
    command = launch(transport="tcp").command(Endpoint(port=9100), drain_seconds=1)
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert command[command.index("--port") + 1] == "9100"
    assert "--uds" not in command


def test_on_tcp_vllm_asks_for_the_secret_that_its_start_gives_it() -> None:
    spec = launch(transport="tcp", guarded=True)
    assert flag(spec, "--middleware") == MIDDLEWARE
    assert not {"VLLM_API_KEY", "ENGINE_API_KEY"} & set(spec.environment), "no part of what it is started with"
    assert "--middleware" not in launch(guarded=True).argv, "the kernel guards a socket of mode 0600"
    assert "--middleware" not in launch(transport="tcp").argv, "in a pod of its own there is no file of ours"


def test_on_tcp_vllm_speaks_tls_where_that_is_configured() -> None:
    spec = launch(transport="tcp", guarded=True, tls=TLS)
    assert flag(spec, "--ssl-certfile") == "/tls/node.pem"
    assert flag(spec, "--ssl-keyfile") == "/tls/node.key"
    assert "--enable-ssl-refresh" in spec.argv
    assert spec.spec_hash != launch(transport="tcp", guarded=True).spec_hash, "it takes another start"
    assert launch(guarded=True, tls=TLS).spec_hash == launch().spec_hash, "a socket is not encrypted"


def test_another_engine_finds_its_certificate_and_key() -> None:
    spec = launch(transport="tcp", tls=TLS, command=["x", "{port}", "--cert={certificate}", "{key}"], guarded=True)
    assert spec.argv == ("x", "{port}", "--cert=/tls/node.pem", "/tls/node.key")


def test_what_would_unpin_an_engine_is_not_inherited() -> None:
    inherited = {
        "HF_TOKEN": "t",
        "PATH": "/bin",
        "VLLM_API_KEY": "the operator's own",
        "OMP_PROC_BIND": "x",
        "PYTHONPATH": "/p",
        "CUDA_VISIBLE_DEVICES": "3",
        "VLLM_CPU_KVCACHE_SPACE": "4",
    }
    environment = launch().full_environment(inherited)
    assert environment["HF_TOKEN"] == "t"
    assert environment["PATH"] == "/bin"
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert not {"OMP_PROC_BIND", "PYTHONPATH", "VLLM_CPU_KVCACHE_SPACE"} & set(environment)


# ---- identity


def test_the_hash_is_of_what_needs_a_restart() -> None:
    one = launch()
    assert (
        one.spec_hash
        == launch(drain_timeout_seconds=1, stop_timeout_seconds=99, restart={"max_fast_failures": 9}).spec_hash
    )
    assert one.command(UDS, drain_seconds=1) != one.command(UDS, drain_seconds=2)
    others = [
        launch(sized(engine_args=["--seed", "1"])),
        launch(environment={"A": "1"}),
        launch(target=replace(CPU, cores=(0,))),
        launch(target=replace(CPU, id="cpu-9")),
        launch(target=MIG),
        launch(target=replace(MIG, uuid="MIG-2")),
    ]
    hashes = [one.spec_hash, *(o.spec_hash for o in others)]
    assert len(set(hashes)) == len(hashes)


# ---- another engine


def test_a_command_of_the_operators_is_filled_in() -> None:
    command = [
        "{python}",
        "-m",
        "other",
        "--socket={uds}",
        "--name",
        "{served_name}",
        "--json",
        '{"a": 1}',
        "{task}",
        "{cores}",
        "{model}",
        "{max_num_seqs}",
    ]
    filled = launch(command=command).command(UDS, drain_seconds=1)
    assert filled == [
        "/own/bin/python",
        "-m",
        "other",
        "--socket=/run/x.sock",
        "--name",
        "chat",
        "--json",
        '{"a": 1}',
        "generate",
        "0-2,5",
        "org/name",
        "16",
    ]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"command": ["x", "{uds}", "{modle}"]}, "unknown placeholder {modle}"),
        ({"command": ["x"]}, "must hold {uds}, and not {port}"),
        ({"command": ["x", "{uds}"], "transport": "tcp"}, "must hold {port}, and not {uds}"),
        ({"command": ["x", "{port}"]}, "must hold {uds}"),
        ({"command": ["x", "{port}"], "transport": "tcp", "tls": TLS}, "holds {certificate} and {key}"),
        ({"command": ["x", "{port}", "{key}"], "transport": "tcp", "tls": TLS}, "holds {certificate} and {key}"),
        ({"command": ["x", "{port}", "{certificate}", "{key}"], "transport": "tcp"}, "holds {certificate} and {key}"),
    ],
)
def test_a_command_that_cannot_work_is_refused(engine: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        launch(**engine)
    assert message in error.value.message
    assert str(error.value.where) == "engine.command"


def test_a_command_that_needs_an_unknown_context_length_says_what_to_set() -> None:
    unknown = SizedModel(ModelConfig(name="m", source="x"), "x", "generate", None)
    with pytest.raises(ConfigError, match="context length of 'm'"):
        launch(unknown, command=["x", "{uds}", "{max_model_len}"])


# ---- endpoints


@given(st.integers(1, 65535))
def test_endpoints_round_trip(port: int) -> None:
    for endpoint in (Endpoint(port=port), Endpoint(port=port, host="::1", tls=True), UDS):
        assert Endpoint.parse(str(endpoint)) == endpoint


def test_a_secret_is_no_part_of_an_endpoint_that_is_written_out() -> None:
    endpoint = Endpoint.parse("https://10.0.0.1:80", secret="open sesame")
    assert endpoint.secret == "open sesame"
    assert "sesame" not in f"{endpoint} {endpoint!r}"


def test_what_is_no_address_of_an_engine_is_refused() -> None:
    for wrong in ("http://engine:80", "http://10.0.0.1", "httpss://10.0.0.1:80", "https://engine:80", "unix", ""):
        with pytest.raises(ValueError, match="no endpoint"):
            Endpoint.parse(wrong)
    with pytest.raises(ValueError, match="either"):
        Endpoint()


def test_what_is_compiled_is_kept_apart_by_model_kind_and_version_and_never_by_place() -> None:
    gpu = launch(target=replace(MIG, cores=(4, 5)))
    compiled = [v for n, v in gpu.environment.items() if v.startswith("/state/cache/x/")]
    assert len(compiled) == len(set(compiled)) == 8
    assert gpu.cache == Path("/state/cache/x")
    assert launch(command=["sglang", "--port", "{uds}"]).cache is None, "what it compiles is not known"
    assert slice_kind(MIG) == "H100+1g.10gb"
    assert slice_kind(CPU) == "cpu-4"
    whole = Slice("GPU-a", SliceKind.GPU, None, 80 * GIB, uuid="GPU-a", gpu=MIG.gpu)
    assert slice_kind(whole) == "H100"
    assert slice_kind(replace(whole, kind=SliceKind.MPS, sharers=3)) == "H100+mps-3"


def test_cores_of_a_gpu_slice_bound_threads_and_are_no_reason_for_a_restart() -> None:
    few, many = (launch(target=replace(MIG, cores=cores)) for cores in ((4,), (4, 5, 6)))
    assert few.spec_hash == many.spec_hash
    assert many.full_environment({})["OMP_NUM_THREADS"] == "3"
    assert launch(target=MIG).full_environment({"OMP_NUM_THREADS": "9"}).get("OMP_NUM_THREADS") is None
    own = launch(target=replace(MIG, cores=(4, 5)), environment={"OMP_NUM_THREADS": "1"})
    assert own.full_environment({})["OMP_NUM_THREADS"] == "1", "the operator's wins"


def test_on_a_simulated_slice_a_simulated_engine_gets_vllms_own_arguments() -> None:
    gpu = Gpu("GPU-a", 0, "H100-80GB-SXM", 80 * GIB)
    real = launch(target=replace(MIG, gpu=gpu))
    simulated = launch(target=replace(MIG, gpu=gpu, simulated=True))
    assert simulated.argv[:3] == ("/own/bin/python", "-m", "placement.fake_engine")
    assert simulated.argv[3 : len(real.argv)] == real.argv[3:]
    assert "--ttft-seconds" not in simulated.argv, "nothing is known of this model's speed"
    assert simulated.cache is None
    assert launch(target=replace(MIG, simulated=True), command=["my-engine", "{uds}"]).argv[0] == "my-engine"


def test_sleep_mode_is_a_flag_and_the_variable_that_opens_its_endpoints() -> None:
    plain, sleeper = launch(target=MIG), launch(target=MIG, sleep_mode=True)
    assert "--enable-sleep-mode" not in plain.argv
    assert "VLLM_SERVER_DEV_MODE" not in plain.environment
    assert "--enable-sleep-mode" in sleeper.argv
    assert sleeper.environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert plain.spec_hash != sleeper.spec_hash


# ---- the engine's own features, and its closed doors


def test_an_engine_that_other_machines_reach_is_never_in_development_mode(tmp_path: Path) -> None:
    """`/sleep`, `/wake_up` and `/collective_rpc` are for its controller; who may ask for answers is not to have them as well."""
    secret = tmp_path / "secret"
    secret.write_text("s", encoding="utf-8")
    asked = {"VLLM_SERVER_DEV_MODE": "1"}
    network = {"address": "10.0.0.1", "secret_file": str(secret)}
    reached = launch(transport="tcp", network=network, environment=asked)
    assert reached.environment["VLLM_SERVER_DEV_MODE"] == "0"
    assert launch(transport="tcp", environment=asked).environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert launch(environment=asked).environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "VLLM_SERVER_DEV_MODE" not in launch().environment


FEATURES = {
    "--shutdown-timeout": "streams end before the engine does",
    "--custom-histogram-buckets": "its histograms are on the gateway's grid",
    "--kv-cache-memory-bytes": "a CPU engine takes no share of the whole machine",
    "--max-num-batched-tokens": "its defaults come from the whole GPU",
    "--enable-sleep-mode": "a model without requests sleeps in its place",
    "--middleware": "on TCP every route asks for the secret",
    "--enable-ssl-refresh": "a renewed certificate counts without a restart",
}
"""vLLM's own features that do a job here, and which one."""

NOT_ASKED_FOR = {
    "--max-num-queued-reqs": "counts a request of many sequences that runs alone as too many; the gateway counts what it sent",
    "--max-num-queued-tokens": "refuses without saying when to come back; the gateway's queue says it",
    "--scheduling-policy": "a client could then go before others by its body's `priority`; tenants' priorities are the gateway's",
    "--sse-keep-alive-interval": "a comment before the first event would send the status line, and an early error its status",
    "--enable-force-include-usage": "puts usage on every event; the gateway asks each stream for the last one",
    "--enable-per-request-metrics": "changes what clients get; the gateway measures by itself",
    "--api-key": "leaves half of the routes open; sockets of mode 0600 and the middleware leave none",
}
"""Those that do not, and why; an operator can still ask for them with `engine_args`."""


def kinds_of_starts() -> tuple[LaunchSpec, ...]:
    """One of each: on cores, with sleep mode, and on TCP with everything that is there for it."""
    return launch(), launch(target=MIG, sleep_mode=True), launch(transport="tcp", tls=TLS, guarded=True)


def test_engines_are_given_the_features_that_do_a_job_here_and_no_others() -> None:
    given = {part for spec in kinds_of_starts() for part in spec.argv if part.startswith("--")}
    assert set(FEATURES) <= given
    assert not set(NOT_ASKED_FOR) & given
    asked = launch(sized(engine_args=["--max-num-queued-reqs", "64"]))
    assert flag(asked, "--max-num-queued-reqs") == "64"


@pytest.mark.engine
def test_the_installed_vllm_knows_every_flag_that_it_is_given() -> None:
    """By its parser's source: to import it would take longer than all other tests of this file."""
    try:
        python = find_engine_python("cpu")
    except EngineMissing as error:
        pytest.skip(f"no engine environment: {error.message}")
    (vllm,) = (python.parents[1] / "lib").glob("python3*/site-packages/vllm")
    parsers = (vllm / "engine" / "arg_utils.py", *(vllm / "entrypoints").rglob("cli_args.py"))
    source = "\n".join(path.read_text(encoding="utf-8") for path in parsers)
    flags = {part for spec in kinds_of_starts() for part in spec.argv}
    for name in sorted(part for part in flags if part.startswith("--")):
        field = name.removeprefix("--").replace("-", "_")
        assert f'"{name}"' in source or f"\n    {field}: " in source, f"vLLM knows no {name}"
    assert '"--no-such-flag"' not in source
