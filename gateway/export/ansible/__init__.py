"""A configuration as an Ansible playbook for machines without Kubernetes."""

from __future__ import annotations

from gateway.export.ansible.project import AnsibleProject, ansible_project

__all__ = ["AnsibleProject", "ansible_project"]
