"""Places that are given as a path or as a URL of a pyarrow file system.

A URL may carry options, as `s3://bucket/chats?region=eu-west-1`, so that names are added before the
question mark. It never carries a password: Ray, manifests and statements write places down.

    >>> below("s3://bucket/chats?region=eu-west-1", "manifest.json")
    's3://bucket/chats/manifest.json?region=eu-west-1'
    >>> name_of("s3://bucket/chats/checkpoint-1?region=eu-west-1")
    'checkpoint-1'
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl

_SECRETS = ("password", "secret", "key", "token", "credential", "signature", "sas")


def is_url(place: str) -> bool:
    """Returns whether a place is a URL and not a path."""
    return "://" in place


def absolute(place: str) -> str:
    """Returns a path made absolute; a URL is absolute already."""
    return place if is_url(place) else str(Path(place).expanduser().absolute())


def below(place: str, name: str) -> str:
    """Returns the place of a file or folder within another."""
    if not is_url(place):
        return f"{place.rstrip('/')}/{name}"
    base, mark, options = place.partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{options}"


def name_of(place: str) -> str:
    """Returns the last part of a place."""
    return (place.partition("?")[0] if is_url(place) else place).rstrip("/").rpartition("/")[2]


def holds_secret(place: str) -> bool:
    """Returns whether a URL has a password before its host, or an option that is named like one."""
    if not is_url(place):
        return False
    address, _, options = place.partition("://")[2].partition("?")
    # Not by a parser: a key may hold a slash, and would then be taken for a path.
    user, at, _ = address.rpartition("@")
    names = [name.lower() for name, _ in parse_qsl(options, keep_blank_values=True)]
    return bool(at and ":" in user) or any(word in name for name in names for word in _SECRETS)
