"""What a Hub is asked about: refs and files."""

import re
from dataclasses import dataclass
from typing import Literal

RefKind = Literal["branch", "tag", "other"]
RepoKind = Literal["model", "dataset"]
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Ref:
    """A branch, a tag or (`other`) a `refs/convert/*` ref, and the 40-hex commit it points at."""

    name: str
    kind: RefKind
    commit: str


@dataclass(frozen=True)
class RepoFile:
    """A file of one commit.

    Attributes:
        path: Relative to the root of the repository, with `/`.
        size: Bytes.
        sha256: Hash of the content where known without reading it (on the Hub: every weight file), else None.
        git_sha1: Git's hash of the content (over its length, too), which the Hub tells of every other file.
    """

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None = None
