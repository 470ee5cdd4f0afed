"""The state directory: which file is whose, and what survives what.

::

    STATE/                    0700
      routing.json            the routing table; written by the controller, read by gateways
      controller.json         what the controller does at the moment, for `up` and `status`; may be lost
      accepted.json           what the controller has last taken over of the configuration
      config.json             the last configuration that `up` could read
      calibration.json        what engines said about their memory when they started
      withheld.json           slices that `apply --drain` wants free; gone otherwise
      orders.json, orders.log what is asked of single replicas (drain, stop, start), and every change of that
      planned.json            which replica has which slice, by the last plan that was carried out
      renewals.json           which replicas are about to take another one's place, and what they are called since
      autoscale.json          how many replicas of each model demand asks for, as last decided
      figures/PROCESS.json    what one gateway process sees of demand; stale ones do not count
      gateways/PID.json       which configuration each gateway goes by at the moment, for `apply` to wait for them
      generation.json         which configuration gateways go by, as a number that grows with each change
      reservations.json       slices that were made for other work, and for whom
      transition.json         what is done of a transition under way; gone otherwise
      simulated/FLEET/        the machine of a simulated fleet
      controller.lock         held by the one controller of this directory; holds its pid
      up.lock, up.json        held by `sliceway up`; the processes it started
      logs/REPLICA.log        what an engine wrote; also controller.log and gateway.log
      responses.secret        what ids of stored responses are sealed with
      limits.sqlite3          what each gateway process holds of tenants' limits
      objects.db              files and batches of tenants
      files/FILE              their contents
      batches/BATCH/          answers of a batch that runs
      replicas/REPLICA/
        journal.json          which process runs for this replica, for the next controller to adopt
        exit.json             how the last one ended; written by the shim
      run/                    0700: Unix sockets, unless the path would be too long for one
      cache/MODEL/PROFILE/ENGINE/   engines' compilation caches

Names are percent-encoded, because those of models and slices may hold slashes.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from model_registry.sizing.calibration import CALIBRATION_FILE
from placement.errors import PlacementError

# sockaddr_un.sun_path holds 108 bytes with the closing zero (unix(7)). Engines may append to the name.
SOCKET_PATH_BYTES = 100
_SOCKET_NAME_BYTES = len("/0123456789ab.sock")


@dataclass(frozen=True, slots=True)
class StatePaths:
    """Names inside one state directory. Making a path makes nothing on disk; `prepare` does."""

    root: Path

    @property
    def routing_table(self) -> Path:
        """Published by the controller, atomically."""
        return self.root / "routing.json"

    @property
    def cluster_scaling(self) -> Path:
        """What the head of the cluster that this state directory is of makes of demand."""
        return self.root / "cluster_scaling.json"

    @property
    def controller_status(self) -> Path:
        """For people: phases, progress, last errors."""
        return self.root / "controller.json"

    @property
    def accepted_config(self) -> Path:
        """What a controller falls back to that starts while the configuration is wrong and engines run."""
        return self.root / "accepted.json"

    @property
    def last_good_config(self) -> Path:
        """What a gateway falls back to that is started again while the configuration is wrong."""
        return self.root / "config.json"

    @property
    def calibration(self) -> Path:
        """What engines said about their memory when they started; plans use it."""
        return self.root / CALIBRATION_FILE

    @property
    def limits(self) -> Path:
        """Which gateway process holds what of tenants' limits; see `gateway.admission.sharing`."""
        return self.root / "limits.sqlite3"

    @property
    def rooms(self) -> Path:
        """Which gateway process holds how much of each replica; see `gateway.admission.sharing`."""
        return self.root / "rooms.sqlite3"

    @property
    def withheld(self) -> Path:
        """Slices that the controller is to leave; see `placement.withheld`."""
        return self.root / "withheld.json"

    @property
    def objects(self) -> Path:
        """The database of tenants' files and batches."""
        return self.root / "objects.db"

    @property
    def files(self) -> Path:
        """What tenants have uploaded, and the answers of their batches."""
        return self.root / "files"

    @property
    def batches(self) -> Path:
        """One directory per batch that runs."""
        return self.root / "batches"

    @property
    def batches_lock(self) -> Path:
        """Held by the one gateway that runs batches."""
        return self.batches / "runner.lock"

    @property
    def responses_secret(self) -> Path:
        """What gateways seal ids of stored responses with."""
        return self.root / "responses.secret"

    @property
    def orders(self) -> Path:
        """What is asked of single replicas; see `placement.orders`."""
        return self.root / "orders.json"

    @property
    def orders_log(self) -> Path:
        """Every change of the orders, a JSON object per line."""
        return self.root / "orders.log"

    @property
    def autoscale(self) -> Path:
        """How many replicas of each model autoscaling has decided on; see `placement.scaling`."""
        return self.root / "autoscale.json"

    @property
    def figures(self) -> Path:
        """What each gateway process sees of demand; see `placement.figures`."""
        return self.root / "figures"

    @property
    def gateways(self) -> Path:
        """A directory with one small file per gateway: which configuration it goes by."""
        return self.root / "gateways"

    @property
    def generation(self) -> Path:
        """The number of the configuration that gateways go by."""
        return self.root / "generation.json"

    @property
    def controller_lock(self) -> Path:
        """Locked for as long as a controller works here."""
        return self.root / "controller.lock"

    @property
    def up_lock(self) -> Path:
        """Locked for as long as a `sliceway up` works here."""
        return self.root / "up.lock"

    @property
    def up_record(self) -> Path:
        """The processes that `sliceway up` started."""
        return self.root / "up.json"

    @property
    def logs(self) -> Path:
        """One file per replica, and the controller's and the gateway's own."""
        return self.root / "logs"

    @property
    def replicas(self) -> Path:
        """One directory per replica."""
        return self.root / "replicas"

    def log(self, name: str) -> Path:
        """The log of the replica (or process) `name`."""
        return self.logs / f"{file_name(name)}.log"

    def replica(self, replica: str) -> Path:
        """The directory of one replica."""
        return self.replicas / file_name(replica)

    def journal(self, replica: str) -> Path:
        """Which process runs for this replica."""
        return self.replica(replica) / "journal.json"

    def exit_record(self, replica: str) -> Path:
        """How its last process ended."""
        return self.replica(replica) / "exit.json"

    def cache(self, model: str, profile: str, engine: str) -> Path:
        """Compilation caches of one model's engines, of one version, on slices of one kind."""
        return self.root / "cache" / file_name(model) / file_name(profile) / file_name(engine)

    def runtime(self, environ: Mapping[str, str]) -> Path:
        """Where sockets go: `run/` here, or a short directory of this user's where that path is too long for a socket."""
        inside = self.root / "run"
        if len(os.fsencode(inside)) + _SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES:
            return inside
        digest = hashlib.sha256(os.fsencode(self.root)).hexdigest()[:8]
        base = Path(environ.get("XDG_RUNTIME_DIR") or "/tmp")
        return base / f"sliceway-{os.getuid()}-{digest}"

    def prepare(self, environ: Mapping[str, str]) -> None:
        """Make the directories.

        Raises PlacementError where one cannot be made, or where the socket directory is someone else's.
        """
        for directory in (self.root, self.logs, self.replicas):
            _directory(directory)
        _private(_directory(self.runtime(environ)))


def file_name(name: str) -> str:
    """`name` as one component of a path, reversible: `a/b` becomes `a%2Fb`, and nothing becomes `..` or hidden."""
    quoted = quote(name, safe="@+")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def socket_name(replica: str) -> str:
    """A short file name, the same for the same replica."""
    return hashlib.sha256(replica.encode()).hexdigest()[:12] + ".sock"


def _directory(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise PlacementError(
            f"this directory cannot be made: {error.strerror}",
            where=str(path),
            remedy="Set state_dir in the configuration to a directory you can write to.",
        ) from error
    return path


def _private(path: Path) -> None:
    """Refuse a socket directory that others could put sockets into, or have put there as a link."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PlacementError(
            "the socket directory is not a directory of yours",
            where=str(path),
            remedy="Remove it, or choose another state_dir.",
        )
    if found.st_mode & 0o077:
        path.chmod(0o700)
