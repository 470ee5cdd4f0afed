"""Files that tenants keep here: what batches read and write. Each tenant sees its own."""

from gateway.files.database import Database
from gateway.files.store import FileRecord, FileStore

__all__ = ["Database", "FileRecord", "FileStore"]
