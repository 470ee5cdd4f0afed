"""The root of every error that sliceway raises on purpose, and the registry's own branch of it.

SlicewayError
├── RegistryError            what is this model, what does it need
│   ├── ConfigError          a line of the operator's YAML is wrong
│   ├── ModelNotFound        the named source holds no model
│   │   └── NoSuchSource         it is no path that exists, and nothing that could be looked up elsewhere
│   ├── ModelUnreadable      the source is there, its files make no sense
│   ├── ImportFailed         a model could not be fetched, converted or put into its place
│   ├── UnknownProduct       no such GPU in the catalogue
│   ├── UnknownProfile       no such MIG profile on this GPU
│   ├── IllegalLayout        MIG instances that cannot be on one GPU together
│   ├── ContextTooLong       more context asked for than the model was made for
│   └── NoHome               there is no directory for this user's own files
├── PlacementError           (placement.errors)
└── GatewayError             (gateway.errors)
"""

from __future__ import annotations


class SlicewayError(Exception):
    """What happened, where, and what to do about it.

    `message` says what happened in one sentence. `where` names the place as the reader knows it (file:line, field, slice,
    replica). `remedy` is an instruction, if possible a command. `code` is a stable snake_case word for programs.
    """

    code = "sliceway_error"

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.remedy = remedy

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.message}" if self.where else self.message]
        if self.remedy:
            parts.append(self.remedy)
        return "\n".join(parts)

    def as_dict(self) -> dict[str, str | None]:
        """The same as data, for `--json`."""
        return {"code": self.code, "message": self.message, "where": self.where, "remedy": self.remedy}


class RegistryError(SlicewayError):
    """What a model is, or what it needs, could not be told."""

    code = "registry_error"


class ConfigError(RegistryError):
    """The configuration is wrong. `problems` holds every fault found, in file order; the first one is the message."""

    code = "config_invalid"

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        remedy: str | None = None,
        problems: tuple[ConfigError, ...] = (),
    ) -> None:
        super().__init__(message, where=where, remedy=remedy)
        self.problems = problems or (self,)


class ModelNotFound(RegistryError):
    """The source names no model: neither a directory, nor a GGUF file, nor a hub id that can be had."""

    code = "model_not_found"


class NoSuchSource(ModelNotFound):
    """The source is a path where nothing is, or a word that is neither a path nor a hub id: no network would find it."""


class ModelUnreadable(RegistryError):
    """The source exists, but its files are broken or not a model's."""

    code = "model_unreadable"


class ImportFailed(RegistryError):
    """A model could not be fetched, converted or put into its place. What was there before is still there."""

    code = "import_failed"


class UnknownProduct(RegistryError):
    """The GPU product is not in the catalogue."""

    code = "unknown_product"


class UnknownProfile(RegistryError):
    """The GPU product has no MIG profile of this name, or the profile cannot start there."""

    code = "unknown_profile"


class IllegalLayout(RegistryError):
    """These MIG instances cannot be on one GPU together. The message draws which memory slices collide."""

    code = "illegal_layout"


class ContextTooLong(RegistryError):
    """`max_model_len` exceeds what the model was made for."""

    code = "context_too_long"


class NoHome(RegistryError):
    """Files of this user are to be read or kept, and neither HOME nor the XDG variable says where."""

    code = "no_home"
