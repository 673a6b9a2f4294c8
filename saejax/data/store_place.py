"""Where a store may be: a local folder, or a place that a URL names."""

import os
import pathlib

_SCHEMES = ("file", "gs", "s3")


def check_place(path: str, name: str) -> None:
    """Refuses a place where no store can be made; nothing is created, and no network is asked.

    Args:
      path: a local folder or a URL.
      name: of the setting, for messages.

    Raises:
      ValueError: another scheme than those of stores, or a file where there must be a folder.
    """
    scheme, is_url, rest = path.partition("://")
    if is_url and scheme not in _SCHEMES:
        raise ValueError(
            f"{name} = {path!r}: scheme {scheme!r} is not supported; give a local path or "
            f"{', '.join(f'{known}://' for known in _SCHEMES[:-1])} or {_SCHEMES[-1]}://"
        )
    if is_url and scheme != "file":
        return
    folder = pathlib.Path(os.path.abspath(os.path.expanduser(rest if is_url else path)))
    for place in (folder, *folder.parents):
        if os.path.exists(place) and not os.path.isdir(place):
            raise ValueError(f"{name} = {path!r}: {place} is not a folder; give another path")
