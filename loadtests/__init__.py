"""Load tests: they speak HTTP to a running gateway, measure on the client's own clock, and import none of the other packages.

`python -m loadtests` runs scenarios in a process of its own, because Locust patches the standard library for gevent when it
is imported. The modules that import it (`users`, `run`, `locustfile`) belong in no other process.
"""
