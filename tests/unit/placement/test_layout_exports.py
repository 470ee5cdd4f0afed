"""What is there, written for this program, mig-parted, Kubernetes and systemd; and mig-parted's files read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model_registry.errors import ConfigError
from placement.exports import (
    export_config,
    export_labels,
    export_mig_parted,
    export_systemd,
    import_mig_parted,
)
from placement.exports.kubernetes import label_value
from placement.nvml.partition import NvmlPartitioner
from placement.partition import LayoutRule, apply, plan

Nvml = Callable[..., Any]

MIXED = [
    LayoutRule(gpus=(0, 1), layout=("1g.10gb@0", "1g.10gb+me@6", "2g.20gb@2")),
    LayoutRule(gpus=("a30",), layout={"1g.6gb": 4}),
]


def gpus_of(n: Any) -> Any:
    return NvmlPartitioner(n).observe()


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "mig-parted.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def is_so(n: Any, rules: Any) -> bool:
    return not any(p.actions for p in plan(gpus_of(n), rules))


def test_an_exported_configuration_is_what_is_there(nvml: Nvml) -> None:
    n = nvml("h100-sxm:3,a30,plain", mig=True)
    assert apply(NvmlPartitioner(n), MIXED).ok
    rules = export_config(gpus_of(n))["fleet"]["layouts"]  # type: ignore[index]
    assert is_so(n, [LayoutRule.model_validate(r) for r in rules])
    assert len(rules) == 3, "GPUs that hold the same share a rule, and one without MIG has none"


def test_gpus_that_all_hold_the_same_are_all(nvml: Nvml) -> None:
    n = nvml("h100-sxm:2", mig=True)
    apply(NvmlPartitioner(n), [LayoutRule(layout={"3g.40gb": 2})])
    assert export_config(gpus_of(n))["fleet"] == {"layouts": [{"gpus": "all", "layout": ["3g.40gb@0", "3g.40gb@4"]}]}


def test_without_the_right_to_see_starts_counts_are_written(nvml: Nvml) -> None:
    n = nvml("h100-sxm", mig=True)
    apply(NvmlPartitioner(n), [LayoutRule(layout={"3g.40gb": 1, "1g.10gb": 2})])
    n.machine.set_privilege("none")
    assert export_config(gpus_of(n))["fleet"] == {"layouts": [{"gpus": "all", "layout": {"1g.10gb": 2, "3g.40gb": 1}}]}


# ---------------------------------------------------------------- mig-parted


def test_what_is_written_for_mig_parted_means_the_same_when_read(nvml: Nvml, tmp_path: Path) -> None:
    n = nvml("h100-sxm:3,a30,plain", mig=True)
    assert apply(NvmlPartitioner(n), MIXED).ok
    content = export_mig_parted(gpus_of(n), "mine")
    assert is_so(n, import_mig_parted(written(tmp_path, content)))
    entries = content["mig-configs"]["mine"]  # type: ignore[index]
    assert entries[0] == {
        "device-filter": ["0x233010DE"],
        "devices": [0, 1],
        "mig-enabled": True,
        "mig-devices": {"1g.10gb": 1, "1g.10gb+me": 1, "2g.20gb": 1},
    }
    assert {
        "device-filter": ["0x20B710DE"],
        "devices": "all",
        "mig-enabled": True,
        "mig-devices": {"1g.6gb": 4},
    } in entries
    assert entries[-1]["mig-enabled"] is False, "the GPU without MIG"


def test_the_file_of_the_mig_manager_is_read(tmp_path: Path, nvml: Nvml) -> None:
    text = """
version: v1
mig-configs:
  all-disabled:
    - devices: all
      mig-enabled: false
  all-balanced:
    - device-filter: ["0x233010DE", "0x233110DE"]
      devices: all
      mig-enabled: true
      mig-devices:
        "1g.10gb": 2
        "2g.20gb": 1
        "3g.40gb": 1
    - device-filter: "0x20B710DE"
      devices: [1]
      mig-enabled: true
      mig-devices: {"1g.6gb": 2, "2g.12gb": 1}
