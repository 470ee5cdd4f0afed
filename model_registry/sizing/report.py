"""Everything `sliceway size` says about a model, as one value; the same call serves Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from model_registry.catalogue import Product, ProfileInfo
from model_registry.errors import ConfigError
from model_registry.model import EngineLimits, Footprint, ModelSpec, SliceFit, TensorSummary
from model_registry.sizing.calibration import Calibration, CalibrationKey, CalibrationStore, calibrated
from model_registry.sizing.fit import fit
from model_registry.sizing.footprint import Sized, size_model
from model_registry.sizing.speed import ASSUMPTIONS, SpeedEstimate, estimate_speed, slice_roof
from model_registry.sizing.survey import Row, smallest, survey, verdict

_WORTH_SAYING = 1.05
_FP8_METHODS = ("fp8", "fbgemm_fp8", "modelopt", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class Workload:
    """The lengths that speed is estimated for."""

    prompt_tokens: int = 800
    output_tokens: int = 200


@dataclass(frozen=True, slots=True)
class SizeReport:
    """A model under an engine's limits: what it takes, where it fits, and what it gets on the chosen slice.

    `chosen` is the fit that the figures are for: the slice asked for, or the smallest that fits, or the largest looked at
    where none does. `rows` has one entry per profile.
    """

    spec: ModelSpec
    limits: EngineLimits
    sized: Sized
    footprint: Footprint
    chosen: SliceFit
    rows: tuple[Row, ...]
    verdict: str
    workload: Workload
    speed: SpeedEstimate | None
    measured: Calibration | None
    assumptions: tuple[str, ...]

    def as_public(self) -> dict[str, object]:
        """The stable JSON shape of `sliceway size --json`; sizes in bytes, times in seconds."""
        footprint, chosen = self.footprint, self.chosen
        return {
            "model": self.spec.source,
            "architecture": self.spec.architecture,
            "known_architecture": self.sized.architecture.known,
            "device": self.limits.device,
            "vllm_version": self.limits.vllm_version,
            "product": chosen.product,
            "profile": chosen.profile,
            "memory_bytes": chosen.memory_bytes,
            "needed_bytes": chosen.needed_bytes,
            "weights_bytes": footprint.weights_bytes,
            "activation_bytes": footprint.activation_bytes,
            "non_torch_bytes": footprint.non_torch_bytes,
            "cuda_graph_bytes": footprint.cuda_graph_bytes,
            "host_bytes": footprint.host_bytes,
            "margin_bytes": footprint.margin_bytes,
            "available_kv_bytes": chosen.available_kv_bytes,
            "kv_block_tokens": footprint.kv_block_tokens,
            "kv_block_bytes": footprint.kv_block_bytes,
            "kv_blocks": chosen.kv_blocks,
            "kv_blocks_per_request": footprint.kv_blocks_per_request,
            "kv_bytes_per_token": footprint.kv_bytes_per_token,
            "kv_groups": self._groups(),
            "max_concurrency": chosen.max_concurrency,
            "longest_context_tokens": chosen.longest_context_tokens,
            "head_room_bytes": chosen.head_room_bytes,
            "fits": chosen.fits,
            "reason": chosen.reason,
            "breaking_term": chosen.breaking_term,
            "verdict": self.verdict,
            "engine_args": list(chosen.engine_args),
            "limits": _public_limits(self.limits),
            "terms": [{"name": t.name, "bytes": t.bytes, "reason": t.reason} for t in footprint.terms],
            "speed": _public_speed(self.speed),
            "measured": _public_measured(self.measured),
            "assumptions": list(self.assumptions),
            "profiles": [self._row(r) for r in self.rows],
        }

    def _groups(self) -> list[dict[str, object]]:
        plan = self.sized.plan
        return [
            {
                "kind": g.page.kind,
                "layers": g.layers,
                "block_tokens": g.page.block_tokens,
                "page_bytes": g.page.page_bytes,
                "window_tokens": g.page.window,
                "blocks_per_request": g.page.blocks(self.limits.max_model_len, plan.in_flight_tokens),
            }
            for g in plan.groups
        ]

    def _row(self, row: Row) -> dict[str, object]:
        public: dict[str, object] = {
            "product": row.product.name,
            "profile": row.profile.name,
            "memory_bytes": row.profile.memory_bytes,
            "fits": row.fits,
        }
        if row.fit is None:
            return public | {"reason": "its memory has not been published", "breaking_term": "unknown_memory"}
        return public | {
            "reason": row.fit.reason,
            "breaking_term": row.fit.breaking_term,
            "head_room_bytes": row.fit.head_room_bytes,
            "available_kv_bytes": row.fit.available_kv_bytes,
            "kv_blocks": row.fit.kv_blocks,
            "max_concurrency": row.fit.max_concurrency,
            "longest_context_tokens": row.fit.longest_context_tokens,
            "engine_args": list(row.fit.engine_args),
            "speed": _public_speed(self.speed_on(row)),
        }

    def speed_on(self, row: Row) -> SpeedEstimate | None:
        """The estimated speed on one profile; None where the model does not fit or the GPU's peaks are not known."""
        if row.fit is None or not row.fits:
            return None
        return _speed(self.sized, self.limits, row.fit, row.product, row.profile, self.workload)


