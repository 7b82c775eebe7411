"""Downloads: resumed where they broke off, shown while they run, checked, and put in place whole; once, however many processes ask.

Over https with the standard library, from Zenodo and the like and from the Hugging Face hub, whose own library says who may have what and
keeps the cache. That library (2.4) begins anew after an interruption: its partial files have a name of their own for each process.
Every failure is a WeightsUnavailable that says which one it was; the caller adds what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

from cellbench.errors import WeightsUnavailable, one_line
from cellbench.file_cache import sha256
from cellbench.files import make_folder, os_errors_as

TIMEOUT_S = 30
TRIES = 3
BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DownloadSource:
    """A file to be had over https. ``shown`` stands for it in messages, since the hub's own addresses carry signatures."""

    url: str
    shown: str
    sha256: str = ""
    """As published; empty: not known."""
    token: str = ""
    """Sent to this host only, not to where it may redirect."""


@contextlib.contextmanager
def hold_lock(lock: Path) -> Iterator[None]:
    """Held by one process at a time; the others wait. The lock file stays, since removing it is where such schemes break."""
    import filelock

    make_folder(lock.parent)
    with filelock.FileLock(lock):
        yield


def download_https(source: DownloadSource, to: Path, check: Callable[[Path], None], lock: Path | None = None) -> None:
    """Puts a file at ``to``, or leaves ``to`` as it was. ``check`` sees the finished file before it lands.

    A broken download stays as ``<name>.part`` and is gone on with the next time. Raises WeightsUnavailable.
    """
    make_folder(to.parent)
    with hold_lock(lock or to.with_name(to.name + ".lock")):
        if to.is_file():
            return  # another process fetched it while this one waited
        part, hidden = to.with_name(to.name + ".part"), to.with_name(f".{to.name}")
        for left in reversed(range(TRIES)):
            try:
                with os_errors_as(f"downloading {source.shown} to {part}"):
                    _fetch(source, part)
                break
            except _BrokenOffError as error:
                if not left:
                    raise WeightsUnavailable(f"{source.shown} {error}. Run the same command again to go on from there.") from error
        part.rename(hidden)  # a name of the right suffix, so that ``check`` knows the format
        try:
            check(hidden)
        except WeightsUnavailable as error:
            hidden.unlink()
            what = str(error).removeprefix(f"{hidden}: ").split(". Delete", 1)[0]
            raise WeightsUnavailable(f"what {source.shown} gave {what}; it was deleted.") from error
        _check_hash(source, hidden)
        os.replace(hidden, to)


class _BrokenOffError(Exception):
    """The connection ended before the file did."""


def _fetch(source: DownloadSource, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(source.url, headers={"User-Agent": "cellbench", **({"Range": f"bytes={have}-"} if have else {})})
    if source.token:
        request.add_unredirected_header("Authorization", f"Bearer {source.token}")
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:
            # Nothing behind what is here: either it is complete, or it belongs to another file.
            if error.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink()
            return _fetch(source, part)
        raise _refused(source.shown, error.code, error.reason) from error
    except (OSError, HTTPException) as error:
        raise _no_network(urlsplit(source.url).netloc, getattr(error, "reason", error)) from error
    with response:
        resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        done = start
        with part.open("ab" if resumed else "wb") as file, _progress(source.shown, start, total) as bar:
            while True:
                try:
                    block = response.read(BLOCK)
                except (OSError, HTTPException) as error:
                    raise _BrokenOffError(f"broke off after {done} of {total or '?'} bytes ({type(error).__name__})") from error
                if not block:
                    break
                file.write(block)
                done += len(block)
                bar.update(len(block))
    if total is not None and done < total:
        raise _BrokenOffError(f"broke off after {done} of {total} bytes")


def _no_network(host: str, why: object) -> WeightsUnavailable:
    return WeightsUnavailable(f"no network: {host} cannot be reached ({' '.join(str(why).split())[:80]}).")


def _refused(shown: str, code: int, reason: str) -> WeightsUnavailable:
    if code in (401, 403):
        return WeightsUnavailable(f"{shown} asks for a log-in (HTTP {code}).")
    if code in (404, 410):
        return WeightsUnavailable(f"{shown} does not exist any more (HTTP {code}).")
    return WeightsUnavailable(f"{shown} answers HTTP {code} {reason}; try again later.")


def _progress(shown: str, start: int, total: int | None) -> contextlib.AbstractContextManager:
    from tqdm import tqdm

    name = Path(unquote(urlsplit(shown).path)).name
    look = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False}
    return tqdm(desc=name, initial=start, total=total, file=sys.stderr, disable=None, **look)  # None: silent in a log file


