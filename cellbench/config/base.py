"""The base of every record that users write. Unknown keys and numbers written as text are refused with a one-line message."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cellbench.errors import CellbenchError, one_line, unknown_name
from cellbench.escaping import readable

Scalar = bool | int | float | str

T = TypeVar("T", bound=BaseModel)


class StrictModel(BaseModel):
    """A frozen record that refuses unknown keys and does not read numbers out of strings."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def checked(record: type[T], tree: Mapping[str, Any], where: str) -> T:
    """``record`` from a tree. Raises CellbenchError that names ``where``, the key, the value and what is expected."""
    try:
        # Through JSON, where strict mode accepts a list for a tuple; TOML's dates become strings and are refused.
        return record.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise _error(record, error, where) from None


def read_json(record: type[T], data: bytes, where: str) -> T:
    """``record`` from JSON that was written earlier. Raises CellbenchError, as :func:`checked`, also for damaged JSON."""
    try:
        if b"\\ud" in data.lower():  # halves of characters, as names of files hold that are not UTF-8: pydantic refuses them
            data = json.dumps(_readable(json.loads(data)), ensure_ascii=False).encode()
        return record.model_validate_json(data)
    except ValidationError as error:
        raise _error(record, error, where) from None
    except (ValueError, RecursionError) as error:
        raise CellbenchError(f"{where}: is damaged ({one_line(error)[:80]}).") from None


def _readable(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {readable(key): _readable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_readable(value) for value in tree]
    return readable(tree) if isinstance(tree, str) else tree


def _error(record: type[BaseModel], error: ValidationError, where: str) -> CellbenchError:
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    if first["type"] == "json_invalid":
        return CellbenchError(f"{where}: is damaged ({first['msg'][:80]}).")
    if first["type"] == "extra_forbidden":
        fields: Iterable[str] = record.model_fields
        for part in first["loc"][:-1]:
            inner = record.model_fields[str(part)].annotation
            fields = getattr(inner, "model_fields", ())
        return unknown_name("setting", str(first["loc"][-1]), fields, where=where)
    if first["type"] == "missing":
        return CellbenchError(f"{where}: '{path}' is missing.")
    message = first["msg"].removeprefix("Value error, ")
    given = "" if first["type"] == "value_error" and not path else f" = {first['input']!r:.100}"
    more = f" ({len(error.errors()) - 1} more like it.)" if len(error.errors()) > 1 else ""
    what = f"{path}{given}: " if path or given else ""  # a rule on several settings has no path, and names them itself
    return CellbenchError(f"{where}: {what}{message[:1].lower() + message[1:].rstrip('.')}.{more}")
