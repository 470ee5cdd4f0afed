"""What the gateway as a Serve application is given; Ray itself is not started."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from gateway.serve_ingress import application
from model_registry.errors import ConfigError


@pytest.mark.parametrize("arguments", [{}, {"replicas": 2}, {"config": "a", "colour": "red"}])
def test_arguments_that_make_no_sense_are_refused(arguments: Mapping[str, Any]) -> None:
    with pytest.raises(ConfigError, match="the ingress takes `config`") as refused:
        application(arguments)
    assert "serve run" in str(refused.value.remedy)
