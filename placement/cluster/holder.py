"""What the engines of one node belong to, as long as Ray has the node.

Ray's worker imports the module of the class that it is given. This one needs the standard library only: what an agent or the head
imports takes longer to load, and more memory, than Ray itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from placement.replicas.procfs import ProcessIdentity


class SliceHolder:
    """Holds a node's slices: an engine there outlives this process by a while at most, unless another one takes its place."""

    def owner(self) -> str:
        """This process as an `Owner`, in JSON, for a node's controller to look for."""
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        return json.dumps(asdict(me))
