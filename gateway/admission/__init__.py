"""Who may run what, where and when: limits, fair queues, capacity, and the choice of a replica."""

from gateway.admission.admission import Admission, AdmissionPolicy, Ask
from gateway.admission.claim import Claim
from gateway.admission.estimate import Estimate
from gateway.admission.limits import Limits, duration, rate_limit_headers
from gateway.admission.loads import Loads
from gateway.admission.salts import CacheSalts
from gateway.admission.schema import QueueConfig, RateLimits, SharedLimitsConfig, TenantLimits

__all__ = [
    "Admission",
    "AdmissionPolicy",
    "Ask",
    "CacheSalts",
    "Claim",
    "Estimate",
    "Limits",
    "Loads",
    "QueueConfig",
    "RateLimits",
    "SharedLimitsConfig",
    "TenantLimits",
    "duration",
    "rate_limit_headers",
]
