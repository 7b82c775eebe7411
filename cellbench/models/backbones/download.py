"""Downloads weight files: with resume, progress, checks, and only once for concurrent processes.

Files on the Hugging Face hub go through its own library into its cache; that library resumes within a call. Other files come over https with
the standard library and are resumed in later calls too. Every failure is a WeightsUnavailable that gives the reason; the caller adds the
remedy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from cellbench.console import progress_bar
from cellbench.errors import WeightsUnavailable, one_line
from cellbench.file_cache import sha256
from cellbench.files import make_folder, os_errors_as

TIMEOUT_S = 30
TRIES = 3
BLOCK = 1 << 20


@contextlib.contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """A lock between processes. The lock file is never removed, since that would be a race."""
    import filelock

    make_folder(lock.parent)
    with filelock.FileLock(lock):
        yield


# --- https --------------------------------------------------------------------------------------------------------------------------


def download_https(url: str, to: Path, check: Callable[[Path], None], published_sha256: str = "") -> None:
    """Downloads a file to ``to`` atomically, after its check. Does nothing if it exists.

    ``check`` raises WeightsUnavailable for a file that is no weights file. The hash is compared with ``published_sha256``, else with the md5
    that a Zenodo record states. An interrupted download stays as ``<name>.part`` and is resumed by the next call. Raises WeightsUnavailable.
    """
    make_folder(to.parent)
    with hold_lock(to.with_name(to.name + ".lock")):
        if to.is_file():
            return  # another process downloaded it meanwhile
        part, hidden = to.with_name(to.name + ".part"), to.with_name(f".{to.name}")
        for left in reversed(range(TRIES)):
            try:
                with os_errors_as(f"downloading {url} to {part}"):
                    _fetch(url, part)
                break
            except _InterruptedError as error:
                if not left:
                    raise WeightsUnavailable(f"{url} {error}. Run the same command again to resume the download.") from error
        part.rename(hidden)
        if published_sha256 or not (md5 := _zenodo_md5(url)):
            _verify(hidden, url, check, published_sha256)
        else:
            _verify(hidden, url, check, md5, _md5)
        os.replace(hidden, to)


class _InterruptedError(Exception):
    """The connection ended before the end of the file."""


def _fetch(url: str, part: Path) -> None:
    """Downloads the missing rest of ``part``."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "cellbench", **({"Range": f"bytes={have}-"} if have else {})})  # noqa: S310
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # No bytes beyond those here: the file is complete, or is another one.
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink()
            return _fetch(url, part)
        raise _refused(url, error.code, error.reason) from error
    except (OSError, HTTPException) as error:
        raise _no_network(urlsplit(url).netloc, getattr(error, "reason", error)) from error
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        done = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if resumed else "wb") as file, _progress(url, done, total) as bar:
            while True:
                try:
                    block = response.read(BLOCK)
                except (OSError, HTTPException) as error:
                    raise _InterruptedError(f"broke off after {done} of {total or '?'} bytes ({type(error).__name__})") from error
                if not block:
                    break
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise _InterruptedError(f"broke off after {done} of {total} bytes")


def _progress(url: str, start: int, total: int | None) -> Any:
    name = Path(unquote(urlsplit(url).path)).name
    look = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    return progress_bar(desc=name, initial=start, total=total, **look)


def _refused(url: str, code: int, reason: str) -> WeightsUnavailable:
    if code in (401, 403):
        return WeightsUnavailable(f"{url} needs a login (HTTP {code}).")
    if code in (404, 410):
        return WeightsUnavailable(f"{url} does not exist any more (HTTP {code}).")
    return WeightsUnavailable(f"{url} answers HTTP {code} {reason}; try again later.")


def _no_network(host: str, why: object) -> WeightsUnavailable:
    return WeightsUnavailable(f"no network: {host} cannot be reached ({' '.join(str(why).split())[:80]}).")


def _verify(path: Path, shown: str, check: Callable[[Path], None], published: str, digest: Callable[[Path], str] = sha256) -> None:
    """Checks a downloaded file; deletes it and raises WeightsUnavailable if it is wrong. ``published``: its hash, or empty if unknown."""
    try:
        check(path)
    except WeightsUnavailable as error:
        path.unlink()
        what = str(error).removeprefix(f"{path}: ").split(". Delete", 1)[0]
        raise WeightsUnavailable(f"what {shown} gave {what}; it was deleted.") from error
    if published and (found := digest(path)) != published:
        path.unlink()
        hashes = f"({found[:16]}…) than published ({published[:16]}…)"
        raise WeightsUnavailable(f"{shown} gave a file of another hash {hashes}; it was deleted.")


