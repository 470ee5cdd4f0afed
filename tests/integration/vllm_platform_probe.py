"""Run inside an engine's interpreter: what does vLLM's platform say about the device it was given?

    python vllm_platform_probe.py < cases.json > answers.json

A case is `environment` (variables to set), `path` (directories to find entry points in) and any of `as_built`,
`worker` (do what a worker does) and `defaults` (ask for vLLM's batch defaults). Importing vLLM takes seconds, so it is done
once; a forked child answers each case, because vLLM decides on its platform once per process. An answer has the platform's
class, each question's answer or the error that vLLM would have died of, and `stderr`.

A CPU build of vLLM is bent in three places, because these questions are asked where no CUDA build can run: the compiled
extension that `vllm.platforms.cuda` imports is an empty module (nothing here calls it); the build says that it is no CPU
build, unless `as_built`; and CUDA's own view of the device, which a worker would have, is made up.
"""

import json
import os
import sys
import tempfile
import types

QUESTIONS = {
    "name": lambda p: p.get_device_name(),
    "uuid": lambda p: p.get_device_uuid(),
    "memory_bytes": lambda p: p.get_device_total_memory(),
    "capability": lambda p: tuple(p.get_device_capability()),
    "is_ampere_or_later": lambda p: p.has_device_capability(80),
    "count": lambda p: p.device_count(),
    "numa_node": lambda p: p.get_device_numa_node(),
    "numa_nodes": lambda p: p.get_all_device_numa_nodes(),
    "physical_id": lambda p: p.device_id_to_physical_device_id(0),
    "has_bfloat16": lambda p: "torch.bfloat16" in [str(d) for d in p.supported_dtypes],
    "is_cuda": lambda p: p.is_cuda(),
    "is_out_of_tree": lambda p: p.is_out_of_tree(),
}
# Method and argument; not in every version.
LATER_QUESTIONS = {
    "visible_id": ("logical_device_id_to_visible_device_id", 0),
    "physical_of_visible": ("visible_device_id_to_physical_device_id", 0),
    "physical_of_name": ("device_control_id_to_physical_device_id", "{CUDA_VISIBLE_DEVICES}"),
}
CUDA_TOTAL_BYTES = 10**10


class Config:
    """A stand-in for vLLM's configuration objects: what is not set is None."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def __getattr__(self, name):
        return None


def prepare():
    for extension in ("vllm._C_stable_libtorch", "vllm._C"):
        sys.modules[extension] = types.ModuleType(extension)
    import vllm.platforms

    as_built = vllm.platforms.vllm_version_matches_substr
    vllm.platforms.vllm_version_matches_substr = lambda substr: False
    import vllm.platforms.cuda

    return vllm.__version__, as_built


def answer(case, as_built):
    os.environ.update(case["environment"])
    sys.path[:0] = case.get("path", [])
    import vllm.platforms

    if case.get("as_built"):
        vllm.platforms.vllm_version_matches_substr = as_built
    vllm.platforms._current_platform = None  # importing it has made vLLM choose already, in some versions
    platform = vllm.platforms.current_platform

    asked = dict(QUESTIONS)
    for key, (method, argument) in LATER_QUESTIONS.items():
        argument = argument.format(**os.environ) if isinstance(argument, str) else argument
        if hasattr(type(platform), method):
            asked[key] = lambda p, m=method, a=argument: getattr(p, m)(a)
    if case.get("worker"):
        asked["worker"] = act_as_worker
    if case.get("defaults"):
        asked["batch_defaults"] = batch_defaults
    return {"class": type(platform).__name__} | {key: tried(question, platform) for key, question in asked.items()}


def tried(question, platform):
    try:
        return question(platform)
    except Exception as error:  # noqa: BLE001  # whatever vLLM lets out is the finding
        return f"{type(error).__name__}: {error}"


def act_as_worker(platform):
    """What vLLM does with its platform between reading its arguments and having its device."""
    import torch

    properties = types.SimpleNamespace(total_memory=CUDA_TOTAL_BYTES, multi_processor_count=16, uuid="x")
    config = Config(
        model_config=Config(max_model_len=8192),
        parallel_config=Config(worker_cls="auto", prefill_context_parallel_size=1),
        scheduler_config=Config(max_num_seqs=16, max_num_batched_tokens=2048),
        cache_config=Config(gpu_memory_utilization=0.85),
        offload_config=Config(uva=Config(cpu_offload_gb=0)),
    )
    for _ in range(2):  # vLLM settles its configuration more than once
        platform.check_and_update_config(config)
    config.model_config = None  # as in the configuration that vLLM makes up for want of one
    platform.check_and_update_config(config)
    torch.cuda.is_initialized = lambda: True
    torch.cuda.get_device_properties = lambda device: properties
    platform.check_if_supports_dtype(torch.bfloat16)
    return config.parallel_config.worker_cls


def batch_defaults(platform):
    """What vLLM would take for max_num_batched_tokens and max_num_seqs, were they not passed."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    tokens, seqs = EngineArgs.get_batch_defaults(1)
    return tokens[UsageContext.OPENAI_API_SERVER], seqs[UsageContext.OPENAI_API_SERVER]


def in_child(case, as_built):
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as answers,
        tempfile.TemporaryFile("w+", errors="replace", encoding="utf-8") as errors,
    ):
        pid = os.fork()
        if pid == 0:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)
            try:
                json.dump(answer(case, as_built), answers)
                answers.flush()
            finally:
                sys.stdout.flush()
                os._exit(0)
        os.waitpid(pid, 0)
        answers.seek(0)
        errors.seek(0)
        text, said = answers.read(), errors.read()
        return (json.loads(text) if text else {"class": "the process died"}) | {"stderr": said}


def main():
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM may log to standard output, which the answers need for themselves
    cases = json.load(sys.stdin)
    version, as_built = prepare()
    answers = {label: in_child(case, as_built) for label, case in cases.items()}
    with os.fdopen(out, "w", encoding="utf-8") as file:
        json.dump({"vllm": version, "answers": answers}, file)


if __name__ == "__main__":
    main()
