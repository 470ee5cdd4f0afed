"""A GGUF file made into a directory that vLLM serves. Runs in the engine's interpreter, as a program of its own.

    python convert_gguf.py --gguf FILE --out EMPTY_DIR --fallback-template FILE [--chat-template FILE]

Weights become bfloat16 safetensors. The tokenizer adds the beginning-of-sequence token where the GGUF says so, which is
checked by encoding a text with the saved files. Every line on standard output is a JSON object: `{"stage", "fraction"}` for
progress, in the end `{"result": ...}`, or `{"error": ...}` and exit status 1. It imports nothing of sliceway, because the
engine's environment does not hold it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import struct
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

ItemT = TypeVar("ItemT")

_TURN_ENDS = ("<end_of_turn>", "<turn|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|return|>", "</s>")
_CHECK_TEXT = "The sun rises in the east and sets in the west. Water freezes when it gets very cold."
_BASE_SAMPLING = {"do_sample": True, "temperature": 0.3, "top_p": 0.9}
"""What a base model answers with where the client does not choose: at the engine's default of 1.0 small ones ramble."""


class ConversionError(Exception):
    """The file cannot be converted; the message is for the operator."""


def main(arguments: list[str] | None = None) -> int:
    """Convert as the command line says; 0 if it worked."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--gguf", "--out", "--fallback-template", "--chat-template"):
        parser.add_argument(option, type=Path, required=option != "--chat-template")
    options = parser.parse_args(arguments)
    # Libraries write to standard output as they like; only ours may reach the reader of the JSON lines.
    report_to = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    reporter = Reporter(report_to)
    try:
        result = convert(options.gguf, options.out, options.fallback_template, options.chat_template, reporter)
    except (ConversionError, ValueError, KeyError, NotImplementedError, ImportError, OSError, MemoryError) as error:
        reporter.line({"error": str(error).strip() or type(error).__name__, "kind": type(error).__name__})
        return 1
    reporter.line({"result": result})
    return 0


class Reporter:
    """Writes progress as JSON lines. Fractions are of the whole conversion."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def line(self, value: dict[str, object]) -> None:
        """Write one object."""
        self._file.write(json.dumps(value) + "\n")

    def stage(self, stage: str, fraction: float) -> None:
        """Say what is being done and how far the whole is."""
        self.line({"stage": stage, "fraction": round(fraction, 3)})

    def during(self, items: Iterable[ItemT], total: int, stage: str, start: float, end: float) -> Iterator[ItemT]:
        """`items`, reporting from `start` to `end` while they are taken."""
        step = max(total // 20, 1)
        for index, item in enumerate(items):
            if index % step == 0:
                self.stage(stage, start + (end - start) * index / max(total, 1))
            yield item


def convert(
    gguf: Path, out: Path, fallback_template: Path, chat_template: Path | None, reporter: Reporter
) -> dict[str, object]:
    """Write `out`. Returns what was made: dtype, chat template used, whether `<bos>` is added, the check's loss, peak memory."""
    reporter.stage("loading the libraries", 0.02)
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    _speed_up_gguf_reader()
    metadata = _metadata(gguf)
    reporter.stage("reading the tokenizer", 0.15)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    reporter.stage("reading the weights", 0.35)
    _report_tensors(reporter, 0.4, 0.8)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )
    reporter.stage("writing", 0.82)
    origin, template = _template(metadata, chat_template, fallback_template)
    _prepare_tokenizer(tokenizer, template, metadata, model.config)
    _prepare_model(model, tokenizer, template, is_base=origin == "fallback")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    reporter.stage("checking", 0.92)
    adds_bos = _check_tokenizer(out, metadata)
    return {
        "dtype": "bfloat16",
        "chat_template": origin,
        "adds_bos": adds_bos,
        "check_loss": _check_loss(model, tokenizer),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }


# -- reading ------------------------------------------------------------------------------------------------------------


def _speed_up_gguf_reader() -> None:
    """Have transformers open each file once, with arrays read in bulk.

    It opens the file three times, and gguf's reader makes several NumPy views for each of a vocabulary's entries: 40 s for
    Gemma's 262,144 tokens on one core, against 3 s.
    """
    import gguf

    if not hasattr(gguf.GGUFReader, "_get_field_parts"):
        return  # another version of the library: slower, and right

    class BulkReader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[Any]]:
            parts = _bulk_array(self, orig_offs) if raw_type == gguf.GGUFValueType.ARRAY else None
            whole: tuple[int, list[Any], list[int], list[Any]] = parts or super()._get_field_parts(orig_offs, raw_type)
            return whole

    vars(gguf)["GGUFReader"] = cache(BulkReader)


def _bulk_array(reader: Any, start: int) -> tuple[int, list[Any], list[int], list[Any]] | None:
    """A field's size in bytes, its parts, which of them are values, and its types, as gguf's reader gives them."""
    import gguf
    import numpy as np

    raw_kind, raw_count = reader._get(start, np.uint32), reader._get(start + 4, np.uint64)
    kind, count, at = gguf.GGUFValueType(raw_kind[0]), int(raw_count[0]), start + 12
    types = [gguf.GGUFValueType.ARRAY, *([kind] if count else [])]
    parts: list[Any] = [raw_kind, raw_count]
    scalar = reader.gguf_scalar_to_np.get(kind)
    if scalar is not None:
        values = np.asarray(reader._get(at, scalar, count))
        parts.extend(values[i : i + 1] for i in range(count))
        return 12 + values.nbytes, parts, list(range(2, 2 + count)), types
    if kind != gguf.GGUFValueType.STRING or reader.byte_order != "I":
        return None
    data, unpack = np.asarray(reader.data), struct.Struct("=Q").unpack_from
    view = memoryview(data.data)
    for _ in range(count):
        (length,) = unpack(view, at)
        parts += (data[at : at + 8], data[at + 8 : at + 8 + length])
        at += 8 + length
    return at - start, parts, list(range(3, 3 + 2 * count, 2)), types


