"""The Hub: refs, trees and files of repositories. The only part that speaks HTTP, through huggingface_hub.

`client` asks, `failures` decides what is tried again and how a failure is told, `cache` reads the user's own
Hub cache, `progress` counts arriving bytes.
"""

from redundancy_trace.hub.client import Hub
from redundancy_trace.hub.records import COMMIT, Ref, RefKind, RepoFile, RepoKind

__all__ = ["COMMIT", "Hub", "Ref", "RefKind", "RepoFile", "RepoKind"]
