"""Who may do what on the server: the scripts and commands that each role sends, and a probe for them.

A script's commands are read out of the script, so that the list cannot fall behind. `deploy/redis/users.acl`
grants these and no more. Knows the key families, no policy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from typing import Any

from headrace.keys import REPLY_PREFIX, Keys
from headrace.messages import Priority


class Role(StrEnum):
    """One user of the server each."""

    PRODUCER = "producer"
    ENGINE = "engine"
    SINK = "sink"
    ADMIN = "admin"


#: Scripts that each role runs. An admin runs all of them as well.
SCRIPTS = {
    Role.PRODUCER: ("submit", "reject", "cancel"),
    Role.ENGINE: (
        "lease", "position", "renew", "finish", "release", "crash", "expired", "heal", "take",
        "mine", "leave", "heartbeat",
    ),
    Role.SINK: ("ensure_group", "mine", "ack_results", "lag"),
    Role.ADMIN: ("forget", "reopen"),
}  # fmt: skip

#: Commands that each role sends by themselves: (command, key family).
COMMANDS = {
    Role.PRODUCER: (
        ("XLEN", "jobs"), ("HGETALL", "run"), ("HGET", "marks"), ("HSET", "run"), ("XLEN", "results"),
        ("XREAD", "reply"), ("XDEL", "reply"), ("GET", "kept"), ("HGETALL", "engines"),
        ("ZREVRANGE", "runs"),
    ),
    Role.ENGINE: (
        ("XREAD", "jobs"), ("XLEN", "jobs"), ("XLEN", "results"), ("HGETALL", "engines"), ("HDEL", "engines"),
        ("GET", "jobs"), ("LLEN", "jobs"), ("ZRANGE", "cancels"),
    ),
    Role.SINK: (("XREADGROUP", "results"), ("XLEN", "results")),
    Role.ADMIN: (
        ("SCAN", ""), ("XRANGE", "jobs"), ("XRANGE", "results"), ("XRANGE", "dead"), ("XDEL", "dead"),
        ("GET", "jobs"), ("HSCAN", "marks"), ("HGETALL", "run"),
        ("XINFO GROUPS", "results"), ("XGROUP DESTROY", "results"), ("CONFIG GET", ""), ("ACL LIST", ""),
        ("MEMORY USAGE", "jobs"), ("SLOWLOG GET", ""), ("CLIENT LIST", ""),
    ),
}  # fmt: skip

#: Key families whose keys each role's scripts touch.
_FAMILIES = {
    Role.PRODUCER: ("jobs", "runs", "marks", "run", "results", "cancels"),
    Role.ENGINE: (
        "jobs",
        "attempts",
        "runs",
        "marks",
        "run",
        "results",
        "kept",
        "engines",
        "cancels",
        "dead",
        "crashes",
    ),
    Role.SINK: ("results", "attempts"),
}

_CALL = re.compile(r"""redis\.p?call\(\s*'(\w+)'(?:\s*,\s*'([A-Z]+)')?""")
#: Commands whose second word is part of their name.
_CONTAINERS = {"XGROUP", "XINFO", "CONFIG", "ACL", "MEMORY", "SLOWLOG", "CLIENT"}

#: Asks the server, as this user, which of the given commands it would refuse. Runs none of them.
PROBE = """#!lua flags=no-writes
local refused = {}
for i, line in ipairs(ARGV) do
  local words = {}
  for word in string.gmatch(line, '%S+') do words[#words + 1] = word end
  if not redis.acl_check_cmd(unpack(words)) then refused[#refused + 1] = i end
end
return refused
"""


@dataclass(frozen=True, slots=True)
class Right:
    """One thing that a role must be allowed to do. `sample` is a command as the server sees it."""

    role: Role
    name: str
    sample: str


def rights(role: Role, lane: str) -> list[Right]:
    """All that a role needs on a lane."""
    if role is Role.ADMIN:
        below = [r for other in (Role.PRODUCER, Role.ENGINE, Role.SINK) for r in rights(other, lane)]
        own = {command for script in SCRIPTS[role] for command in script_commands(script)}
        below = [Right(role, r.name, r.sample) for r in below]
        below += [_right(role, name, "marks", lane) for name in sorted(own)]
        return below + [_right(role, command, family, lane) for command, family in COMMANDS[role]]
    keys = [_key(family, lane) for family in _FAMILIES[role]]
    out = [Right(role, f"scripts on {key}", f"EVALSHA 0 1 {key}") for key in keys]
    out += [Right(role, "eval", f"EVAL 0 1 {keys[0]}")]
    for name in sorted({command for script in SCRIPTS[role] for command in script_commands(script)}):
        out.append(_right(role, name, _FAMILIES[role][0], lane))
    return out + [_right(role, command, family, lane) for command, family in COMMANDS[role]]


def script_commands(script: str) -> set[str]:
    """Names of the commands that a script calls."""
    source = resources.files("headrace").joinpath("scripts", f"{script}.lua").read_text("utf-8")
    return {f"{a} {b}" if a in _CONTAINERS else a for a, b in _CALL.findall(source)}


def refused(client: Any, wanted: list[Right]) -> list[Right]:
    """Those that the client's user may not do. Raises NoPermissionError where it may not even ask (EVAL)."""
    return [wanted[i - 1] for i in client.execute_command("EVAL", PROBE, 0, *(r.sample for r in wanted))]


def _right(role: Role, command: str, family: str, lane: str) -> Right:
    return Right(role, command.lower(), _sample(command, _key(family, lane) if family else ""))


def _sample(command: str, key: str) -> str:
    if command == "XREAD":
        return f"XREAD STREAMS {key} 0"
    if command == "XREADGROUP":
        return f"XREADGROUP GROUP g c STREAMS {key} >"
    if command == "TIME" or not key:
        return command
    if command == "XGROUP CREATE":
        return f"XGROUP CREATE {key} g 0"
    return f"{command} {key}" if command in ("DEL", "EXISTS") else f"{command} {key} x x x"


def _key(family: str, lane: str) -> str:
    keys = Keys(lane)
    return {
        "jobs": keys.jobs(Priority.NORMAL),
        "runs": keys.runs,
        "marks": keys.marks("doctor"),
        "run": keys.run("doctor"),
        "results": keys.results(None),
        "reply": keys.results(f"{REPLY_PREFIX}doctor"),
        "kept": keys.kept("doctor"),
        "attempts": keys.attempts,
        "engines": keys.engines,
        "cancels": keys.cancels,
        "dead": keys.dead,
        "crashes": keys.crashes,
    }[family]