def _check_hash(source: DownloadSource, path: Path) -> None:
    """Against the card's sha256, else against the md5 that Zenodo lists beside each file; elsewhere nothing is known yet."""
    if source.sha256:
        found, wanted = sha256(path), source.sha256
    else:
        wanted = _zenodo_md5(source.url)
        if not wanted:
            return
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
    if found != wanted:
        path.unlink()
        hashes = f"({found[:16]}…) than published ({wanted[:16]}…)"
        raise WeightsUnavailable(f"{source.shown} gave a file of another hash {hashes}; it was deleted.")


def _zenodo_md5(url: str) -> str:
    """The md5 that a Zenodo record states for a file, or the empty string: ``…/records/ID/files/NAME`` -> ``…/api/records/ID``."""
    parts = urlsplit(url)
    match = re.fullmatch(r"/records/(\d+)/files/([^/]+)", parts.path)
    if not match:
        return ""
    try:
        with urllib.request.urlopen(f"{parts.scheme}://{parts.netloc}/api/records/{match[1]}", timeout=TIMEOUT_S) as response:
            files = json.load(response)["files"]
        stated = next(str(file["checksum"]) for file in files if file["key"] == unquote(match[2]))
    except (OSError, HTTPException, ValueError, KeyError, TypeError, StopIteration):
        return ""  # a second opinion only: the sha256 of what came is recorded all the same
    return stated.removeprefix("md5:") if stated.startswith("md5:") else ""


def find_cached(repo: str, name: str, revision: str | None) -> Path | None:
    """The file in the hub's own cache, or None; no network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, cache_dir=_hub_cache(), revision=revision)
    return Path(found) if isinstance(found, str) else None


def download_from_hub(repo: str, names: tuple[str, ...], revision: str | None, check: Callable[[Path], None]) -> tuple[Path, str]:
    """Downloads the first of ``names`` that the repository has into the hub's cache, from ``HF_ENDPOINT`` where that is set.

    Gives where it lies and its name; ``check`` sees it before it lands. Raises WeightsUnavailable.
    """
    from huggingface_hub import errors, get_hf_file_metadata, get_token, hf_hub_download, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT") or None
    for name in names:
        try:
            with os_errors_as(f"downloading {repo}/{name}"):
                # Asked for first without retries: hf_hub_download tries an unreachable host for 30 s, for each card of a grid.
                url = hf_hub_url(repo, name, revision=revision, endpoint=endpoint)
                facts = get_hf_file_metadata(url, timeout=TIMEOUT_S, endpoint=endpoint)
                _hub_blob(f"{repo}/{name}", url, facts.location, facts.etag or "", check)
                # Finds the file that now lies where it would have put it, and only adds the links.
                return Path(hf_hub_download(repo, name, revision=revision, cache_dir=_hub_cache(), endpoint=endpoint)), name
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
        except errors.HTTPError as error:  # httpx's own, of the version that the hub's library uses
            raise _no_network("the hub", error) from error
        except (OSError, RuntimeError) as error:
            raise WeightsUnavailable(f"{repo}/{name} broke off ({one_line(error)[:100]}). Run the same command again.") from error
    raise WeightsUnavailable(f"{repo} has no file {' or '.join(names)}.")


def _hub_blob(shown: str, url: str, location: str, etag: str, check: Callable[[Path], None]) -> None:
    """A large file, into ``blobs`` of the hub's cache under its sha256, which is its etag; under the lock that the hub's library takes.

    Small files have another kind of etag and are left to the library.
    """
    from huggingface_hub import get_token

    if not re.fullmatch("[0-9a-f]{64}", etag):
        return
    folder = "models--" + "--".join(shown.split("/")[:2])
    same_host = urlsplit(location).netloc == urlsplit(url).netloc
    source = DownloadSource(url=location, shown=shown, sha256=etag, token=(get_token() or "") if same_host else "")
    download_https(source, _hub_cache() / folder / "blobs" / etag, check, lock=_hub_cache() / ".locks" / folder / f"{etag}.lock")


def _hub_cache() -> Path:
    """Where the hub keeps files, read from the environment now: the library reads it once, at import."""
    import huggingface_hub.constants

    if folder := os.environ.get("HF_HUB_CACHE"):
        return Path(folder).expanduser()
    return Path(folder).expanduser() / "hub" if (folder := os.environ.get("HF_HOME")) else Path(huggingface_hub.constants.HF_HUB_CACHE)
