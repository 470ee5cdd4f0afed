"""One limit for several gateway processes: shares of it, handed out by a store."""

from gateway.admission.sharing.ledger import Grant, Report, settle
from gateway.admission.sharing.sharing import LimitStore, Sharing

__all__ = ["Grant", "LimitStore", "Report", "Sharing", "settle"]
