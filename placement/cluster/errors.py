"""Errors of a cluster.

ClusterError
├── NodeLost            a node does not answer
├── NodeMismatch        a node runs other versions than the head
├── SliceHeld           a node offers a slice, or has a name, that another node already has
├── ClusterLed          another `sliceway up` leads this cluster
└── ClusterUnreachable  there is no cluster at that address, or none could be started
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


class ClusterLed(ClusterError):
    """Another process has the cluster work by its configuration."""

    code = "cluster_led"


class ClusterUnreachable(ClusterError):
    """There is no cluster at that address."""

    code = "cluster_unreachable"


class NoAddress(ClusterUnreachable):
    """It is not of the form HOST:PORT, or the host's name cannot be resolved."""

    code = "no_cluster_address"