def size(
    spec: ModelSpec,
    limits: EngineLimits,
    *,
    products: Sequence[Product] = (),
    profile: str | None = None,
    memory_bytes: int | None = None,
    workload: Workload | None = None,
    calibrations: CalibrationStore | None = None,
) -> SizeReport:
    """Size `spec` under `limits` against every profile of `products`.

    `profile` picks the slice that the figures are for; `memory_bytes` takes a whole device of that size instead. With
    neither they are for the smallest profile that fits. On a CPU without `memory_bytes` memory is not limited. Reads
    nothing but `calibrations`. Raises ModelUnreadable, ConfigError (dtype, version) and UnknownProfile.
    """
    sized = size_model(spec, limits)
    footprint = sized.footprint
    rows = () if limits.device == "cpu" else survey(spec, footprint, limits, products)
    chosen, why = _choose(spec, footprint, limits, rows, products, profile, memory_bytes)
    record = _measured(spec, limits, chosen, calibrations)
    if record is not None:
        footprint = calibrated(footprint, record)
        chosen = fit(
            spec, footprint, limits, memory_bytes=chosen.memory_bytes, product=chosen.product, profile=chosen.profile
        )
    found = next(
        (r for r in rows if r.fit and (r.product.name, r.profile.name) == (chosen.product, chosen.profile)), None
    )
    load = workload or Workload()
    speed = _speed(sized, limits, chosen, found.product, found.profile, load) if found and chosen.fits else None
    twin = _faster_twin(sized, limits, found, rows, speed, load)
    notes = (*footprint.assumptions, *chosen.assumptions, *why, *twin, *(ASSUMPTIONS if speed else ()))
    return SizeReport(
        spec=spec,
        limits=limits,
        sized=sized,
        footprint=footprint,
        chosen=chosen,
        rows=rows,
        verdict=_sentence(rows, footprint, limits, chosen, explicit=profile is not None or memory_bytes is not None),
        workload=load,
        speed=speed,
        measured=record,
        assumptions=notes,
    )


def _choose(
    spec: ModelSpec,
    footprint: Footprint,
    limits: EngineLimits,
    rows: Sequence[Row],
    products: Sequence[Product],
    profile: str | None,
    memory_bytes: int | None,
) -> tuple[SliceFit, tuple[str, ...]]:
    """The fit that the figures are for, and what was assumed to choose it."""
    if memory_bytes is not None:
        return fit(spec, footprint, limits, memory_bytes=memory_bytes), ()
    if limits.device == "cpu" or not rows:
        enough = fit(spec, footprint, limits, memory_bytes=2**62).needed_bytes
        return fit(spec, footprint, limits, memory_bytes=enough), ("Memory is not limited: none was named.",)
    if profile is not None:
        return _named(rows, products, profile)
    known = [r for r in rows if r.fit is not None]
    picked = smallest(rows) or max(known, key=lambda r: r.profile.memory_bytes or 0, default=None)
    if picked is None or picked.fit is None:
        return fit(spec, footprint, limits, memory_bytes=0), ("None of these profiles has a published memory size.",)
    return picked.fit, ()


def _named(rows: Sequence[Row], products: Sequence[Product], profile: str) -> tuple[SliceFit, tuple[str, ...]]:
    """The profile of that name; of several products' namesakes the one with the least memory."""
    matching = [r for r in rows if profile in (r.profile.name, *r.profile.alternate_names)]
    if not matching:
        if len(products) == 1:
            products[0].profile(profile)
        raise ConfigError(f"no product has a profile {profile!r}", remedy="See `sliceway profiles --gpu PRODUCT`.")
    known = [r for r in matching if r.fit is not None]
    if not known:
        raise ConfigError(
            f"the memory of {profile} has not been published",
            remedy="Give its size with --memory-gib, as the driver reports it.",
        )
    least = min(known, key=lambda r: r.profile.memory_bytes or 0)
    assert least.fit is not None
    others = {r.product.name for r in known} - {least.product.name}
    note = f"{profile} exists on {len(others) + 1} products; these figures are for {least.product.name}, where it is smallest."
    return least.fit, (note,) if others else ()


