"""What `feedback.scorers` names: "NAME=module:function", or "NAME=openai:MODEL@https://host/v1"."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from streamsynth.errors import UserError
from streamsynth.feedback.reward import ATTRIBUTE, UTILITY
from streamsynth.feedback.scorers.endpoint import Endpoint
from streamsynth.feedback.scorers.function import Function
from streamsynth.feedback.scorers.records import Records, quota
from streamsynth.feedback.scorers.reply import Source
from streamsynth.feedback.scorers.scorer import Limits, Scorer
from streamsynth.runtime import hosts

_FORM = "give NAME=module:function or NAME=openai:MODEL@https://host/v1"
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_HTTP = re.compile(r"openai:(?P<model>\S+)@(?P<url>https?://\S+)")
# Of these names rows and metrics have scores already.
RESERVED = ("quality", UTILITY, "diversity", ATTRIBUTE, "reward", "verifier", "posterior", "encoder")


def sources(config: Any) -> dict[str, Source]:
    """Whom the specs name, by the names that they give; nothing is started.

    Args:
      config: the whole config.

    Raises:
      UserError: a spec has another form, a name is taken, or a scorer has no weight.
    """
    found: dict[str, Source] = {}
    weighed = {**config.feedback.judges, **config.feedback.secondary}
    for spec in config.feedback.scorers:
        name, equals, rest = spec.partition("=") if isinstance(spec, str) else ("", "", "")
        if not equals or not _NAME.fullmatch(name):
            raise UserError(f"feedback.scorers has {spec!r}: {_FORM}.")
        if name in RESERVED or name in found:
            raise UserError(f"feedback.scorers names {name!r}, which is taken: give it another name.")
        if name not in weighed:
            raise UserError(
                f"feedback.scorers names {name}, which has no weight: set feedback.judges.{name} or "
                f"feedback.secondary.{name}."
            )
        found[name] = (
            _endpoint(spec, rest, config) if rest.startswith("openai:") else _function(spec, rest, config)
        )
    for name in config.feedback.secondary:
        if name not in found and name not in (ATTRIBUTE, UTILITY):
            raise UserError(
                f"feedback.secondary.{name} is neither {ATTRIBUTE}, {UTILITY} nor a scorer: name it in "
                "feedback.scorers."
            )
        if name in config.feedback.judges:
            raise UserError(
                f"{name} stands in feedback.judges and in feedback.secondary: leave one of them out."
            )
    return found


def make_scorers(config: Any, folder: Path | None) -> dict[str, Scorer]:
    """The scorers of a run that have a weight, with their journals FOLDER/NAME.jsonl (None: no journals)."""
    s, process = config.scorers, hosts.index()
    found = {}
    for name, source in _used(config).items():
        records = Records(folder and folder / f"{name}.jsonl", process)
        mine = records.requests + quota(records.spent, s.max_requests, process, hosts.count())
        limits = Limits(s.retries, s.backoff_seconds, mine, s.key_variable)
        found[name] = Scorer(name, source, limits, records)
    hosts.wait("scorers' journals are read")  # before anyone writes to them
    return found


def probe(config: Any) -> None:
    """Raises UserError for a function that cannot be imported, or a key that is not there."""
    for source in _used(config).values():
        source.probe()


def _used(config: Any) -> dict[str, Source]:
    weights: Mapping[str, float] = {**config.feedback.judges, **config.feedback.secondary}
    return {name: source for name, source in sources(config).items() if weights[name]}


def _function(spec: str, rest: str, config: Any) -> Function:
    module, _, name = rest.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UserError(f"feedback.scorers has {spec!r}: {_FORM}.")
    return Function(rest, batch=config.scorers.batch_size, timeout=config.scorers.timeout_seconds)


def _endpoint(spec: str, rest: str, config: Any) -> Endpoint:
    s, found = config.scorers, _HTTP.fullmatch(rest)
    if not found:
        raise UserError(f"feedback.scorers has {spec!r}: {_FORM}.")
    at = urlsplit(found["url"])
    try:
        valid = bool(at.hostname) and rest.isascii() and (at.port is None or at.port > 0)
    except ValueError:  # no such port
        valid = False
    if not valid:
        raise UserError(f"feedback.scorers has {spec!r}: {_FORM}.")
    if at.username is not None or at.query or at.fragment:
        # Without the spec: what stands there may be a key.
        raise UserError(
            f"the address of the scorer {spec.partition('=')[0]} in feedback.scorers has more than host, "
            "port and path: keys come from the environment variable that scorers.key_variable names."
        )
    if s.key_variable and at.scheme == "http" and not _local(at.hostname):
        raise UserError(
            f"the scorer {spec.partition('=')[0]} would send its key over plain http to {at.hostname}: "
            "use https."
        )
    return Endpoint(
        model=found["model"],
        url=found["url"],
        key_variable=s.key_variable,
        scale=s.scale,
        max_tokens=s.max_tokens,
        timeout=s.timeout_seconds,
        concurrency=s.concurrency,
    )


def _local(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
