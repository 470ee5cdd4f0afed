"""The playbook: what the configuration makes of it, and that Ansible itself takes it."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from gateway.config import Config, load_config
from gateway.export.ansible import AnsibleProject, ansible_project
from model_registry.errors import ConfigError

ROOT = Path(__file__).parents[4]
METADATA = ROOT / "configs" / "examples" / "models" / "Qwen--Qwen3-0.6B.json"
ANSIBLE = Path(sysconfig.get_path("scripts")) / "ansible-playbook"
ConfigOf = Callable[..., Config]


def project(config: Config, *hosts: str) -> AnsibleProject:
    return ansible_project(config, hosts or ("gpu1",), package="sliceway==1.0")


def variables(found: AnsibleProject) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(found.files["group_vars/sliceway.yml"])
    return read


def on_disk(found: AnsibleProject, directory: Path) -> None:
    for name, text in found.files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def test_ansible_takes_the_playbook(config_of: ConfigOf, tmp_path: Path) -> None:
    on_disk(project(config_of(), "gpu1", "gpu2=10.0.0.2"), tmp_path)
    done = subprocess.run(
        [ANSIBLE, "-i", tmp_path / "inventory.yml", tmp_path / "site.yml", "--syntax-check"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        env=os.environ | {"HOME": str(tmp_path), "ANSIBLE_LOCALHOST_WARNING": "false", "LC_ALL": "C.UTF-8"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_loads_as_it_lies_on_the_machines(config_of: ConfigOf, tmp_path: Path) -> None:
    on_disk(project(config_of(gateway={"listen": "127.0.0.1:9999", "admin_listen": "unix:/tmp/a"})), tmp_path)
    config = load_config(tmp_path / "roles/sliceway/files/sliceway.yaml")
    assert config.state == Path("/var/lib/sliceway")
    assert config.gateway.listen == "0.0.0.0:9999"
    assert config.gateway.admin_listen is None
    assert config.models[0].metadata == f"/etc/sliceway/files/{METADATA.name}"
    assert (tmp_path / "roles/sliceway/files/models" / METADATA.name).read_text(encoding="utf-8") == METADATA.read_text(
        encoding="utf-8"
    )


def test_secrets_are_left_where_they_are(config_of: ConfigOf) -> None:
    found = project(
        config_of(
            engine={"environment": {"MY_TOKEN": "planted", "LEVEL": "INFO"}},
            gateway={"keys_secret": "${ENV:PEPPER}", "admin_listen": "127.0.0.1:9", "admin_key": "file:/mine/admin"},
        )
    )
    assert not any("planted" in text for text in found.files.values())
    config = yaml.safe_load(found.files["roles/sliceway/files/sliceway.yaml"])
    assert config["gateway"]["admin_key"] == "file:/etc/sliceway/secrets/admin"
    assert config["engine"]["environment"] == {"LEVEL": "INFO"}
    assert variables(found)["sliceway_secret_files"] == {"admin": "/mine/admin"}
    assert variables(found)["sliceway_environment"] == {
        "MY_TOKEN": "{{ vault_my_token }}",
        "PEPPER": "{{ vault_pepper }}",
    }
    assert any("vault_pepper" in note for note in found.notes)


def test_the_service_has_the_time_that_ends_take_and_its_rights(config_of: ConfigOf) -> None:
    config = config_of(
        engine={"drain_timeout_seconds": 200, "stop_timeout_seconds": 50}, gateway={"drain_timeout_seconds": 100}
    )
    found = project(config)
    role = "roles/sliceway"
    values = yaml.safe_load(found.files[f"{role}/defaults/main.yml"]) | variables(found) | {"ansible_managed": ""}
    unit = jinja2.Template(found.files[f"{role}/templates/sliceway.service.j2"]).render(values)
    assert int(unit.partition("TimeoutStopSec=")[2].split()[0]) > 350
    assert "User=sliceway" in unit
    assert "NoNewPrivileges=yes" in unit
    assert "sliceway-layouts" not in unit


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"fleet": {"discover": "cpu"}}, {"sliceway_engine": "cpu", "sliceway_layouts": False}),
        ({"fleet": {"discover": "nvidia"}}, {"sliceway_engine": "cuda", "sliceway_user": "sliceway"}),
        ({"fleet": {"partition": "planned"}}, {"sliceway_user": "root"}),
        ({"fleet": {"layouts": [{"gpus": "all", "layout": {"1g.10gb": 7}}]}}, {"sliceway_layouts": True}),
        ({"engine": {"command": ["serve", "{uds}"]}}, {"sliceway_engine": "none"}),
    ],
)
def test_what_machines_need_follows_from_the_configuration(
    config_of: ConfigOf, sections: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert expected.items() <= variables(project(config_of(**sections))).items()


def test_what_differs_between_machines_is_told(config_of: ConfigOf) -> None:
    found = project(config_of(tenants=[{"name": "acme", "limits": {"requests_per_minute": 5}}]))
    assert any("each machine counts limits for itself" in note for note in found.notes)


def test_made_up_gpus_are_refused(config_of: ConfigOf) -> None:
    with pytest.raises(ConfigError, match="simulated") as caught:
        project(config_of(fleet={"discover": {"simulate": {"a30": 1}}}))
    assert caught.value.remedy == "Write `discover: nvidia`: each machine finds its own."


@pytest.mark.parametrize("hosts", [(), ("a b",), ("a", "a=1"), ("a=",), ("-a",), ("a={{ x }}",)])
def test_machines_that_are_none_are_refused(config_of: ConfigOf, hosts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        ansible_project(config_of(), hosts, package="sliceway")
    assert caught.value.where == "--host"


def test_two_files_of_one_name_are_refused(config_of: ConfigOf, tmp_path: Path) -> None:
    other = tmp_path / METADATA.name
    other.write_text(METADATA.read_text(encoding="utf-8"), encoding="utf-8")
    models = [{"name": n, "source": "org/x", "metadata": str(p)} for n, p in (("a", METADATA), ("b", other))]
    with pytest.raises(ConfigError, match="two files are called"):
        project(config_of(models=models))