def _sentence(
    rows: Sequence[Row], footprint: Footprint, limits: EngineLimits, chosen: SliceFit, *, explicit: bool
) -> str:
    if not rows or (explicit and chosen.profile is None):
        return chosen.reason
    if explicit:
        return (
            f"{chosen.profile}: {chosen.reason}" if chosen.fits else f"does not fit {chosen.profile}: {chosen.reason}"
        )
    return verdict(rows, footprint, limits)


def _measured(
    spec: ModelSpec, limits: EngineLimits, chosen: SliceFit, store: CalibrationStore | None
) -> Calibration | None:
    """What an engine measured on a slice of that size: under the source as it is named, or under the directory it is."""
    if store is None:
        return None
    names = [spec.source, *([str(spec.path)] if spec.path else [])]
    found = (store.find(CalibrationKey.of(name, chosen.memory_bytes, limits)) for name in names)
    return next((record for record in found if record is not None), None)


def _speed(
    sized: Sized, limits: EngineLimits, chosen: SliceFit, product: Product, profile: ProfileInfo, load: Workload
) -> SpeedEstimate | None:
    """None for encoders, and where the product's peaks are not known."""
    roof = slice_roof(product, profile, fp8=fp8_compute(limits))
    if roof is None or sized.architecture.encoder_only or not chosen.kv_blocks:
        return None
    longest = limits.max_model_len
    prompt = min(load.prompt_tokens, max(1, longest - 1))
    return estimate_speed(
        sized,
        limits,
        chosen,
        roof,
        prompt_tokens=prompt,
        output_tokens=max(1, min(load.output_tokens, longest - prompt)),
    )


def _faster_twin(
    sized: Sized,
    limits: EngineLimits,
    chosen: Row | None,
    rows: Sequence[Row],
    speed: SpeedEstimate | None,
    load: Workload,
) -> tuple[str, ...]:
    """A profile of the same product and memory that serves more of this load: more SMs for prefill, more memory slices for decoding."""
    if chosen is None or speed is None:
        return ()
    best, name = speed.requests_per_second * _WORTH_SAYING, ""
    for row in rows:
        same = row.product is chosen.product and row.profile.memory_bytes == chosen.profile.memory_bytes
        if not same or not row.profile.is_base or row.fit is None or not row.fits:
            continue
        found = _speed(sized, limits, row.fit, row.product, row.profile, load)
        if found and found.requests_per_second > best:
            best, name = found.requests_per_second, row.profile.name
    if not name:
        return ()
    more = best / speed.requests_per_second - 1
    return (
        f"{name} has the same memory and would serve {more:.0%} more requests of "
        f"{speed.prompt_tokens} + {speed.output_tokens} tokens (estimate).",
    )


def fp8_compute(limits: EngineLimits, spec: ModelSpec | None = None) -> bool:
    """Whether matrices are multiplied in FP8: by a method applied at load, or, given `spec`, by the checkpoint's own."""
    own = (spec.quant_config or {}).get("quant_method") if spec else None
    return str(limits.quantization or own or "").startswith(_FP8_METHODS)


def _public_limits(limits: EngineLimits) -> dict[str, object]:
    return {
        "max_model_len": limits.max_model_len,
        "max_num_seqs": limits.max_num_seqs,
        "max_num_batched_tokens": limits.max_num_batched_tokens,
        "gpu_memory_utilization": limits.gpu_memory_utilization,
        "dtype": limits.dtype,
        "kv_cache_dtype": limits.kv_cache_dtype,
        "quantization": limits.quantization,
        "tensor_parallel_size": limits.tensor_parallel_size,
        "cuda_graphs": limits.cuda_graphs,
        "prefix_caching": limits.prefix_caching,
    }


def _public_speed(speed: SpeedEstimate | None) -> dict[str, object] | None:
    if speed is None:
        return None
    return {
        "estimate": True,
        "batch": speed.batch,
        "prompt_tokens": speed.prompt_tokens,
        "output_tokens": speed.output_tokens,
        "ttft_seconds": speed.ttft_seconds,
        "itl_seconds": speed.itl_seconds,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "requests_per_second": speed.requests_per_second,
        "bound_by": speed.bound_by,
    }


def _public_measured(record: Calibration | None) -> dict[str, object] | None:
    if record is None:
        return None
    return {
        "weights_bytes": record.weights_bytes,
        "charged_bytes": record.charged_bytes,
        "cuda_graph_bytes": record.graph_bytes,
        "available_kv_bytes": record.available_kv_bytes,
        "kv_blocks": record.kv_blocks,
        "predicted": record.predicted,
    }


def with_weights(spec: ModelSpec, total_bytes: int) -> ModelSpec:
    """`spec` with checkpoint bytes that the caller knows, for a `config.json` without its weights."""
    return replace(spec, tensors=TensorSummary(total_bytes))
