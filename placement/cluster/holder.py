"""What holds one slice in Ray's books for one replica.

Every replica of a cluster has such a process, and Ray's worker imports the module of the class that it is given. So this one needs the
standard library only: what an agent or the head imports takes longer to load, and more memory, than Ray itself.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict

from placement.replicas.procfs import ProcessIdentity


class SliceHolder:
    """Holds one slice in Ray's books for one replica, and is what its engine belongs to."""

    def owner(self) -> str:
        """This process as an `Owner`, in JSON, for a node's controller to look for."""
        me = ProcessIdentity.of(os.getpid())
        assert me is not None
        return json.dumps(asdict(me))
