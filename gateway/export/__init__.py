"""A configuration and a plan, written down for what else runs fleets: Kubernetes, Ansible."""