"""
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    n = nvml("h100-sxm,a30", mig=True)
    rules = import_mig_parted(path, "all-balanced")
    assert apply(NvmlPartitioner(n), rules).ok
    assert [len(g.instances) for g in gpus_of(n)] == [4, 3]
    assert import_mig_parted(path, "all-disabled")[0].mig is False
    with pytest.raises(ConfigError, match="several configurations") as refused:
        import_mig_parted(path)
    assert "all-disabled, all-balanced" in str(refused.value.remedy)
    with pytest.raises(ConfigError, match="no configuration 'x'"):
        import_mig_parted(path, "x")


def test_of_entries_for_one_gpu_the_last_counts_as_mig_parted_applies_them(tmp_path: Path, nvml: Nvml) -> None:
    entries = [
        {"devices": [0], "mig-enabled": True, "mig-devices": {"7g.80gb": 1}},
        {"devices": "all", "mig-enabled": True, "mig-devices": {"3g.40gb": 2}},
    ]
    n = nvml("h100-sxm", mig=True)
    rules = import_mig_parted(written(tmp_path, {"version": "v1", "mig-configs": {"c": entries}}))
    assert apply(NvmlPartitioner(n), rules).ok
    assert [i.profile for i in gpus_of(n)[0].instances] == ["3g.40gb", "3g.40gb"]


GOOD = {"devices": "all", "mig-enabled": True, "mig-devices": {"1g.10gb": 1}}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"version": "v2", "mig-configs": {"c": [GOOD]}}, "no mig-parted file of version v1"),
        ([], "no mig-parted file"),
        ({"version": "v1"}, "needs `mig-configs`"),
        ({"version": "v1", "mig-configs": {"c": []}}, "list of entries"),
        ({"version": "v1", "extra": 1, "mig-configs": {"c": [GOOD]}}, "unknown key 'extra'"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-device": {}}]}}, "unknown key 'mig-device'"),
        ({"version": "v1", "mig-configs": {"c": [{"devices": "all"}]}}, "needs `mig-enabled`"),
        ({"version": "v1", "mig-configs": {"c": [{"devices": "all", "mig-enabled": True}]}}, "needs `mig-devices`"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-enabled": False}]}}, "mig-enabled is false"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-enabled": "yes"}]}}, "true or false"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"devices": "some"}]}}, "`all` or a list"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"device-filter": 3}]}}, "PCI id"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"device-filter": "0x233010DE:0x16C110DE"}]}}, "boards"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-devices": {"1g.10gb": "two"}}]}}, "number of instances"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-devices": {"1c.3g.40gb": 1}}]}}, "share its memory"),
        ({"version": "v1", "mig-configs": {"c": [GOOD | {"mig-devices": {"9g.10gb": 1}}]}}, "no GPU product"),
    ],
)
def test_files_that_mig_parted_would_refuse_or_that_mean_nothing_here(
    tmp_path: Path, content: object, told: str
) -> None:
    path = written(tmp_path, content)
    with pytest.raises(ConfigError) as refused:
        import_mig_parted(path)
    assert told in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_whole_compute_instance_is_just_its_profile(tmp_path: Path) -> None:
    entry = GOOD | {"mig-devices": {"3c.3g.40gb": 1, "3g.40gb": 1}}
    (rule,) = import_mig_parted(written(tmp_path, {"version": "v1", "mig-configs": {"c": [entry]}}))
    assert rule.layout == {"3g.40gb": 2}


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        import_mig_parted(tmp_path / "none.yaml")


# ---------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize(
    ("fleet", "mig", "layout", "strategy", "config", "resources"),
    [
        ("h100-sxm:2", False, None, "none", "all-disabled", {"nvidia.com/gpu": 2}),
        ("plain", False, None, "none", "all-disabled", {"nvidia.com/gpu": 1}),
        ("h100-sxm:2", True, None, "mixed", "all-enabled", {}),
        ("h100-sxm:2", True, {"1g.10gb": 7}, "single", "all-1g.10gb", {"nvidia.com/gpu": 14}),
        ("h100-sxm", True, {"1g.10gb": 3}, "single", "current", {"nvidia.com/gpu": 3}),
        ("h100-sxm", True, {"1g.10gb+me": 1}, "single", "all-1g.10gb.me", {"nvidia.com/gpu": 1}),
        (
            "h100-sxm",
            True,
            {"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1},
            "mixed",
            "all-balanced",
            {"nvidia.com/mig-1g.10gb": 2, "nvidia.com/mig-2g.20gb": 1, "nvidia.com/mig-3g.40gb": 1},
        ),
        (
            "a30",
            True,
            {"1g.6gb": 2, "2g.12gb": 1},
            "mixed",
            "all-balanced",
            {"nvidia.com/mig-1g.6gb": 2, "nvidia.com/mig-2g.12gb": 1},
        ),
        (
            "h100-sxm,plain",
            True,
            {"1g.10gb+me": 1},
            "mixed",
            "all-1g.10gb.me",
            {"nvidia.com/gpu": 1, "nvidia.com/mig-1g.10gb.me": 1},
        ),
    ],
)
def test_labels_and_strategy_follow_from_what_is_there(
    nvml: Nvml, fleet: str, mig: bool, layout: Any, strategy: str, config: str, resources: dict[str, int]
) -> None:
    n = nvml(fleet, mig=mig)
    if layout:
        assert apply(NvmlPartitioner(n), [LayoutRule(layout=layout)]).ok
    found = export_labels(gpus_of(n))
    assert (found.strategy, found.resources) == (strategy, resources)
    assert found.labels["nvidia.com/mig.config"] == config
    assert found.labels["nvidia.com/mig.strategy"] == strategy
    assert found.labels["nvidia.com/mig.capable"] == ("false" if fleet == "plain" else "true")
    assert found.labels["nvidia.com/mig.config.state"] == "success"
    for resource, count in resources.items():
        assert found.labels[f"{resource}.count"] == str(count)
    assert all(value == label_value(value) for value in found.labels.values())


def test_a_pending_mode_is_a_pending_configuration(nvml: Nvml) -> None:
    n = nvml("a100-80gb")
    n.nvmlDeviceSetMigMode(n.nvmlDeviceGetHandleByIndex(0), 1)
    assert export_labels(gpus_of(n)).labels["nvidia.com/mig.config.state"] == "pending"


# ---------------------------------------------------------------- systemd


def test_a_unit_that_applies_the_configuration_at_boot() -> None:
    unit = export_systemd(["/usr/bin/sliceway"], Path("/etc/sliceway/sliceway.yaml"))
    assert "ExecStart=/usr/bin/sliceway apply /etc/sliceway/sliceway.yaml --layouts-only --allow-mode-change\n" in unit
    for line in (
        "Type=oneshot",
        "RemainAfterExit=yes",
        "WantedBy=multi-user.target",
        "[Unit]",
        "[Service]",
        "[Install]",
    ):
        assert line in unit.splitlines()
    assert "nvidia-dcgm.service" in unit.split("Before=")[1].splitlines()[0]
    assert "nvidia-persistenced.service" in unit.split("After=")[1].splitlines()[0]


def test_names_that_systemd_would_read_otherwise_are_escaped() -> None:
    unit = export_systemd(["/opt/my tools/sliceway"], Path("/etc/50%/a$b.yaml"))
    assert 'ExecStart="/opt/my tools/sliceway" apply /etc/50%%/a$$b.yaml --layouts-only' in unit
    assert "AssertPathExists=/etc/50%%/a$b.yaml\n" in unit