def _report_tensors(reporter: Reporter, start: float, end: float) -> None:
    """Turn transformers' own progress bar over the tensors into ours; other versions then only report stages."""
    from transformers import modeling_gguf_pytorch_utils as loader

    if hasattr(loader, "tqdm"):
        loader.tqdm = lambda items, **_: reporter.during(items, len(items), "reading the weights", start, end)


def _metadata(gguf_file: Path) -> dict[str, Any]:
    """What the GGUF says of its tokenizer and name, large arrays left out."""
    import gguf

    fields = gguf.GGUFReader(str(gguf_file)).fields
    wanted = [
        f
        for f in fields.values()
        if f.name.startswith(("tokenizer.", "general.")) and f.types[0] != gguf.GGUFValueType.ARRAY
    ]
    return {field.name: field.contents() for field in wanted}


# -- chat template, special tokens, generation ----------------------------------------------------------------------------


def _template(metadata: dict[str, Any], given: Path | None, fallback: Path) -> tuple[str, str]:
    """Where the chat template comes from (`given`, `gguf` or `fallback`), and its text."""
    if given is not None:
        return "given", given.read_text(encoding="utf-8")
    own = metadata.get("tokenizer.chat_template")
    return ("gguf", str(own)) if own else ("fallback", fallback.read_text(encoding="utf-8"))


def _wants_bos(metadata: dict[str, Any]) -> bool:
    """As llama.cpp decides: what the file says; where it is silent, SentencePiece vocabularies (`llama`) add it."""
    if "tokenizer.ggml.bos_token_id" not in metadata:
        return False
    return bool(metadata.get("tokenizer.ggml.add_bos_token", metadata.get("tokenizer.ggml.model") == "llama"))


def _prepare_tokenizer(tokenizer: Any, template: str, metadata: dict[str, Any], config: Any) -> None:
    tokenizer.chat_template = template
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int):
        tokenizer.model_max_length = limit
    if not _wants_bos(metadata) or _starts_with_bos(tokenizer):
        return
    tokenizer.add_bos_token = True
    if not _starts_with_bos(tokenizer):
        from tokenizers.processors import TemplateProcessing

        bos = tokenizer.bos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )


def _starts_with_bos(tokenizer: Any) -> bool:
    ids = tokenizer("Hello").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


def _prepare_model(model: Any, tokenizer: Any, template: str, *, is_base: bool) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    generation = model.generation_config
    known = generation.eos_token_id
    ends = {known} if isinstance(known, int) else set(known or [])
    ends |= {tokenizer.eos_token_id} - {None}
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[end] for end in _TURN_ENDS if end in template and end in vocabulary}
    if is_base:
        ends |= _blank_lines(tokenizer, vocabulary)
        for name, value in _BASE_SAMPLING.items():
            setattr(generation, name, value)
    generation.eos_token_id = sorted(ends)


def _blank_lines(tokenizer: Any, vocabulary: dict[str, int]) -> set[int]:
    """The tokens that end a paragraph; a line, where the vocabulary has no token for two line ends."""
    by_text: dict[int, set[int]] = {1: set(), 2: set()}
    for end_count in range(1, 9):
        ids = tokenizer("\n" * end_count, add_special_tokens=False).input_ids
        if len(ids) == 1 and tokenizer.decode(ids) == "\n" * end_count:
            by_text[min(end_count, 2)].add(ids[0])
    line = vocabulary.get("<0x0A>")
    return by_text[2] or by_text[1] or ({line} if line is not None else set())


# -- checking what was written ------------------------------------------------------------------------------------------


def _check_tokenizer(out: Path, metadata: dict[str, Any]) -> bool:
    """Encode with the saved files; whether they add `<bos>`. Raises ConversionError if they do not do what they must."""
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(out)
    adds_bos = _starts_with_bos(saved)
    if _wants_bos(metadata) and not adds_bos:
        raise ConversionError(
            f"the saved tokenizer does not add {saved.bos_token!r}, without which this model answers nonsense"
        )
    if saved.decode(saved("Hello, world", add_special_tokens=False).input_ids).strip() != "Hello, world":
        raise ConversionError("the saved tokenizer does not give back the text that it encodes")
    try:
        prompt = saved.apply_chat_template(
            [{"role": "user", "content": "Hello?"}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # whatever a template raises, in Jinja's many ways
        raise ConversionError(f"the chat template fails: {error}") from error
    if "Hello?" not in prompt:
        raise ConversionError("the chat template leaves out what the user says")
    count = (
        saved(prompt, add_special_tokens=False).input_ids.count(saved.bos_token_id)
        if saved.bos_token_id is not None
        else 0
    )
    if _wants_bos(metadata) and count != 1:
        raise ConversionError(f"the chat template writes {saved.bos_token!r} {count} times; it must write it once")
    return adds_bos


def _check_loss(model: Any, tokenizer: Any) -> float:
    """Mean negative log-likelihood per token (nats) of two plain English sentences; what was misread scores like chance."""
    import torch

    ids = tokenizer(_CHECK_TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = float(model(input_ids=ids, labels=ids).loss)
    if not loss < float("inf"):
        raise ConversionError("the converted model computes no finite numbers")
    return round(loss, 3)


if __name__ == "__main__":
    raise SystemExit(main())
