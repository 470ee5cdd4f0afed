"""Several machines as one fleet: the same controller on each, one head that seats replicas, and Ray to supervise.

See docs/cluster.md and docs/adr/0007-ray-supervises-and-carries-no-token.md. Only `actors` and `start` know Ray.
"""
