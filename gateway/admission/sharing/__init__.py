"""One limit, or one replica, for several gateway processes: shares of it, handed out by a store."""

from gateway.admission.sharing.ledger import Grant, Report, settle
from gateway.admission.sharing.shares import LimitShares, RoomShares
from gateway.admission.sharing.sharing import LimitStore, Sharing

__all__ = ["Grant", "LimitShares", "LimitStore", "Report", "RoomShares", "Sharing", "settle"]
