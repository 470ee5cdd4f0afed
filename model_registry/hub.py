"""Models on the Hugging Face hub: their metadata from the local cache or the network, never their weights.

HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_TOKEN_PATH, HF_ENDPOINT, HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE mean what they mean to
huggingface_hub. Source: https://huggingface.co/docs/huggingface_hub/package_reference/environment_variables
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from model_registry.directories import user_directory
from model_registry.errors import ModelNotFound, ModelUnreadable
from model_registry.model import TensorSummary
from model_registry.tensors import INDEX, index_total, indexed_files, read_index, weight_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

METADATA_FILES = (
    "config.json",
    INDEX,
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "hf_quant_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
)
"""What is fetched of a model: small files that say what it is."""

BOTH_WAYS = (
    "Give a hub id (`source: org/name`, with network access and, for private or gated models, HF_TOKEN), "
    "or import a file that is here: sliceway models import FILE.gguf"
)
_REPO_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_TRUE = frozenset({"1", "true", "yes", "on"})
_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class HubSettings:
    """Where the hub is, what may be used of it, and where its cache lies."""

    cache: Path
    token: str | None = None
    endpoint: str = "https://huggingface.co"
    offline: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> HubSettings:
        """The settings in force under `environ`, found the way huggingface_hub finds them."""
        home = Path(environ.get("HF_HOME") or user_directory("XDG_CACHE_HOME", ".cache", environ) / "huggingface")
        home = home.expanduser()
        cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
        return cls(
            cache=Path(cache).expanduser(),
            token=environ.get("HF_TOKEN") or environ.get("HUGGING_FACE_HUB_TOKEN") or _saved_token(environ, home),
            endpoint=environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"),
            offline=any(environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")),
        )


@dataclass(frozen=True, slots=True)
class HubModel:
    """A model's metadata files in `folder`. `complete` says that its weights lie there too.

    `tensors` are known from the network where the weights are not here; None where neither tells.
    """

    folder: Path
    complete: bool
    tensors: TensorSummary | None = None


class Hub(Protocol):
    """Where hub ids are looked up."""

    def model(self, repo: str, revision: str | None) -> HubModel:
        """The metadata of `repo` at `revision`, the default branch if None. Raises ModelNotFound, ModelUnreadable."""


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form `org/name`."""
    return _REPO_ID.fullmatch(text) is not None


class HuggingFaceHub:
    """The real one. A complete copy in the cache is taken as it is; else the network is asked, and the cache if that fails."""

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings

    def model(self, repo: str, revision: str | None) -> HubModel:
        """See Hub."""
        cached = self._cached(repo, revision)
        if cached and (cached.complete or self._settings.offline):
            return cached
        if self._settings.offline:
            raise ModelNotFound(
                f"{repo!r} is not in the cache, and HF_HUB_OFFLINE forbids asking the hub",
                where=str(self._settings.cache),
                remedy=f"Unset HF_HUB_OFFLINE, or fetch it first: hf download {repo}. {BOTH_WAYS}",
            )
        return self._fetched(repo, revision, cached)

    def _cached(self, repo: str, revision: str | None) -> HubModel | None:
        from huggingface_hub import try_to_load_from_cache  # half a second that only hub ids cost

        config = try_to_load_from_cache(repo, "config.json", cache_dir=self._settings.cache, revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
        return HubModel(folder, complete=_has_weights(folder), tensors=_indexed_total(folder))

    def _fetched(self, repo: str, revision: str | None, cached: HubModel | None) -> HubModel:
        from huggingface_hub import HfApi, errors
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()  # these are small files; a bar for each tells nobody anything
        api = HfApi(endpoint=self._settings.endpoint, token=self._settings.token or False)
        try:
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_SECONDS)
            folder = self._download(api, repo, revision, info)
            return HubModel(folder, complete=_has_weights(folder), tensors=_remote_tensors(api, repo, info, folder))
        except (errors.GatedRepoError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
            _refused(repo, revision, error, has_token=bool(self._settings.token))
        except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]  # the HTTP client's own base class
            if cached:
                return cached
            raise ModelNotFound(
                f"{repo!r} is not in the cache, and the hub cannot be reached: {_first_line(error)}",
                where=self._settings.endpoint,
                remedy=f"Check the network (or the proxy, or HF_ENDPOINT). {BOTH_WAYS}",
            ) from error

    def _download(self, api: HfApi, repo: str, revision: str | None, info: ModelInfo) -> Path:
        there = _files(info)
        if "config.json" not in there:
            _not_servable(repo, set(there))
        # By the branch's name first, which makes the cache remember the branch's commit and serve it offline.
        config = api.hf_hub_download(repo, "config.json", revision=revision, cache_dir=self._settings.cache)
        for name in METADATA_FILES:
            if name in there and name != "config.json":
                api.hf_hub_download(repo, name, revision=info.sha, cache_dir=self._settings.cache)
        return Path(config).parent