def stated_sha256(path: Path) -> str:
    """The name of a file of the hub's cache, which is its sha256 where it is large; empty for other names."""
    return path.name if re.fullmatch("[0-9a-f]{64}", path.name) else ""


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _zenodo_md5(url: str) -> str:
    """The md5 that a Zenodo record states for a file, or the empty string: ``…/records/ID/files/NAME`` -> ``…/api/records/ID``."""
    parts = urlsplit(url)
    match = re.fullmatch(r"/records/(\d+)/files/([^/]+)", parts.path)
    if not match:
        return ""
    try:
        with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/api/records/{match[1]}", timeout=TIMEOUT_S) as response:  # noqa: S310
            files = json.load(response)["files"]
        stated = next(str(file["checksum"]) for file in files if file["key"] == unquote(match[2]))
    except (OSError, HTTPException, ValueError, KeyError, TypeError, StopIteration):
        return ""  # optional: the sha256 of the download is recorded in any case
    return stated.removeprefix("md5:") if stated.startswith("md5:") else ""


# --- the Hugging Face hub -----------------------------------------------------------------------------------------------------------


def find_cached(repo: str, name: str, revision: str | None) -> Path | None:
    """The file in the hub's cache, or None; no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=_hub_cache(), revision=revision)
    return Path(found) if isinstance(found, str) else None


def download_from_hub(repo: str, names: tuple[str, ...], revision: str | None, check: Callable[[Path], None]) -> tuple[Path, str]:
    """Downloads the first of ``names`` that a repository has into the hub's cache, from ``HF_ENDPOINT`` where that is set.

    Returns its path and its name. A file that ``check`` refuses, or whose hash is not the published one, is deleted. Raises WeightsUnavailable.
    """
    from huggingface_hub import errors, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    for name in names:
        try:
            with os_errors_as(f"downloading {repo}/{name}"):
                # A request without retries first: hf_hub_download retries an unreachable host for 30 s, for each card of a grid.
                get_hf_file_metadata(hf_hub_url(repo, name, revision=revision, endpoint=endpoint), timeout=TIMEOUT_S, endpoint=endpoint)
                path = Path(hf_hub_download(repo, name, revision=revision, cache_dir=_hub_cache(), endpoint=endpoint))
            blob = path.resolve()
            _verify(blob, f"{repo}/{name}", check, stated_sha256(blob))
            return path, name
        except errors.GatedRepoError as error:
            if get_token() is None:
                raise WeightsUnavailable(f"{repo} is gated and nobody is logged in here.") from error
            raise WeightsUnavailable(f"{repo} is gated and this account has not been granted access.") from error
        except errors.RevisionNotFoundError as error:
            raise WeightsUnavailable(f"{repo} has no revision {revision}; the card's is out of date.") from error
        except errors.RepositoryNotFoundError as error:
            raise WeightsUnavailable(f"{repo} does not exist on the hub, or is private to others.") from error
        except errors.OfflineModeIsEnabled as error:
            raise WeightsUnavailable(f"no network allowed: HF_HUB_OFFLINE is set, and {repo}/{name} is not in the cache.") from error
        except errors.LocalEntryNotFoundError as error:
            raise _no_network("the hub", error.__cause__ or error) from error
        except errors.EntryNotFoundError:
            continue
        except errors.HfHubHTTPError as error:
            raise WeightsUnavailable(f"the hub refuses {repo}/{name} ({one_line(error)[:100]}).") from error
        except errors.HTTPError as error:  # errors of the HTTP library that the hub's library uses
            raise _no_network("the hub", error) from error
        except (OSError, RuntimeError) as error:
            raise WeightsUnavailable(f"{repo}/{name} broke off ({one_line(error)[:100]}). Run the same command again.") from error
    raise WeightsUnavailable(f"{repo} has no file {' or '.join(names)}.")


def _hub_cache() -> Path:
    """The folder of the hub's cache, read from the environment now; the hub's library reads it once, at import."""
    import huggingface_hub.constants

    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    return Path(folder).expanduser() / "hub" if (folder := os.environ.get("HF_HOME")) else Path(huggingface_hub.constants.HF_HUB_CACHE)
