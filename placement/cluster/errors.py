"""Errors of a cluster.

ClusterError
├── NodeLost            a node does not answer
├── NodeMismatch        a node runs other versions than the head
├── SliceHeld           a node offers a slice, or has a name, that another node already has
├── NotSurveyed         a node does not tell what a plan has to know of it
├── ClusterLed          another `sliceway up` leads this cluster
├── TokenRefused        it asks for another token than the one it was shown
└── ClusterUnreachable  there is no cluster at that address, or none could be started
    ├── ClusterLost         there was one, and it has ended
    └── NoAddress           it is no address, or its name cannot be resolved
"""

from __future__ import annotations

from placement.errors import PlacementError


class ClusterError(PlacementError):
    """Several machines could not act as one."""

    code = "cluster_error"


class NodeLost(ClusterError):
    """A node does not answer."""

    code = "node_lost"


class NodeMismatch(ClusterError):
    """A node runs other versions than the head."""

    code = "node_mismatch"


class SliceHeld(ClusterError):
    """A node offers a slice that another node already offers, or comes under its name."""

    code = "slice_held"


class NotSurveyed(ClusterError):
    """A node does not tell its GPUs, so nothing can be planned."""

    code = "not_surveyed"


class ClusterLed(ClusterError):
    """Another process has the cluster work by its configuration."""

    code = "cluster_led"


class TokenRefused(ClusterError):
    """The cluster lets nobody in who does not show its token."""

    code = "token_refused"


class ClusterUnreachable(ClusterError):
    """There is no cluster at that address."""

    code = "cluster_unreachable"


class ClusterLost(ClusterUnreachable):
    """The cluster that this process led has ended; what serves goes on without it for a while."""

    code = "cluster_lost"


class NoAddress(ClusterUnreachable):
    """It is not of the form HOST:PORT, or the host's name cannot be resolved."""

    code = "no_cluster_address"