def _files(info: ModelInfo) -> dict[str, int]:
    """The repository's files and their sizes in bytes."""
    return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}


def _remote_tensors(api: HfApi, repo: str, info: ModelInfo, folder: Path) -> TensorSummary | None:
    """From the headers of the remote safetensors files (range requests), or from the sizes of pickled weights."""
    from huggingface_hub.errors import SafetensorsParsingError

    there = _files(info)
    names = indexed_files(read_index(folder / INDEX)) if INDEX in there else weight_files(there)
    if not names:
        pickles = [size for name, size in there.items() if re.fullmatch(r"pytorch_model.*\.bin", name)]
        return TensorSummary(sum(pickles), exact=False) if pickles else None

    def header(name: str) -> Iterable[Any]:
        return api.parse_safetensors_file_metadata(
            repo, name, revision=info.sha, timeout=_TIMEOUT_SECONDS
        ).tensors.values()

    try:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return _added_up(pool.map(header, names))
    except SafetensorsParsingError as error:
        raise ModelUnreadable(f"the weights on the hub are damaged: {_first_line(error)}", where=repo) from error


def _added_up(files: Iterable[Iterable[Any]]) -> TensorSummary:
    sizes: Counter[str] = Counter()
    elements: Counter[str] = Counter()
    for tensors in files:
        for tensor in tensors:
            begin, end = tensor.data_offsets
            sizes[tensor.dtype] += end - begin
            elements[tensor.dtype] += tensor.parameter_count
    return TensorSummary(sizes.total(), dict(sizes), dict(elements))


def _has_weights(folder: Path) -> bool:
    if (folder / INDEX).is_file():
        return all((folder / name).is_file() for name in indexed_files(read_index(folder / INDEX)))
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def _indexed_total(folder: Path) -> TensorSummary | None:
    total = index_total(read_index(folder / INDEX)) if (folder / INDEX).is_file() else None
    return TensorSummary(total, exact=False) if total else None


def _not_servable(repo: str, there: set[str]) -> NoReturn:
    gguf = sorted(name for name in there if name.endswith(".gguf"))
    if gguf:
        remedy = f"Download one file and import it: hf download {repo} {gguf[0]} --local-dir . && sliceway models import ./{gguf[0]}"
        raise ModelUnreadable(f"{repo!r} holds GGUF files only", where=repo, remedy=remedy)
    what = "a LoRA adapter" if "adapter_config.json" in there else "no model that an engine can load"
    raise ModelUnreadable(
        f"{repo!r} holds {what}: there is no config.json", where=repo, remedy="Name the base model's hub id."
    )


def _refused(repo: str, revision: str | None, error: Exception, *, has_token: bool) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RevisionNotFoundError

    token = "The HF_TOKEN in use has no access." if has_token else "Set HF_TOKEN to a token that has access."
    if isinstance(error, GatedRepoError):
        raise ModelNotFound(
            f"{repo!r} is gated", where=repo, remedy=f"Accept its terms on the model's page. {token}"
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise ModelNotFound(
            f"{repo!r} has no revision {revision!r}",
            where=repo,
            remedy="Name a branch, a tag or a commit; `main` if unsure.",
        ) from error
    raise ModelNotFound(
        f"the hub has no model {repo!r}, or it is private",
        where=repo,
        remedy=f"Check the spelling. {token} {BOTH_WAYS}",
    ) from error


def _saved_token(environ: Mapping[str, str], home: Path) -> str | None:
    try:
        return Path(environ.get("HF_TOKEN_PATH") or home / "token").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
