"""What a Hub is asked about: refs and files."""

import hashlib
import re
from dataclasses import dataclass
from typing import BinaryIO, Literal

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

    def is_content(self, stream: BinaryIO) -> bool:
        """Whether what a stream holds has the hash; True where none is known."""
        if self.sha256 is not None:
            digest = hashlib.sha256()
        elif self.git_sha1 is not None:
            digest = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        else:
            return True
        while chunk := stream.read(1024 * 1024):
            digest.update(chunk)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)
