"""The guards that the promise stands on, each with the one edit that takes it out and the test that must then
fail. Data, and one function that makes a copy of the code with a guard missing and runs its test there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: What a copy of the code consists of.
PARTS = ("headrace", "producer", "engine", "sink", "tests", "pyproject.toml")


@dataclass(frozen=True, slots=True)
class Guard:
    name: str
    file: str
    present: str
    absent: str
    test: str


GUARDS = (
    Guard(
        "fence in finish", "headrace/scripts/finish.lua",
        "local holds = not lease.err and #lease == 1", "local holds = true",
        "tests/headrace/test_leases.py::test_a_consumer_that_lost_its_lease_is_fenced",
    ),
    Guard(
        "fence in renew", "headrace/scripts/renew.lua",
        "if p.err or #p == 0 or #redis", "if p.err or #redis",
        "tests/headrace/test_leases.py::test_renewal_prolongs_and_names_what_is_lost",
    ),
    Guard(
        "JUSTID in renew", "headrace/scripts/renew.lua",
        ", 0, id, 'JUSTID')", ", 0, id)",
        "tests/chaos/test_order.py::test_a_renewal_is_no_delivery",
    ),
    Guard(
        "dedupe mark at submit", "headrace/scripts/submit.lua",
        "if mark and mark ~= 'x' then", "if false then",
        "tests/headrace/test_ledger.py::test_a_job_submitted_twice_is_queued_once",
    ),
    Guard(
        "mark at finish", "headrace/scripts/finish.lua",
        "if mark and mark ~= 'q' and mark ~= 'x' then", "if false then",
        "tests/headrace/test_ledger.py::test_two_entries_with_one_id_end_in_one_completion",
    ),
    Guard(
        "allow-oom of finish", "headrace/scripts/finish.lua",
        "#!lua flags=allow-oom", "#!lua",
        "tests/headrace/test_ledger.py::test_a_full_server_can_still_be_drained",
    ),
    Guard(
        "replay of an engine's lost replies", "engine/service/intake.py",
        "                self._lost_reply = True", "                self._lost_reply = False",
        "tests/engine/service/test_service.py::test_what_a_lost_reply_handed_over_is_run_by_the_same_engine",
    ),
    Guard(
        "replay of a sink's lost replies", "sink/base.py",
        "            except StoreUnavailable as e:\n                self._replay = True",
        "            except StoreUnavailable as e:\n                self._replay = False",
        "tests/sink/test_consumer.py::test_entries_of_a_reply_that_was_lost_are_found_again",
    ),
    Guard(
        "reads that hand over are never sent again", "headrace/leases.py",
        'args, "once")\n        made', "args)\n        made",
        "tests/headrace/test_connection.py::test_a_reply_that_is_lost_is_asked_for_again_where_that_is_harmless",
    ),
    Guard(
        "the sink knows what it has written", "sink/jsonl.py",
        "if key in known or key in self._staged:", "if key in self._staged:",
        "tests/sink/test_jsonl.py::test_a_row_is_written_once_however_often_it_comes",
    ),
    Guard(
        "fsync before the acknowledgement", "sink/files.py",
        "view = view[os.write(self._fd, view) :]\n            os.fsync(self._fd)",
        "view = view[os.write(self._fd, view) :]",
        "tests/chaos/test_order.py::test_a_row_is_on_the_disk_before_it_is_acknowledged",
    ),
    Guard(
        "fsync of the spool", "engine/service/spool.py",
        "            os.fsync(self._fd)\n        except", "        except",
        "tests/chaos/test_order.py::test_a_spooled_completion_is_on_the_disk",
    ),
    Guard(
        "heartbeat tied to progress", "engine/service/keeper.py",
        "if now - moved_at < desk.settings.lease_s:", "if True:",
        "tests/chaos/test_hang.py::test_an_engine_that_hangs_loses_its_leases",
    ),
    Guard(
        "newer versions are held", "engine/service/jobs.py",
        "held.newer = _newer(held.leased.raw)", "held.newer = False",
        "tests/chaos/test_drain.py::test_a_job_of_the_next_version_waits_for_an_engine_that_reads_it",
    ),
    Guard(
        "the spool of the dead is committed", "engine/service/service.py",
        "            commit_left_behind(desk)\n", "",
        "tests/chaos/test_outage.py::test_an_engine_killed_in_an_outage_leaves_its_completions_to_the_next",
    ),
)  # fmt: skip


def without(guard: Guard, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the guard's test on a copy of the code that lacks it. Raises AssertionError where the guard is not
    where it was: then this table is out of date, and proves nothing."""
    copy = folder / "copy"
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(
                source, copy / part, ignore=shutil.ignore_patterns("__pycache__", "*.so", "*.bak")
            )
        else:
            shutil.copy(source, copy / part)
    path = copy / guard.file
    text = path.read_text()
    assert guard.present in text, f"{guard.name}: {guard.file} no longer holds {guard.present!r}"
    path.write_text(text.replace(guard.present, guard.absent, 1))
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--timeout", "120", guard.test]
    env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
