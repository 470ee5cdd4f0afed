"""A cluster's head as the planning of the process that leads it asks it, through Ray."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from placement.cluster.survey import Survey
from placement.cluster.transitions import Why, digest
from placement.errors import StalePlan
from placement.status import LeaderStatus
from placement.transition import Record, Transition
from placement.transition.journal import public_record

_SURVEY_SECONDS = 30.0
_ANSWER_SECONDS = 30.0
_WHOM = "the cluster's head"


class RayLedHead:
    """`gateway.cluster_leader.LedHead`: the actor `head` of the cluster at `address`, which `me` leads."""

    def __init__(self, head: Any, address: str, me: str) -> None:
        self._head, self._address, self._me = head, address, me

    def survey(self) -> Survey:
        """As `Head.survey`. Raises NotSurveyed, ClusterError."""
        return Survey.model_validate_json(self._ask(self._head.survey.remote(), _SURVEY_SECONDS))

    def carry_out(self, survey: Survey, transition: Transition, why: Why) -> None:
        """Have it begin. Raises StalePlan, ClusterError."""
        if not hasattr(self._head, "carry_out_for"):
            raise StalePlan(
                "the head is of an earlier version, and carries out only what sliceway apply --ray tells it"
            )
        wanted = replace(transition, wanted=digest(survey.config), fingerprint=survey.fingerprint)
        record = json.dumps(public_record(Record(wanted, datetime.now(UTC))))
        self._ask(self._head.carry_out_for.remote(self._me, why, record), _ANSWER_SECONDS)

    def transition(self) -> Mapping[str, Any] | None:
        """As `Head.transition`. Raises ClusterError."""
        found: Mapping[str, Any] | None = self._ask(self._head.transition.remote(), _ANSWER_SECONDS)
        return found

    def tell(self, told: LeaderStatus) -> None:
        """What it tells of this process's plans; a head of an earlier version tells nothing of it. Raises ClusterError."""
        if hasattr(self._head, "tell"):
            self._ask(self._head.tell.remote(self._me, told.model_dump_json()), _ANSWER_SECONDS)

    def _ask(self, question: Any, seconds: float) -> Any:
        import ray

        from placement.cluster.asking import asking

        with asking(_WHOM, self._address):
            return ray.get(question, timeout=seconds)
