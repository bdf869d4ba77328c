"""The Hub: refs, trees and files of repositories. The only part that speaks HTTP, through huggingface_hub.

`client` asks, `failures` decides what is tried again and how a failure is told, `rate` keeps below the server's
limits, `cache` reads the user's own Hub cache. `ranges` reads a file by ranges, `partial` keeps what has arrived of
one, `transfer` fetches several at once, `reading` reads pieces into memory, `progress` counts arriving bytes.
"""

from redundancy_trace.hub.cache import hub_cache
from redundancy_trace.hub.client import Hub
from redundancy_trace.hub.failures import is_refused, may_pass
from redundancy_trace.hub.progress import Stopped
from redundancy_trace.hub.reading import RemoteFolder
from redundancy_trace.hub.records import COMMIT, Ref, RefKind, RepoFile, RepoKind

__all__ = [
    "COMMIT",
    "Hub",
    "Ref",
    "RefKind",
    "RemoteFile",
    "RemoteFolder",
    "RepoFile",
    "RepoKind",
    "Stopped",
    "hub_cache",
    "is_refused",
    "may_pass",
]
